"""Pictures -> features, once per picture; all passes that need them share the tower's output.

Knows no adapters: they sit in the language model, so features never depend on them.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from twn_rl.backbone import Backbone

FEATURES_KEY = "mm_encoder_outputs"  # transformers' own argument for features made beforehand
_PIXEL_KEYS = ("pixel_values", "pixel_attention_mask")


def encode_images(backbone: Backbone, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with its pixels replaced by the tower's features, without gradient.

    Batches without pictures and backbones that cannot take features come back unchanged.
    """
    model = backbone.inner_model
    takes_features = FEATURES_KEY in inspect.signature(model.forward).parameters
    if batch.get("pixel_values") is None or not takes_features:
        return dict(batch)
    encoder: Any = model.get_image_features
    known = inspect.signature(encoder).parameters
    with torch.no_grad():
        features = encoder(**{key: batch[key] for key in batch if key in known})
    rest = {key: value for key, value in batch.items() if key not in _PIXEL_KEYS}
    return {**rest, FEATURES_KEY: {"image": features}}


def share_images(
    backbone: Backbone, batches: Mapping[Any, Mapping[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """Return the batches with features; those with the very same pixels share one encoding."""
    encoded: dict[int, dict[str, Any]] = {}
    shared: dict[Any, dict[str, Any]] = {}
    for name, batch in batches.items():
        pixels = batch.get("pixel_values")
        if pixels is None:
            shared[name] = dict(batch)
            continue
        if id(pixels) not in encoded:
            encoded[id(pixels)] = encode_images(backbone, batch)
        first = encoded[id(pixels)]
        features = {key: first[key] for key in (FEATURES_KEY,) if key in first}
        dropped = _PIXEL_KEYS if features else ()
        rest = {key: value for key, value in batch.items() if key not in dropped}
        shared[name] = {**rest, **features}
    return shared
