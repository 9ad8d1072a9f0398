"""Forwards with a cache: prompts are read once, by an adapter or none, and gone on from.

Knows token tensors only: no items, no text, no losses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache

from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, use_adapter
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.kv_prefix import Prefix, fork
from twn_rl.modeling.prompt_features import Prompts
from twn_rl.modeling.readout import Tail, attention_for, has_completion


def read_prompts(
    backbone: Backbone,
    peft_model: PeftModel,
    prompts: Prompts,
    *,
    adapter: str | None,
    with_logits: bool = False,
) -> Prefix:
    """Return what `adapter` reads in the prompts; gradient reaches that adapter through the cache.

    The bare backbone leaves the last token of each prompt `pending`, and there is no gradient.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        prompts: N prompts.
        adapter: Adapter to read with; None is the bare backbone.
        with_logits: Also run the language head on the last token, to write from here; not with the
            bare backbone.
    """
    pending = None
    if adapter is None:
        prompts, pending = prompts.without_last()
    model: Any = backbone.model if with_logits else backbone.inner_model
    options = {"logits_to_keep": 1} if with_logits else {}
    keeps_gradient = torch.is_grad_enabled() and adapter is not None
    with torch.set_grad_enabled(keeps_gradient), use_adapter(peft_model, adapter):
        output = run_prompts(backbone, model, prompts, **options)
    mask = prompts.inputs["attention_mask"]
    positions = prompts.position_ids.masked_fill(mask == 0, -1)
    positions = positions if positions.ndim == 2 else positions.amax(0)
    logits = output.logits[:, -1] if with_logits else None
    return Prefix(output.past_key_values, mask, positions.amax(1) + 1, logits, pending)


def run_prompts(
    backbone: Backbone, model: Callable[..., Any], prompts: Prompts, **options: Any
) -> Any:
    """Return the output of a forward of whole prompts, its cache filled.

    Args:
        backbone: Whose layers say which cache they need.
        model: The backbone's model, the one inside it, or the forward of either.
        prompts: N prompts.
        **options: For the forward.
    """
    return model(
        **prompts.inputs,
        **prompts.vision,
        **options,
        position_ids=prompts.position_ids,
        past_key_values=new_cache(backbone),
        use_cache=True,
        return_dict=True,
    )


def new_cache(backbone: Backbone) -> Any:
    """Return an empty cache of the kinds that the backbone's layers need."""
    return DynamicCache(config=backbone.model.config.get_text_config(decoder=True))


def read_rows(
    backbone: Backbone,
    peft_model: PeftModel,
    prompts: Prompts,
    rows: Sequence[int] | None = None,
    *,
    adapter: str | None,
    with_logits: bool = False,
) -> Prefix:
    """Return what `adapter` reads in some prompts (None: all); others only if they must be read."""
    if rows is not None and list(rows) == list(range(len(prompts))):
        rows = None
    if rows is not None and prompts.image_tokens is not None:
        prompts, rows = prompts.select(rows), None
    prefix = read_prompts(backbone, peft_model, prompts, adapter=adapter, with_logits=with_logits)
    return prefix if rows is None else prefix.select(rows)


def continue_prefix(
    backbone: Backbone,
    peft_model: PeftModel,
    prefix: Prefix,
    ids: Tensor,
    mask: Tensor,
    *,
    adapter: str,
    tail: Tail | None = None,
    with_logits: bool = False,
    is_end: bool = False,
) -> tuple[Tensor, Prefix]:
    """Return last states (N, T, D) of T more tokens a sequence, and the longer prefix.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        prefix: What came before; stays as it is.
        ids: (N, T) tokens.
        mask: (N, T), 1 on real tokens; others take no position and are never attended to.
        adapter: Adapter to read with.
        tail: What the tokens end with, if its read-outs may not see everything.
        with_logits: Return logits (N, T, V) instead.
        is_end: Nothing is read after these tokens, so that a gradient through states of linear
            attention, which would be overwritten in place, is possible.
    """
    cache = fork(prefix.cache)
    if is_end and torch.is_grad_enabled():
        cache.update_recurrent_state = lambda states, *_, **__: states
    model: Any = backbone.model if with_logits else backbone.inner_model
    options = {"logits_to_keep": ids.shape[1]} if with_logits else {}
    steps = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = prefix.next_position[:, None] + steps
    attention = torch.cat([prefix.attention_mask, mask.to(prefix.attention_mask)], 1)
    with use_adapter(peft_model, adapter):
        output = model(
            input_ids=ids,
            attention_mask=attention_for(backbone, attention, tail, ids.shape[1]),
            position_ids=positions.expand(3, -1, -1) if backbone.uses_mrope else positions,
            past_key_values=cache,
            use_cache=True,
            return_dict=True,
            **options,
        )
    longer = replace(
        prefix,
        cache=output.past_key_values,
        attention_mask=attention,
        next_position=prefix.next_position + mask.sum(1),
        logits=None,
        pending=None,
    )
    return output.logits if with_logits else output.last_hidden_state, longer


def read_pending(
    backbone: Backbone, peft_model: PeftModel, prefix: Prefix, *, adapter: str
) -> Prefix:
    """Return the prefix after `adapter` has read the pending tokens, with logits to write from."""
    assert prefix.pending is not None
    ids = prefix.pending[:, None]
    logits, longer = continue_prefix(
        backbone, peft_model, prefix, ids, torch.ones_like(ids), adapter=adapter, with_logits=True
    )
    return replace(longer, logits=logits[:, -1])


def completion_logits(
    backbone: Backbone,
    peft_model: PeftModel,
    prefix: Prefix,
    completions: Mapping[str, Tensor],
    *,
    adapter: str,
) -> Tensor:
    """Return the logits (N, C, V) of completions after prompts that the bare backbone read.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        prefix: N prompts, their last token pending.
        completions: `completion_ids`, `completion_mask` (N, C).
        adapter: Adapter that writes; gradient reaches it.
    """
    ids, mask = _after_pending(
        prefix, [(completions["completion_ids"], completions["completion_mask"])]
    )
    logits, _ = continue_prefix(
        *(backbone, peft_model, prefix, ids, mask), adapter=adapter, with_logits=True, is_end=True
    )
    return logits[:, :-1]


def read_tail(
    backbone: Backbone,
    peft_model: PeftModel,
    prefix: Prefix,
    completions: Mapping[str, Tensor],
    tail: Tail,
    *,
    prefill_adapter: str | None = None,
) -> Tensor:
    """Return the tail's states (N, K + Q, D); gradient flows.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        prefix: Prompts read by the embedding adapter, by `prefill_adapter`, or by the bare backbone
            with their last token pending.
        completions: `completion_ids`, `completion_mask` (N, C), or neither; rows may be empty. What
            else a batch holds is left alone.
        tail: K reason tokens and Q read-outs.
        prefill_adapter: For "kv_detach": adapter that also reads the completions, so that only the
            tail runs under the embedding adapter. None is "reencode".
    """
    read = partial(_read_tail, backbone, peft_model, tail=tail, prefill_adapter=prefill_adapter)
    names = ("completion_ids", "completion_mask")
    completions = {name: completions[name] for name in names if name in completions}
    groups = _gapless(backbone, completions)
    if not groups:
        return read(prefix, completions)
    parts = [
        read(prefix.select(rows), {key: value[rows, :length] for key, value in completions.items()})
        for length, rows in groups.items()
    ]
    order = [row for rows in groups.values() for row in rows]
    return torch.cat(parts)[torch.tensor(order).argsort().to(parts[0].device)]


def _read_tail(
    backbone: Backbone,
    peft_model: PeftModel,
    prefix: Prefix,
    completions: Mapping[str, Tensor],
    *,
    tail: Tail,
    prefill_adapter: str | None,
) -> Tensor:
    gives_last = None
    if tail.takes_last:
        gives_last = ~has_completion(completions, len(prefix))
        if prefix.pending is None:
            prefix = _without_last(prefix, gives_last)
    end = prefix.next_position.new_tensor(tail.ids).expand(len(prefix), -1)
    parts = [(end, torch.ones_like(end))]
    # Also if all are empty: processes must run in step.
    if "completion_ids" in completions and completions["completion_ids"].shape[1]:
        written = completions["completion_ids"], completions["completion_mask"]
        if prefill_adapter is None:
            parts = [written, *parts]
        else:
            _, prefix = continue_prefix(
                backbone, peft_model, prefix, *written, adapter=prefill_adapter
            )
    ids, mask = _after_pending(prefix, parts, gives_last)
    states, _ = continue_prefix(
        *(backbone, peft_model, prefix, ids, mask),
        adapter=EMBEDDING_ADAPTER,
        tail=tail,
        is_end=True,
    )
    return states[:, -len(tail.ids) :]


def _after_pending(
    prefix: Prefix, parts: Sequence[tuple[Tensor, Tensor]], gives_last: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return ids and mask (N, T) of all parts, behind the pending token if there is one.

    Rows of `gives_last` (N,) hide it: their tail takes its place.
    """
    if prefix.pending is not None:
        ids = prefix.pending[:, None]
        mask = torch.ones_like(ids)
        if gives_last is not None:
            mask = mask - gives_last.to(mask)[:, None]
        parts = [(ids, mask), *parts]
    return torch.cat([ids for ids, _ in parts], 1), torch.cat(
        [mask.to(ids) for ids, mask in parts], 1
    )


def _without_last(prefix: Prefix, rows: Tensor) -> Prefix:
    """Return a prefix that has not read the last token of some prompts, as far as can be seen."""
    mask, taken = prefix.attention_mask.clone(), rows.to(prefix.attention_mask)
    mask[:, -1] *= 1 - taken
    return replace(prefix, attention_mask=mask, next_position=prefix.next_position - taken)


def _gapless(backbone: Backbone, completions: Mapping[str, Tensor]) -> dict[int, list[int]]:
    """Return length -> rows whose completions have it, if layers would count padding as tokens."""
    if "completion_ids" not in completions or not backbone.counts_columns:
        return {}
    groups: dict[int, list[int]] = {}
    for row, length in enumerate(completions["completion_mask"].sum(1).tolist()):
        groups.setdefault(length, []).append(row)
    return groups
