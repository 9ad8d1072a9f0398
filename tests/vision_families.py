"""Tiny random models of eight VLM families with their real processors. Needs the extra `vision`.

Weights are random and sizes tiny; classes, processors, chat layouts and special tokens are those a
user of the family gets. Knows no expected values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from made_records import picture
from tiny_backbones import (
    IDEFICS3_TEMPLATE,
    QWEN_TEMPLATE,
    TEXT_CONFIG,
    _seeded,
    awaken,
    make_tokenizer,
)
from tokenizers import processors

from twn_rl.data.record import Item
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

QWEN_TOKENS = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
QWEN_TOKENS += ["<|image_pad|>", "<|video_pad|>"]
QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
}
SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
    "vision_use_head": False,
}
MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
# Gemma's template writes BOS, and its tokenizer writes it, too.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn> {{ m['role'] }} "
    "{% if m['content'] is string %}{{ m['content'] }}{% else %}{% for p in m['content'] %}"
    "{% if p['type'] == 'image' %}<start_of_image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<end_of_turn>{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn> model{% endif %}"
)


def _pixels(side: int) -> dict[str, int]:
    """Return Qwen's limits of a picture: from 4 x 4 patches to twice as many."""
    return {"shortest_edge": (4 * side) ** 2, "longest_edge": 2 * (4 * side) ** 2}


def _qwen(
    config_class: Any, model_class: Any, processor_class: Any, patch_size: int, **parts: Any
) -> Backbone:
    tokenizer = make_tokenizer(QWEN_TOKENS, eos="<|im_end|>", template=QWEN_TEMPLATE)
    pictures = transformers.Qwen2VLImageProcessor(patch_size=patch_size, size=_pixels(patch_size))
    videos = {
        "Qwen3VLProcessor": transformers.Qwen3VLVideoProcessor,
    }.get(processor_class.__name__, transformers.Qwen2VLVideoProcessor)
    processor = processor_class(
        image_processor=pictures,
        tokenizer=tokenizer,
        video_processor=videos(patch_size=patch_size),
        chat_template=QWEN_TEMPLATE,
    )
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(t) for key, t in names.items()}
    text = {**TEXT_CONFIG, "vocab_size": len(tokenizer) + 24}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    config = config_class(
        text_config={**text, **parts.pop("text")},
        vision_config={"patch_size": patch_size, **parts.pop("vision")},
        tie_word_embeddings=True,
        **ids,
        **parts,
    )
    return from_parts(_seeded(model_class, config), processor)


def make_qwen3_vl() -> Backbone:
    """Qwen3-VL: interleaved 3-D positions, features of the tower added to the first layers."""
    return _qwen(
        transformers.Qwen3VLConfig,
        transformers.Qwen3VLForConditionalGeneration,
        transformers.Qwen3VLProcessor,
        16,
        text={"head_dim": 8, "rope_parameters": {**MROPE, "mrope_interleaved": True}},
        vision={
            **QWEN_VISION,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    )


def make_qwen2_5_vl() -> Backbone:
    """Qwen2.5-VL: windows of attention in the tower."""
    return _qwen(
        transformers.Qwen2_5_VLConfig,
        transformers.Qwen2_5_VLForConditionalGeneration,
        transformers.Qwen2_5_VLProcessor,
        14,
        text={"rope_parameters": MROPE},
        vision={**QWEN_VISION, "window_size": 56, "fullatt_block_indexes": [1]},
    )


def make_qwen2_vl() -> Backbone:
    """Qwen2-VL."""
    return _qwen(
        transformers.Qwen2VLConfig,
        transformers.Qwen2VLForConditionalGeneration,
        transformers.Qwen2VLProcessor,
        14,
        text={"rope_parameters": MROPE},
        vision={"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
    )


def make_qwen3_5() -> Backbone:
    """Qwen3.5's VLM: layers of linear attention, whose state is no cache of keys."""
    rope = {**MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0}
    return _qwen(
        transformers.Qwen3_5Config,
        transformers.Qwen3_5ForConditionalGeneration,
        transformers.Qwen3VLProcessor,
        16,
        text={
            "head_dim": 8,
            "rope_parameters": rope,
            "layer_types": ["linear_attention", "full_attention"],
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        },
        vision={**QWEN_VISION, "num_position_embeddings": 16},
    )


def make_smolvlm() -> Backbone:
    """SmolVLM: pictures in tiles, padded to one row a prompt."""
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    special = ["<end_of_utterance>", "<|im_start|>", "<fake_token_around_image>", "<global-img>"]
    tokenizer = make_tokenizer(
        [*special, "<image>", *tiles], eos="<end_of_utterance>", template=IDEFICS3_TEMPLATE
    )
    sizes: dict[str, Any] = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    processor = transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes, do_image_splitting=True),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**sizes),
        image_seq_len=1,
        chat_template=IDEFICS3_TEMPLATE,
    )
    vision = {key: value for key, value in SIGLIP.items() if key != "model_type"}
    padding: Any = {"pad_token_id": tokenizer.pad_token_id}
    config = transformers.SmolVLMConfig(
        vision_config={**vision, "image_size": 16, "patch_size": 8},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT_CONFIG},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **padding,
    )
    return from_parts(_seeded(transformers.SmolVLMForConditionalGeneration, config), processor)


def make_gemma3() -> Backbone:
    """Gemma 3: sliding windows, picture tokens that see each other, BOS from the tokenizer."""
    names = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>"}
    names["image_token"] = "<image_soft_token>"
    special = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = make_tokenizer(special, eos="<end_of_turn>", template=GEMMA_TEMPLATE, named=names)
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    bos = ("<bos>", tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[bos]
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56}),
        tokenizer,
        chat_template=GEMMA_TEMPLATE,
        image_seq_length=4,
    )
    config = transformers.Gemma3Config(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": len(tokenizer) + 24,
            "head_dim": 8,
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "full_attention"],
            "query_pre_attn_scalar": 8,
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        vision_config={**SIGLIP, "image_size": 56},
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.convert_tokens_to_ids(names["boi_token"]),
        eoi_token_index=tokenizer.convert_tokens_to_ids(names["eoi_token"]),
        image_token_index=tokenizer.convert_tokens_to_ids(names["image_token"]),
    )
    return from_parts(_seeded(transformers.Gemma3ForConditionalGeneration, config), processor)


def make_internvl() -> Backbone:
    """InternVL: pictures cut into as many patches as fit their aspect."""
    names = {"start_image_token": "<img>", "end_image_token": "</img>"}
    names |= {"context_image_token": "<IMG_CONTEXT>", "video_token": "<video>"}
    template = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<IMG_CONTEXT>")
    special = ["<|im_start|>", "<|im_end|>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>", template=template, named=names)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(
            size={"height": 28, "width": 28}, crop_to_patches=True, min_patches=1, max_patches=4
        ),
        tokenizer,
        transformers.InternVLVideoProcessor(size={"height": 28, "width": 28}),
        image_seq_length=1,
        chat_template=template,
    )
    config = transformers.InternVLConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": [28, 28],
            "patch_size": [14, 14],
        },
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer) + 24, **TEXT_CONFIG},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=1,
    )
    return from_parts(_seeded(transformers.InternVLForConditionalGeneration, config), processor)


def make_llava_onevision() -> Backbone:
    """LLaVA-OneVision: one picture in patches, several pictures of a prompt without."""
    template = QWEN_TEMPLATE.replace("<|vision_start|><|image_pad|><|vision_end|>", "<image>")
    special = ["<|im_start|>", "<|im_end|>", "<image>", "<video>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>", template=template)
    pinpoints = [[28, 28], [28, 56], [56, 28], [56, 56]]
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(
            size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
        ),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(size={"height": 28, "width": 28}),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=template,
    )
    config = transformers.LlavaOnevisionConfig(
        vision_config=SIGLIP,
        text_config={"model_type": "qwen2", "vocab_size": len(tokenizer) + 24, **TEXT_CONFIG},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=pinpoints,
        tie_word_embeddings=True,
    )
    return from_parts(
        _seeded(transformers.LlavaOnevisionForConditionalGeneration, config), processor
    )


VISION_BACKBONES: Mapping[str, Callable[[], Backbone]] = {
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "qwen2_vl": make_qwen2_vl,
    "smolvlm": make_smolvlm,
    "gemma3": make_gemma3,
    "internvl": make_internvl,
    "llava_onevision": make_llava_onevision,
    "qwen3_5": make_qwen3_5,
}


def make_vlm(name: str, *, seed: int = 0, **settings: Any) -> DualLoraModel:
    """Return a model of a family with awakened adapters, so that they change every output."""
    settings = {
        "reasoning_lora": LoraSettings(r=2, alpha=4),
        "embedding_lora": LoraSettings(r=3, alpha=6),
        "num_readout_tokens": 3,
        "max_think_tokens": 8,
        **settings,
    }
    model = DualLoraModel.from_backbone(VISION_BACKBONES[name](), TwnConfig(**settings), seed=seed)
    awaken(model, seed)
    return model.eval()


def mixed_items() -> list[Item]:
    """Return text, one picture, several pictures of different shapes, video frames."""
    return [
        Item(instruction="find the picture of a camel"),
        Item(text="pizza"),
        Item(instruction="which object is it", images=(picture(1, 64, 64),)),
        Item(text="tree", images=(picture(2, 64, 64), picture(3, 128, 64))),
        Item(instruction="answer", video=(picture(4, 64, 64), picture(5, 64, 64))),
    ]
