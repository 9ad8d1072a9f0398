"""Backbones on disk that vLLM's kernels for CPUs take, and models on them. Knows no values."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import transformers
from tiny_backbones import QWEN_TEMPLATE, TEXT_CONFIG, _seeded, awaken, make_tokenizer
from vision_families import MROPE, QWEN_VISION, _qwen

from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

HEADS: dict[str, Any] = {
    "head_dim": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.2,  # with less, every token would be as likely as any other
}


def make_qwen3() -> Backbone:
    """Qwen3, a language model without pictures."""
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>", template=QWEN_TEMPLATE)
    config = transformers.Qwen3Config(
        **{**TEXT_CONFIG, **HEADS},
        vocab_size=len(tokenizer) + 24,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    return from_parts(_seeded(transformers.Qwen3ForCausalLM, config), tokenizer)


def make_qwen3_vl() -> Backbone:
    """Qwen3-VL with its real processor."""
    rope = {**MROPE, "mrope_section": [8, 4, 4], "mrope_interleaved": True}
    return _qwen(
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLProcessor,
        16,
        text={**HEADS, "rope_parameters": rope},
        vision={
            **QWEN_VISION,
            "hidden_size": 64,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    )


MAKERS: Mapping[str, Callable[[], Backbone] | None] = {
    "embedded": None,  # lies on disk already
    "qwen3": make_qwen3,
    "qwen3_vl": make_qwen3_vl,
}


def make_vllm_model(
    name: str, folder: Path, *, dtype: str = "float32", **settings: Any
) -> DualLoraModel:
    """Return a model with awakened adapters on a backbone that lies in `folder` or the package."""
    make = MAKERS[name]
    if make is not None and not folder.is_dir():
        backbone = make()
        backbone.model.save_pretrained(folder)
        backbone.processor.save_pretrained(folder)
    settings = {
        "reasoning_lora": LoraSettings(r=2, alpha=4),
        "embedding_lora": LoraSettings(r=3, alpha=6),
        "num_readout_tokens": 3,
        **settings,
    }
    source = folder if make is not None else BACKBONE_DIR
    model = DualLoraModel.from_backbone(source, TwnConfig(**settings), dtype=dtype)
    awaken(model)
    return model
