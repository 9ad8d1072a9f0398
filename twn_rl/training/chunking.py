"""Prompts one by one -> chunks of about equal cost, for batches that do not fit in one forward.

Knows token tensors only: no losses, no trainers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.prompt_features import pad_left
from twn_rl.modeling.readout import TOKEN_ALIGNED_KEYS

# A picture token stands for 4 (Qwen-VL) to 16 (Idefics3) patches of the vision tower.
PATCHES_PER_TOKEN = 16
_PROMPT_KEYS = ("input_ids", "attention_mask", *TOKEN_ALIGNED_KEYS)


@dataclass
class Chunk:
    """Some rows of a batch that go through the model together.

    Neither a list nor a mapping, so that no data loader moves it: a batch of many chunks stays on
    the host and goes to the device chunk by chunk.

    Attributes:
        rows: (n,) positions in the batch.
        prompt: Prompts of these rows, as from `DualLoraModel.collate`.
        completions: Name -> `completion_ids`, `completion_mask` (n, C) of these rows, or what else
            belongs to them.
    """

    rows: Tensor
    prompt: dict[str, Any]
    completions: dict[str, dict[str, Tensor]]


@dataclass
class Chunks:
    """All chunks of a batch.

    Attributes:
        kinds: The chunks by kind; the kinds go through the model in this order.
        encoded: The kinds whose pictures are features already.
    """

    kinds: dict[str, list[Chunk]]
    encoded: set[str] = field(default_factory=set)


def pack(
    lengths: Sequence[int], chunk_tokens: int, patches: Sequence[int] | None = None
) -> list[list[int]]:
    """Return rows in chunks of at most `chunk_tokens` tokens, padding counted; at least one row.

    Rows of like length share a chunk, the longest first, so that little is padding.

    Args:
        lengths: Tokens of each row, picture tokens included.
        chunk_tokens: Most tokens of a chunk.
        patches: Patches of each row; a chunk has at most `PATCHES_PER_TOKEN * chunk_tokens`.

    >>> pack([3, 9, 4, 5], 10)
    [[1], [3, 2], [0]]
    """
    counts = [0] * len(lengths) if patches is None else patches
    chunks: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        if chunks:
            longest = lengths[chunks[-1][0]]
            fits = (len(chunks[-1]) + 1) * longest <= chunk_tokens
            pixels = sum(counts[other] for other in chunks[-1]) + counts[row]
            if fits and pixels <= PATCHES_PER_TOKEN * chunk_tokens:
                chunks[-1].append(row)
                continue
        chunks.append([row])
    return chunks


def num_patches(backbone: Backbone, batch: Mapping[str, Any]) -> int:
    """Return how many patches the vision tower sees in a batch from `collate`."""
    pixels = batch.get("pixel_values")
    if pixels is None:
        return 0
    if pixels.ndim == 2:  # Qwen-VL: one row a patch
        return len(pixels)
    side = getattr(backbone.model.config.vision_config, "patch_size", 1)
    return int(pixels.shape[:-3].numel() * (pixels.shape[-1] // side) * (pixels.shape[-2] // side))


def join_prompts(backbone: Backbone, batches: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the batch that `collate` would make of all rows at once.

    Args:
        backbone: Whose padding token fills short rows.
        batches: Batches from `collate`, of one row or more each.

    Raises:
        ValueError: For a processor's output that is no tensor.
    """
    length = max(batch["input_ids"].shape[1] for batch in batches)
    pad_id = backbone.tokenizer.pad_token_id
    joined: dict[str, Any] = {}
    for key in dict.fromkeys(key for batch in batches for key in batch):
        if key in _PROMPT_KEYS:
            fill = pad_id if key == "input_ids" else 0
            joined[key] = torch.cat([_aligned(batch, key, length, fill) for batch in batches])
            continue
        values = [batch.get(key) for batch in batches]
        if not all(value is None or isinstance(value, Tensor) for value in values):
            raise ValueError(
                f"{key} of the processor is {type(values[0]).__name__}; expected tensors; batches "
                "of this processor cannot be cut into chunks, leave contrastive_chunk_tokens out"
            )
        joined[key] = _join_pictures(key, values, [len(batch["input_ids"]) for batch in batches])
    return joined


def _aligned(batch: Mapping[str, Any], key: str, length: int, fill: int) -> Tensor:
    values = batch.get(key)
    # Some processors leave token types out of a batch without pictures; text is type 0.
    values = torch.zeros_like(batch["input_ids"]) if values is None else values
    if not fill:
        return pad_left(values, length, 1)
    return F.pad(values, (length - values.shape[1], 0), value=fill)


def _join_pictures(key: str, values: Sequence[Tensor | None], counts: Sequence[int]) -> Tensor:
    """Join along pictures or patches, or along prompts where each has its pictures in a row."""
    present = [value for value in values if value is not None]
    ndim = {"pixel_values": 5, "pixel_attention_mask": 4}.get(key)
    if present[0].ndim != ndim:
        return torch.cat(present)
    shape = [max(value.shape[dim] for value in present) for dim in range(1, present[0].ndim)]
    rows = []
    for value, count in zip(values, counts, strict=True):
        own = present[0].new_zeros(count, *shape) if value is None else value
        missing = [size - have for size, have in zip(shape, own.shape[1:], strict=True)]
        rows.append(F.pad(own, [part for size in reversed(missing) for part in (0, size)]))
    return torch.cat(rows)
