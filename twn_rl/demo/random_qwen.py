"""Qwen3-VL at its published shapes with random weights: no download, for benchmarks and tests.

What it computes means nothing; what that costs is what the real model costs. Knows no adapters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageTextToText,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen3VLConfig,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from twn_rl.modeling.backbone import Backbone, from_parts

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}{% if add_generation_prompt %}<|im_start|> assistant"
    "{% endif %}"
)
SPECIAL_TOKENS = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
SPECIAL_TOKENS += ("<|image_pad|>", "<|video_pad|>")
PATCH_SIZE = 16
# Rows of the embedding table that the published tokenizer has no tokens for; read-outs fit there.
SPARE_ROWS = 267


@dataclass(frozen=True)
class Shape:
    """Sizes of one model of the family.

    Attributes:
        text: Of the language model, as in the published `config.json`.
        vision: Of the vision tower.
        mrope_section: Channels of time, height and width; their sum is half of a head.
        is_tied: Whether input and output embeddings are one table.
        parameters: What the publisher's weights count; None of a shape nobody published.
    """

    text: Mapping[str, Any]
    vision: Mapping[str, Any]
    mrope_section: tuple[int, int, int] = (24, 20, 20)
    is_tied: bool = True
    parameters: int | None = None


def _text(width: int, inner: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 262144,
    }


def _vision(width: int, inner: int, depth: int, deepstack: list[int]) -> dict[str, Any]:
    return {
        "hidden_size": width,
        "intermediate_size": inner,
        "depth": depth,
        "num_heads": 16,
        "num_position_embeddings": 2304,
        "deepstack_visual_indexes": deepstack,
    }


SHAPES = {
    "2b": Shape(
        _text(2048, 6144, 28, 16), _vision(1024, 4096, 24, [5, 11, 17]), parameters=2_127_532_032
    ),
    "4b": Shape(
        _text(2560, 9728, 36, 32), _vision(1024, 4096, 24, [5, 11, 17]), parameters=4_437_815_808
    ),
    "8b": Shape(
        _text(4096, 12288, 36, 32),
        _vision(1152, 4304, 27, [8, 16, 24]),
        is_tied=False,
        parameters=8_767_123_696,
    ),
    # What a few CPU cores train in minutes.
    "middle": Shape(
        _text(640, 1920, 8, 10) | {"num_key_value_heads": 5, "head_dim": 64, "vocab_size": 4096},
        _vision(320, 1280, 6, [1, 3, 5]) | {"num_heads": 5, "num_position_embeddings": 576},
        mrope_section=(12, 10, 10),
    ),
    # Two layers, for tests; heads as wide as vLLM's kernels for CPUs want them.
    "tiny": Shape(
        _text(32, 48, 2, 2) | {"num_key_value_heads": 1, "head_dim": 32, "vocab_size": 512},
        _vision(64, 24, 2, [0, 1]) | {"num_heads": 2, "num_position_embeddings": 16},
        mrope_section=(8, 4, 4),
    ),
}


def make_config(shape: Shape, token_ids: Mapping[str, int] | None = None) -> Qwen3VLConfig:
    """Return the configuration of a shape, with the token ids of a tokenizer."""
    rope = {"rope_type": "default", "rope_theta": 5_000_000.0, "mrope_interleaved": True}
    ids: Any = token_ids or {}
    return Qwen3VLConfig(
        text_config={
            **shape.text,
            "tie_word_embeddings": shape.is_tied,
            "rope_parameters": {**rope, "mrope_section": list(shape.mrope_section)},
        },
        vision_config={
            **shape.vision,
            "out_hidden_size": shape.text["hidden_size"],
            "patch_size": PATCH_SIZE,
        },
        tie_word_embeddings=shape.is_tied,
        **ids,
    )


class ImageOnlyProcessor(ProcessorMixin):
    """What Qwen-VL's processor does with pictures; the real one needs torchvision for its videos.

    Attributes:
        image_processor: Of PIL pictures, or any of Qwen-VL's.
        tokenizer: Has the family's special tokens.
    """

    def __init__(self, image_processor: Any, tokenizer: Any, chat_template: Any = None) -> None:
        """Keep both; the template is the tokenizer's if None is given."""
        template = chat_template or tokenizer.chat_template
        super().__init__(image_processor, tokenizer, chat_template=template)
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, text: Any = None, images: Any = None, videos: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Expand each picture's placeholder to its number of tokens and tokenize.

        Args:
            text: One text or a list.
            images: A list of pictures for each text, or None.
            videos: None; there is nothing to read them with.
            **kwargs: For the tokenizer.

        Raises:
            ValueError: If there are videos.
        """
        if videos:
            raise ValueError(
                "videos are given; expected pictures only; install torchvision (extra vision) and "
                "take the family's own processor"
            )
        texts, vision = [text] if isinstance(text, str) else list(text), {}
        if images:
            flat = [image for row in images for image in row]
            vision = dict(self.image_processor(images=flat, return_tensors="pt"))
            merged = self.image_processor.merge_size**2
            counts = iter((vision["image_grid_thw"].prod(-1) // merged).tolist())
            texts = [_expand(row, counts) for row in texts]
        kwargs.pop("audio", None)
        batch = dict(self.tokenizer(texts, return_token_type_ids=False, **kwargs))
        image_id, ids = self.tokenizer.convert_tokens_to_ids("<|image_pad|>"), batch["input_ids"]
        if isinstance(ids, torch.Tensor):
            batch["mm_token_type_ids"] = (ids == image_id).long()
        else:
            batch["mm_token_type_ids"] = [[int(i == image_id) for i in row] for row in ids]
        return {**batch, **vision}


def _expand(text: str, counts: Any) -> str:
    first, *others = text.split("<|image_pad|>")
    return first + "".join("<|image_pad|>" * next(counts) + part for part in others)


def make_tokenizer(num_rows: int) -> Any:
    """Return a tokenizer of the words `w0`, `w1`, ... that leaves `SPARE_ROWS` of a table free.

    As in Qwen3, `<think>` and `</think>` are tokens but not special ones.
    """
    marks = ["<pad>", *SPECIAL_TOKENS, "<think>", "</think>"]
    spare = min(SPARE_ROWS, num_rows // 4)
    words = [f"w{number}" for number in range(num_rows - spare - len(marks))]
    vocabulary = {token: index for index, token in enumerate([*words, *marks])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="w0", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_processor(tokenizer: Any, smallest_pixels: int) -> ProcessorMixin:
    """Return the family's own processor where torchvision is, else one for pictures only.

    Args:
        tokenizer: From `make_tokenizer`.
        smallest_pixels: Smaller pictures are scaled up to so many.
    """
    size = {"shortest_edge": smallest_pixels, "longest_edge": 16_777_216}
    settings: dict[str, Any] = {"patch_size": PATCH_SIZE, "size": size}
    if not is_torchvision_available():
        return ImageOnlyProcessor(Qwen2VLImageProcessorPil(**settings), tokenizer)
    return transformers.Qwen3VLProcessor(
        image_processor=transformers.Qwen2VLImageProcessor(**settings),
        tokenizer=tokenizer,
        video_processor=transformers.Qwen3VLVideoProcessor(**settings),
        chat_template=CHAT_TEMPLATE,
    )


def random_backbone(
    shape: str | Shape,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    attn_implementation: str = "sdpa",
    smallest_pixels: int = 65536,
) -> Backbone:
    """Return a backbone with random weights, made on its device.

    Args:
        shape: Its sizes, or a name in `SHAPES`.
        device: Where the weights are drawn; a GPU does it in seconds.
        dtype: Of the weights.
        attn_implementation: Attention kernel.
        smallest_pixels: Smaller pictures are scaled up to so many; the default is Qwen's.
    """
    if isinstance(shape, str):
        shape = SHAPES[shape]
    tokenizer = make_tokenizer(shape.text["vocab_size"])
    names = {"image": "<|image_pad|>", "video": "<|video_pad|>"}
    names |= {"vision_start": "<|vision_start|>", "vision_end": "<|vision_end|>"}
    ids = {f"{key}_token_id": tokenizer.convert_tokens_to_ids(t) for key, t in names.items()}
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForImageTextToText.from_config(
            make_config(shape, ids), dtype=dtype, attn_implementation=attn_implementation
        )
    return from_parts(model.eval(), make_processor(tokenizer, smallest_pixels))
