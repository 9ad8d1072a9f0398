"""Forwards that others write, such as TRL's, with an adapter that acts late.

What `prefix_reading` does for our own forwards in "shared_prefill", this does inside any forward of
the backbone: its layers run twice, bare over the prompts and with the adapter over the rest.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from twn_rl.modeling.adapters import without_adapters
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.kv_prefix import Prefix, fork
from twn_rl.modeling.prefix_reading import new_cache, run_prompts
from twn_rl.modeling.prompt_features import prepare_prompts
from twn_rl.modeling.readout import TOKEN_ALIGNED_KEYS, position_ids, without_checkpointing
from twn_rl.modeling.vision import FEATURES_KEY

_OF_PICTURES = (FEATURES_KEY, "batch_num_images")


@contextmanager
def acting_late(
    backbone: Backbone,
    peft_model: PeftModel,
    num_tokens: int,
    *,
    take: Callable[[Prefix, list[int]], None] = lambda prefix, places: None,
) -> Iterator[None]:
    """Let adapters act on the last tokens only, in forwards of whole sequences in the body.

    The others are read by the bare backbone, without gradient, and once where rows have the same;
    their last states come back as zeros, since nothing may be read out there. Forwards that go on
    from a filled cache stay as they are: all of their tokens are adapted.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        num_tokens: How many of the last columns are adapted: the completion's, and the prompt's
            last token, from whose state the first token of a completion comes.
        take: Gets what was read in every such forward, of different rows only, with their first
            adapted token pending, and the place of each row among them.
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
        with torch.no_grad(), without_checkpointing(peft_model), without_adapters(peft_model):
            prefix, places = _read_early(backbone, whole, kwargs, early)
        take(prefix, places)
        # `generate` goes on with the very cache that it gave.
        cache = new_cache(backbone) if cache is None else cache
        cache.layers = fork(prefix.select(places).cache).layers
        if torch.is_grad_enabled():  # see `prefix_reading.continue_prefix`
            cache.update_recurrent_state = lambda states, *_, **__: states
        with without_checkpointing(peft_model):
            output = whole(**_rest(kwargs, early), past_key_values=cache)
        states = output.last_hidden_state
        output["last_hidden_state"] = torch.nn.functional.pad(states, (0, 0, early, 0))
        return output

    inner.forward = forward
    try:
        yield
    finally:
        del inner.forward


def _read_early(
    backbone: Backbone, whole: Any, kwargs: dict[str, Any], early: int
) -> tuple[Prefix, list[int]]:
    """Return what is read of the first tokens of different rows, and each row's place there."""
    ids, positions = kwargs["input_ids"], kwargs["position_ids"]
    positions = positions.expand(*positions.shape[:-2], *ids.shape)
    aligned = ("input_ids", "attention_mask", *TOKEN_ALIGNED_KEYS)
    batch = {
        key: value[:, :early] if key in aligned else value
        for key, value in kwargs.items()
        if key != "position_ids" and (isinstance(value, Tensor) or key in _OF_PICTURES)
    }
    if batch.get("pixel_values") is not None and batch.get(FEATURES_KEY) is None:
        batch.pop(
            FEATURES_KEY, None
        )  # not encoded yet; without pixels None says: nothing to encode
    prompts = prepare_prompts(backbone, batch)
    prompts = replace(prompts, position_ids=positions[..., :early])
    pending = ids[:, early]
    equal = enumerate(prompts.first_equal())
    first = [one if bool(pending[one] == pending[row]) else row for row, one in equal]
    rows = sorted(set(first))
    if len(rows) < len(first):
        prompts = prompts.select(rows)
    cache = run_prompts(backbone, whole, prompts).past_key_values
    # Of 3-D positions any axis will do: what is read next is text.
    own = positions.flatten(0, -3)[-1] if positions.ndim > 2 else positions
    mask = prompts.inputs["attention_mask"]
    prefix = Prefix(cache, mask, own[rows, early], pending=pending[rows])
    return prefix, [rows.index(row) for row in first]


def _rest(kwargs: dict[str, Any], early: int) -> dict[str, Any]:
    """Return what a forward of the remaining tokens takes: text, nothing of pictures."""
    rest = {key: value for key, value in kwargs.items() if not isinstance(value, Tensor)}
    for key in ("past_key_values", *_OF_PICTURES):
        rest.pop(key, None)
    return {
        **rest,
        "input_ids": kwargs["input_ids"][:, early:],
        "attention_mask": kwargs["attention_mask"],
        "position_ids": kwargs["position_ids"][..., early:],
        "use_cache": True,
        "return_dict": True,
    }
