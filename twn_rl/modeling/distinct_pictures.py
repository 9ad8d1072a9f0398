"""Pictures that several rows of a batch share go through the vision tower once.

For forwards that others write, such as TRL's, in which every rollout of a group brings the group's
pictures with it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from twn_rl.modeling.backbone import Backbone


@contextmanager
def encoding_distinct(backbone: Backbone) -> Iterator[None]:
    """Encode each distinct picture of a forward in the body once.

    Where pixels are packed picture by picture (Qwen-VL), or row by row (Idefics3, SmolVLM), rows
    with the very same ones share their features. Other backbones encode all of them.
    """
    inner: Any = backbone.inner_model
    encode = getattr(inner, "get_image_features", None)
    if encode is None:
        yield
        return
    signature = inspect.signature(encode)

    @wraps(encode)
    def once(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        given = dict(bound.arguments)
        others = given.pop("kwargs", {})
        parts, keys = _parts(given)
        first, place = _distinct(parts, keys)
        if len(first) == len(parts):
            return encode(*args, **kwargs)
        output = encode(**_chosen(given, parts, first), **others)
        features, layers = output.pooler_output, output.get("deepstack_features") or []
        counts = [_num_pictures(parts[unit]) for unit in first]
        features, join = _apart(features, counts)
        tokens = [len(found) for found in features]
        layers = [_apart(layer, tokens) for layer in layers]
        if any(len(found) != len(first) for found in (features, *(layer for layer, _ in layers))):
            return encode(*args, **kwargs)  # features that are not apart by picture
        output.pooler_output = join([features[unit] for unit in place])
        if layers:
            chosen = [join([layer[unit] for unit in place]) for layer, join in layers]
            output["deepstack_features"] = chosen
        return output

    inner.get_image_features = once
    try:
        yield
    finally:
        del inner.get_image_features


def _apart(features: Any, counts: list[int]) -> tuple[Any, Callable[[list[Tensor]], Any]]:
    """Return features by part and what joins them again, as transformers of different age do.

    From 5.18 on they are in a list by part. Before, Idefics3's are a tensor with a row for each
    picture, and Qwen3-VL's deeper layers one with a row for each token.
    """
    if isinstance(features, Tensor) and len(features) == sum(counts):
        return features.split(counts), torch.cat
    return features, list


def _num_pictures(part: Tensor) -> int:
    """Return how many pictures a part has: a packed one, or a row's that are no padding."""
    return int(part.flatten(1).any(1).sum()) if part.ndim == 4 else 1


def _parts(given: dict[str, Any]) -> tuple[Sequence[Tensor], list[Any]]:
    """Return pixels that belong together, each with what else makes it what it is; or nothing."""
    pixels, grid = given["pixel_values"], given.get("image_grid_thw")
    if grid is not None and pixels.ndim == 2:
        return pixels.split(grid.prod(-1).tolist()), [tuple(row) for row in grid.tolist()]
    mask = given.get("pixel_attention_mask")
    if pixels.ndim == 5 and mask is not None:
        return pixels.unbind(), mask.flatten(1).sum(1).tolist()
    return [], []


def _distinct(parts: Sequence[Tensor], keys: Sequence[Any]) -> tuple[list[int], list[int]]:
    """Return the positions of the first of equal parts, and for each part which of them it is."""
    sums = torch.stack([part.sum(dtype=torch.float64) for part in parts]).tolist() if parts else []
    known: dict[Any, list[int]] = {}
    first: list[int] = []
    place = []
    for position, (part, key) in enumerate(zip(parts, keys, strict=True)):
        alike = known.setdefault((key, sums[position]), [])
        same = next((unit for unit in alike if torch.equal(parts[first[unit]], part)), None)
        if same is None:
            same = len(first)
            alike.append(same)
            first.append(position)
        place.append(same)
    return first, place


def _chosen(given: dict[str, Any], parts: Sequence[Tensor], rows: list[int]) -> dict[str, Any]:
    """Return the encoder's arguments for some of the parts."""
    if "image_grid_thw" in given:
        packed = torch.cat([parts[row] for row in rows])
        return {**given, "pixel_values": packed, "image_grid_thw": given["image_grid_thw"][rows]}
    own = ("pixel_values", "pixel_attention_mask")
    return {**given, **{name: given[name][rows] for name in own}}
