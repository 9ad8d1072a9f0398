"""Tiny random backbones of each family, built in code. Knows no expected values."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from twn_rl.demo.random_qwen import ImageOnlyProcessor
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.model import DualLoraModel

# Passes share pictures from the transformers on whose models take features made beforehand.
sharing_pictures = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(Qwen3VLModel.forward).parameters,
    reason="the models of this transformers take no features of pictures made beforehand",
)
WORDS = (  # noqa: SIM905 -- one string keeps the list readable
    "find the picture of a camel pizza zebra tree above below left right top bottom center it is "
    "one two three in row column which object answer Assistant: User: System:"
).split()
IDEFICS3_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
QWEN_TEMPLATE = IDEFICS3_TEMPLATE.replace(
    "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
).replace("<end_of_utterance>", "<|im_end|>")
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}


def make_tokenizer(
    special: Sequence[str],
    *,
    eos: str,
    template: str | None,
    named: Mapping[str, str] | None = None,
) -> Any:
    """Return a word-level tokenizer; `<think>` tags are tokens but not special, as in Qwen3.

    `named` are special tokens that its processor looks for under a name, such as `boi_token`.
    """
    special = [*special, *(named or {}).values()]
    tokens = list(dict.fromkeys(["<pad>", "<unk>", *special, "<think>", "</think>", *WORDS]))
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=eos,
        extra_special_tokens=dict(named or {}),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def make_idefics3() -> Backbone:
    """Idefics3 with its real processor: a 32-pixel picture is 2x2 tiles and a whole."""
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    special = [
        "<end_of_utterance>",
        "<|im_start|>",
        "<fake_token_around_image>",
        "<global-img>",
        "<image>",
        *tiles,
    ]
    tokenizer = make_tokenizer(special, eos="<end_of_utterance>", template=IDEFICS3_TEMPLATE)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1)
    processor.chat_template = IDEFICS3_TEMPLATE
    padding: Any = {"pad_token_id": tokenizer.pad_token_id}
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT_CONFIG},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **padding,
    )
    return from_parts(_seeded(Idefics3ForConditionalGeneration, config), processor)


def _qwen_parts(patch_size: int) -> tuple[ImageOnlyProcessor, dict[str, Any]]:
    """Return a processor that makes 4 x 4 patches, 2 x 2 tokens, of a picture, and token ids."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>", template=QWEN_TEMPLATE)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    # Qwen tables have more rows than the tokenizer has tokens, and read-outs fit in there.
    ids["vocab_size"] = len(tokenizer) + 24
    side = (4 * patch_size) ** 2
    pictures = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": side, "longest_edge": 2 * side}
    )
    return ImageOnlyProcessor(pictures, tokenizer), ids


def make_qwen3_vl() -> Backbone:
    """Qwen3-VL with interleaved 3-D positions and DeepStack after both layers."""
    processor, ids = _qwen_parts(16)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": ids.pop("vocab_size"),
            "head_dim": 8,
            "rope_parameters": {**rope, "rope_theta": 10000.0},
        },
        vision_config={
            **QWEN_VISION,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    return from_parts(_seeded(Qwen3VLForConditionalGeneration, config), processor)


def make_qwen2_5_vl() -> Backbone:
    """Qwen2.5-VL, whose vision tower has gate, up and down maps of the decoder's names."""
    processor, ids = _qwen_parts(14)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "vocab_size": ids.pop("vocab_size"), "rope_parameters": rope},
        vision_config={
            **QWEN_VISION,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    return from_parts(_seeded(Qwen2_5_VLForConditionalGeneration, config), processor)


def make_llama() -> Backbone:
    """A text-only LM with untied embeddings and a tokenizer without a chat template."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = LlamaConfig(**{**TEXT_CONFIG, "tie_word_embeddings": False}, vocab_size=len(tokenizer))
    return from_parts(_seeded(LlamaForCausalLM, config), tokenizer)


def make_gemma3_text() -> Backbone:
    """Gemma 3's language model: every second layer sees eight columns back."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = Gemma3TextConfig(
        **TEXT_CONFIG,
        **_own_ids(tokenizer),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return from_parts(_seeded(Gemma3ForCausalLM, config), tokenizer)


def make_qwen3_5_text() -> Backbone:
    """Qwen3.5's language model: every second layer is linear attention."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = Qwen3_5TextConfig(
        **TEXT_CONFIG,
        **_own_ids(tokenizer),
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    )
    return from_parts(_seeded(Qwen3_5ForCausalLM, config), tokenizer)


def _own_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 24,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _seeded(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "idefics3": make_idefics3,
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llama": make_llama,
}
# Text models whose layers count columns; their prompts are those of "llama".
COUNTING_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "gemma3_text": make_gemma3_text,
    "qwen3_5_text": make_qwen3_5_text,
}


def awaken(model: DualLoraModel, seed: int = 0) -> None:
    """Give LoRA's B matrices, which start at zero, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
