"""Forwards that others write, such as TRL's, with an adapter that acts late.

What `prefix_reading` does for our own forwards in "shared_prefill", this does inside any forward of
the backbone: its layers run twice, bare over the prompts and with the adapter over the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache

from twn_rl.modeling.adapters import without_adapters
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.readout import TOKEN_ALIGNED_KEYS, position_ids, without_checkpointing


@contextmanager
def acting_late(backbone: Backbone, peft_model: PeftModel, num_tokens: int) -> Iterator[None]:
    """Let adapters act on the last tokens only, in forwards of whole sequences in the body.

    The others are read by the bare backbone, without gradient; their last states come back as
    zeros, since nothing may be read out there. Forwards that go on from a filled cache stay as they
    are: all of their tokens are adapted.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        num_tokens: How many of the last columns are adapted: the completion's, and the prompt's
            last token, from whose state the first token of a completion comes.
    """
    inner: Any = backbone.inner_model
    whole = inner.forward

    @functools.wraps(whole)
    def forward(**kwargs: Any) -> Any:
        cache = kwargs.get("past_key_values")
        early = kwargs["input_ids"].shape[1] - num_tokens
        if early <= 0 or (cache is not None and cache.get_seq_length()):
            return whole(**kwargs)
        if kwargs.get("attention_mask") is None:
            kwargs["attention_mask"] = torch.ones_like(kwargs["input_ids"])
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = position_ids(backbone, kwargs)
        if cache is None:
            config = backbone.model.config.get_text_config(decoder=True)
            kwargs["past_key_values"] = DynamicCache(config=config)
        before, after = _split(kwargs, early)
        with torch.no_grad(), without_checkpointing(peft_model), without_adapters(peft_model):
            cache = whole(**before).past_key_values
        if torch.is_grad_enabled():  # see `prefix_reading.continue_prefix`
            cache.update_recurrent_state = lambda states, *_, **__: states
        with without_checkpointing(peft_model):
            output = whole(**{**after, "past_key_values": cache})
        states = output.last_hidden_state
        output["last_hidden_state"] = torch.nn.functional.pad(states, (0, 0, early, 0))
        return output

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward


def _split(kwargs: dict[str, Any], early: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what a forward of the first tokens takes, pictures included, and one of the rest."""
    before = {**kwargs, "use_cache": True, "return_dict": True}
    aligned = ("input_ids", "position_ids", *TOKEN_ALIGNED_KEYS)
    after = {key: value for key, value in before.items() if not isinstance(value, Tensor)}
    for key in aligned:
        if kwargs.get(key) is not None:
            before[key] = kwargs[key][..., :early]
    after |= {key: kwargs[key][..., early:] for key in ("input_ids", "position_ids")}
    after["attention_mask"] = kwargs["attention_mask"]
    before["attention_mask"] = kwargs["attention_mask"][:, :early]
    # What only prompts need, features of pictures among it, is no tensor everywhere.
    for key in ("mm_encoder_outputs", "batch_num_images"):
        after.pop(key, None)
    return before, after
