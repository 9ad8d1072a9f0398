"""Prompts whose pictures are encoded: rows can be taken out, joined, and read by any adapter.

Knows token tensors only: no items, no text, no caches.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.readout import TOKEN_ALIGNED_KEYS, position_ids
from twn_rl.modeling.vision import FEATURES_KEY, encode_images

_COMPLETION_KEYS = ("completion_ids", "completion_mask")


@dataclass(frozen=True)
class Prompts:
    """N left-padded prompts whose pictures have been encoded; any adapter can read them.

    Attributes:
        inputs: `input_ids`, `attention_mask` and token-aligned tensors, all (N, P).
        position_ids: (N, P), or (3, N, P) for 3-D positions.
        vision: What else the model's forward needs for the pictures: features or pixels.
        image_tokens: Per row how many tokens the pictures fill; None if rows cannot be told apart
            in `vision`, so that `select` would have to encode again.
    """

    inputs: dict[str, Tensor]
    position_ids: Tensor
    vision: dict[str, Any]
    image_tokens: list[int] | None

    def __len__(self) -> int:
        """Return the number N of prompts."""
        return len(self.inputs["input_ids"])

    def lengths(self) -> list[int]:
        """Return the tokens of each prompt, padding not counted."""
        return self.inputs["attention_mask"].sum(1).tolist()

    @property
    def is_mergeable(self) -> bool:
        """Whether single rows can be taken out and joined with those of other batches."""
        return self.image_tokens is not None and set(self.vision) <= {FEATURES_KEY}

    def num_bytes(self) -> int:
        """Return the memory of tokens, positions and picture features."""
        images = self.vision.get(FEATURES_KEY, {}).get("image", {})
        features = images.get("pooler_output", ()), images.get("deepstack_features") or ()
        parts = [features[0]] if isinstance(features[0], Tensor) else list(features[0])
        for layer in features[1]:
            parts += [layer] if isinstance(layer, Tensor) else list(layer)
        return sum(t.nbytes for t in (*parts, self.position_ids, *self.inputs.values()))

    def without_last(self) -> tuple[Prompts, Tensor]:
        """Return the prompts but for their last tokens, and these (N,), which are no picture's.

        Raises:
            ValueError: If prompts are a single token long: nothing would be left.
        """
        ids = self.inputs["input_ids"]
        if ids.shape[1] < 2:
            raise ValueError(
                "prompts of one token cannot be shared without their last one; expected a chat "
                "template that opens the answer; take interface = 'reencode'"
            )
        inputs = {key: value[:, :-1] for key, value in self.inputs.items()}
        return replace(self, inputs=inputs, position_ids=self.position_ids[..., :-1]), ids[:, -1]

    def first_equal(self) -> list[int]:
        """Return for each row the first one with the same tokens and picture features."""
        if self.image_tokens is None:
            return list(range(len(self)))
        images = self.vision.get(FEATURES_KEY, {}).get("image", {})
        features = None
        if "pooler_output" in images:
            features = _by_token(images["pooler_output"]).split(self.image_tokens)
        seen: dict[tuple[int, ...], list[int]] = {}
        found: list[int] = []
        for row, ids in enumerate(self.inputs["input_ids"].tolist()):
            # Of rows with the same words that are different so far.
            others = seen.setdefault(tuple(ids), [])
            same = (n for n in others if features is None or features[n].equal(features[row]))
            found.append(next(same, row))
            if found[-1] == row:
                others.append(row)
        return found

    def select(self, rows: Sequence[int]) -> Prompts:
        """Return some of the prompts, in the order of `rows`, which may repeat."""
        if self.image_tokens is None:
            raise ValueError(
                "pictures of single prompts cannot be told apart for this backbone; expected "
                "features per image token; read all prompts and select from the prefix"
            )
        counts = self.image_tokens
        index = torch.tensor(rows, device=self.position_ids.device)
        vision = dict(self.vision)
        if FEATURES_KEY in vision:
            images = vision.pop(FEATURES_KEY)["image"]
            if any(counts[row] for row in rows):
                vision[FEATURES_KEY] = {"image": _select_features(images, counts, rows)}
        return Prompts(
            inputs={key: value[index] for key, value in self.inputs.items()},
            position_ids=self.position_ids.index_select(-2, index),
            vision=vision,
            image_tokens=[counts[row] for row in rows],
        )


def prepare_prompts(backbone: Backbone, batch: Mapping[str, Any]) -> Prompts:
    """Return the prompts of a batch; pictures go through the tower here and never again."""
    batch = {key: value for key, value in batch.items() if key not in _COMPLETION_KEYS}
    positions = position_ids(backbone, batch)
    encoded = encode_images(backbone, batch)
    if encoded.get(FEATURES_KEY, batch) is None:  # encoded, and there were no pictures
        del encoded[FEATURES_KEY]
    kept = ("input_ids", "attention_mask", *TOKEN_ALIGNED_KEYS)
    inputs = {key: encoded.pop(key) for key in kept if key in encoded}
    counts: list[int] | None = [0] * len(inputs["input_ids"])
    if FEATURES_KEY in encoded:
        # Features are all a forward needs besides positions; grids only told how to lay them out.
        encoded = {FEATURES_KEY: encoded[FEATURES_KEY]}
        image = inputs["input_ids"] == backbone.model.config.image_token_id
        per_row: list[int] = image.sum(1).tolist()
        is_known = _has_row_features(encoded[FEATURES_KEY]["image"], sum(per_row))
        counts = per_row if is_known else None
    elif encoded.get("pixel_values") is not None:
        counts = None
    return Prompts(inputs, positions, encoded, counts)


def _has_row_features(output: Any, tokens: int) -> bool:
    features = getattr(output, "pooler_output", None)
    return features is not None and len(_by_token(features)) == tokens


def _by_token(features: Tensor | Sequence[Tensor]) -> Tensor:
    """Return (image tokens, D): row-major over images, as the model scatters them."""
    parts = [features] if isinstance(features, Tensor) else features
    return torch.cat([part.flatten(0, -2) for part in parts])


def merge_prompts(parts: Sequence[Prompts]) -> Prompts:
    """Return one batch of all prompts, left-padded to the longest; each must be mergeable."""
    if len(parts) == 1:
        return parts[0]
    if not all(part.is_mergeable for part in parts):
        raise ValueError(
            "pictures of single prompts cannot be told apart for this backbone; expected features "
            "per image token; read each batch by itself"
        )
    length = max(part.inputs["input_ids"].shape[1] for part in parts)
    keys = dict.fromkeys(key for part in parts for key in part.inputs)
    inputs = {key: torch.cat([_padded(part, key, length) for part in parts]) for key in keys}
    positions = [pad_left(part.position_ids, length, part.position_ids.ndim - 1) for part in parts]
    with_images = [part.vision[FEATURES_KEY]["image"] for part in parts if part.vision]
    vision = {FEATURES_KEY: {"image": _join_features(with_images)}} if with_images else {}
    counts = [count for part in parts for count in part.image_tokens or ()]
    return Prompts(inputs, torch.cat(positions, -2), vision, counts)


def _padded(part: Prompts, key: str, length: int) -> Tensor:
    # Some processors leave token types out of a batch without pictures; text is type 0.
    values = part.inputs.get(key)
    values = torch.zeros_like(part.inputs["input_ids"]) if values is None else values
    return pad_left(values, length, 1)


def _join_features(outputs: Sequence[ModelOutput]) -> Any:
    """Return the features of all batches, image tokens in the order of the rows."""

    def join(parts: Sequence[Tensor | Sequence[Tensor]]) -> Any:
        joined = torch.cat([_by_token(part) for part in parts])
        return joined if isinstance(parts[0], Tensor) else (joined,)

    first = outputs[0]
    fields: dict[str, Any] = {"pooler_output": join([o["pooler_output"] for o in outputs])}
    if first.get("deepstack_features") is not None:
        layers = zip(*(output["deepstack_features"] for output in outputs), strict=True)
        fields["deepstack_features"] = [join(layer) for layer in layers]
    return type(first)(**fields)


def _select_features(output: ModelOutput, counts: list[int], rows: Sequence[int]) -> Any:
    def pick(features: Tensor | Sequence[Tensor]) -> Any:
        by_row = _by_token(features).split(counts)
        picked = torch.cat([by_row[row] for row in rows])
        return picked if isinstance(features, Tensor) else (picked,)

    fields: dict[str, Any] = {"pooler_output": pick(output["pooler_output"])}
    if output.get("deepstack_features") is not None:
        fields["deepstack_features"] = [pick(layer) for layer in output["deepstack_features"]]
    return type(output)(**fields)


def pad_left(tensor: Tensor, length: int, dim: int) -> Tensor:
    """Return the tensor with zeros in front along `dim`, so that it is `length` long there."""
    missing = length - tensor.shape[dim]
    if not missing:
        return tensor
    padding = [0, 0] * (tensor.ndim - 1 - dim) + [missing, 0]
    return torch.nn.functional.pad(tensor, padding)
