"""Pictures -> features, once per picture; all passes that need them share the tower's output.

Knows no adapters: they sit in the language model, so features never depend on them.
"""

import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import transformers
from PIL import Image

from twn_rl.modeling.backbone import Backbone
from twn_rl.runtime.zero import is_sharded

logger = logging.getLogger(__name__)
FEATURES_KEY = "mm_encoder_outputs"  # transformers' own argument for features made beforehand
_COUNTS_KEY = "batch_num_images"
_PIXEL_KEYS = ("pixel_values", "pixel_attention_mask")


def encode_images(backbone: Backbone, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return the batch with its pixels replaced by the tower's features, without gradient.

    Batches without pictures and backbones that cannot take features come back unchanged. Under
    ZeRO-3 a batch without pictures encodes a blank one, whose features are thrown away: every
    process must gather the tower's weights at the same place.

    Raises:
        NotImplementedError: Under ZeRO-3, for backbones that cannot take features.
    """
    model = backbone.inner_model
    if FEATURES_KEY in batch:
        return dict(batch)
    takes_features = FEATURES_KEY in inspect.signature(model.forward).parameters
    has_pictures = batch.get("pixel_values") is not None
    in_step = backbone.is_multimodal and _is_sharded_model(backbone)
    if in_step and not takes_features:
        raise NotImplementedError(
            f"{type(model).__name__}.forward takes no {FEATURES_KEY}; expected it under ZeRO-3, "
            "where processes with and without pictures must stay in step; use ZeRO-2"
        )
    if in_step and not has_pictures:
        _encode(backbone, _blank_picture(backbone))
        return {**batch, FEATURES_KEY: None}
    if not has_pictures:
        return dict(batch)
    if not takes_features:
        _tell_pictures_are_not_shared(type(model).__name__)
        return dict(batch)
    rest = {key: value for key, value in batch.items() if key not in _PIXEL_KEYS}
    return {**rest, FEATURES_KEY: {"image": _encode(backbone, batch)}}


@lru_cache
def _tell_pictures_are_not_shared(model: str) -> None:
    """Warn once of each model."""
    logger.warning(
        "%s of transformers %s takes no %s: pictures go through the vision tower again in every "
        "pass; from 5.18 on most families take it",
        *(model, transformers.__version__, FEATURES_KEY),
    )


def _encode(backbone: Backbone, batch: Mapping[str, Any]) -> Any:
    encoder: Any = backbone.inner_model.get_image_features
    known = inspect.signature(encoder).parameters
    with torch.no_grad():
        return encoder(**{key: batch[key] for key in batch if key in known})


def _is_sharded_model(backbone: Backbone) -> bool:
    return is_sharded(next(backbone.model.parameters()))


def _blank_picture(backbone: Backbone) -> dict[str, Any]:
    """Return the processor's tensors of a prompt with one small blank picture."""
    if backbone.blank_picture is None:
        content = [{"type": "image"}, {"type": "text", "text": ""}]
        text = backbone.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        picture = Image.new("RGB", (32, 32))
        backbone.blank_picture = dict(
            backbone.processor(text=[text], images=[[picture]], return_tensors="pt")
        )
    device = next(backbone.model.parameters()).device
    return {
        key: value.to(device) if isinstance(value, torch.Tensor) else value
        for key, value in backbone.blank_picture.items()
    }


@contextmanager
def encoding_first(backbone: Backbone) -> Iterator[None]:
    """Encode pictures before the first layer of every forward in the body, also none of them.

    For forwards that others write, such as TRL's: under ZeRO-3 processes with and without pictures
    then stay in step. Without ZeRO-3, and for backbones without pictures, nothing changes.
    """
    if not (backbone.is_multimodal and _is_sharded_model(backbone)):
        yield
        return

    def encode(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, encode_images(backbone, kwargs)

    handle = backbone.inner_model.register_forward_pre_hook(encode, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def counting_images(backbone: Backbone, num_images: Sequence[int] | None) -> Iterator[None]:
    """Mend what TRL's forwards in the body say of pictures; they go through prompts in order.

    LLaVA-OneVision cuts a prompt's only picture into patches, and leaves several whole: it is told
    which is the case. Prompts without pictures beside others come with empty tensors of pixels,
    which not every model takes: they come with none.

    Args:
        backbone: The model.
        num_images: Pictures of each prompt; None leaves everything as it is.
    """
    if num_images is None:
        yield
        return
    takes_counts = _COUNTS_KEY in inspect.signature(backbone.inner_model.forward).parameters
    remaining = list(num_images)

    def mend(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        filled = {key: value for key, value in kwargs.items() if not _is_empty(value)}
        rows = len(kwargs["input_ids"])
        own, remaining[:] = remaining[:rows], remaining[rows:]
        if takes_counts and any(own):
            filled[_COUNTS_KEY] = [count for count in own if count]
        return args, filled

    handle = backbone.inner_model.register_forward_pre_hook(mend, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


def _is_empty(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and not value.numel()


def share_images(
    backbone: Backbone, batches: Mapping[Any, Mapping[str, Any]]
) -> dict[Any, dict[str, Any]]:
    """Return the batches with features; those with the very same prompts share one encoding."""
    encoded: dict[int, dict[str, Any]] = {}
    shared: dict[Any, dict[str, Any]] = {}
    for name, batch in batches.items():
        prompts = id(batch["input_ids"])
        if prompts not in encoded:
            encoded[prompts] = encode_images(backbone, batch)
        first = encoded[prompts]
        features = {key: first[key] for key in (FEATURES_KEY,) if key in first}
        dropped = _PIXEL_KEYS if features else ()
        rest = {key: value for key, value in batch.items() if key not in dropped}
        shared[name] = {**rest, **features}
    return shared
