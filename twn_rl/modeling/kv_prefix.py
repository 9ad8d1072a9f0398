"""Prompts read once and continued many times: key/value caches and positions.

Knows token tensors only: no items, no text, no losses. A cache belongs to the adapter that made it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, use_adapter
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.prompt_features import Prompts, pad_left
from twn_rl.modeling.readout import Tail, attention_for, has_completion


@dataclass(frozen=True)
class Prefix:
    """What a model has read of N sequences under one adapter, to be continued any number of times.

    Attributes:
        cache: Keys and values of P tokens; never changed, continuations fork it.
        attention_mask: (N, P), 1 on real tokens.
        next_position: (N,) position of the next token.
        logits: (N, V) of the next token, if they were asked for.
    """

    cache: Any
    attention_mask: Tensor
    next_position: Tensor
    logits: Tensor | None = None

    def __len__(self) -> int:
        """Return the number N of sequences."""
        return len(self.next_position)

    def select(self, rows: Sequence[int]) -> Prefix:
        """Return some of the sequences, in the order of `rows`, which may repeat."""
        if list(rows) == list(range(len(self))):
            return self
        index = torch.tensor(rows, device=self.next_position.device)
        cache = fork(self.cache)
        cache.reorder_cache(index)  # the one selection that every kind of layer has
        logits = None if self.logits is None else self.logits[index]
        return Prefix(cache, self.attention_mask[index], self.next_position[index], logits)

    @property
    def is_mergeable(self) -> bool:
        """Whether every layer keeps all keys, so that rows of other lengths can join."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)


def prefix_bytes(prefix: Prefix) -> int:
    """Return the memory of a mergeable prefix's keys and values."""
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in prefix.cache.layers)


def merge(prefixes: Sequence[Prefix]) -> Prefix:
    """Return one prefix of all sequences, left-padded to the longest; logits if all have them."""
    if len(prefixes) == 1:
        return prefixes[0]
    length = max(prefix.attention_mask.shape[1] for prefix in prefixes)
    cache = fork(prefixes[0].cache)
    for number, layer in enumerate(cache.layers):
        layers = [prefix.cache.layers[number] for prefix in prefixes]
        layer.keys = torch.cat([pad_left(part.keys, length, 2) for part in layers])
        layer.values = torch.cat([pad_left(part.values, length, 2) for part in layers])
    masks = [pad_left(prefix.attention_mask, length, 1) for prefix in prefixes]
    positions = torch.cat([prefix.next_position for prefix in prefixes])
    logits = [prefix.logits for prefix in prefixes if prefix.logits is not None]
    joined = torch.cat(logits) if len(logits) == len(prefixes) else None
    return Prefix(cache, torch.cat(masks), positions, joined)


def trim(prefix: Prefix) -> Prefix:
    """Return a prefix without the leading columns that are padding in every sequence."""
    if not prefix.is_mergeable:
        return prefix
    filled = prefix.attention_mask.any(0).nonzero()
    padding = int(filled[0]) if len(filled) else 0
    if not padding:
        return prefix
    cache = fork(prefix.cache)
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys[:, :, padding:], layer.values[:, :, padding:]
    return replace(prefix, cache=cache, attention_mask=prefix.attention_mask[:, padding:])


def fork(cache: Any) -> Any:
    """Return a cache that can grow without changing the original.

    Keys and values are replaced as they grow, so none is copied; states of linear attention are
    written in place, so these are.
    """
    copied = copy.copy(cache)
    copied.layers = [_forked(layer) for layer in cache.layers]
    return copied


def _forked(layer: Any) -> Any:
    copied = copy.copy(layer)
    for name, values in vars(layer).items():
        if isinstance(values, dict):  # of states, and of what is known of each
            own = {k: v.clone() if isinstance(v, Tensor) else v for k, v in values.items()}
            setattr(copied, name, own)
    return copied


def read_prompts(
    backbone: Backbone,
    peft_model: PeftModel,
    prompts: Prompts,
    *,
    adapter: str,
    with_logits: bool = False,
) -> Prefix:
    """Return what `adapter` reads in the prompts; gradient reaches that adapter through the cache.

    Args:
        backbone: The frozen model.
        peft_model: The model with its adapters.
        prompts: N prompts.
        adapter: Adapter to read with.
        with_logits: Also run the language head on the last token, to write from here.
    """
    model: Any = backbone.model if with_logits else backbone.inner_model
    options = {"logits_to_keep": 1} if with_logits else {}
    with use_adapter(peft_model, adapter):
        output = model(
            **prompts.inputs,
            **prompts.vision,
            **options,
            position_ids=prompts.position_ids,
            past_key_values=DynamicCache(
                config=backbone.model.config.get_text_config(decoder=True)
            ),
            use_cache=True,
            return_dict=True,
        )
    mask = prompts.inputs["attention_mask"]
    positions = prompts.position_ids.masked_fill(mask == 0, -1)
    positions = positions if positions.ndim == 2 else positions.amax(0)
    logits = output.logits[:, -1] if with_logits else None
    return Prefix(output.past_key_values, mask, positions.amax(1) + 1, logits)


def read_rows(
    backbone: Backbone,
    peft_model: PeftModel,
    prompts: Prompts,
    rows: Sequence[int] | None = None,
    *,
    adapter: str,
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
    """
    steps = (mask.long().cumsum(1) - 1).clamp(min=0)
    positions = prefix.next_position[:, None] + steps
    attention = torch.cat([prefix.attention_mask, mask.to(prefix.attention_mask)], 1)
    with use_adapter(peft_model, adapter):
        output = backbone.inner_model(
            input_ids=ids,
            attention_mask=attention_for(backbone, attention, tail, ids.shape[1]),
            position_ids=positions.expand(3, -1, -1) if backbone.uses_mrope else positions,
            past_key_values=fork(prefix.cache),
            use_cache=True,
            return_dict=True,
        )
    longer = replace(
        prefix,
        cache=output.past_key_values,
        attention_mask=attention,
        next_position=prefix.next_position + mask.sum(1),
        logits=None,
    )
    return output.last_hidden_state, longer


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
        prefix: Prompts read by the embedding adapter, or by `prefill_adapter`.
        completions: `completion_ids`, `completion_mask` (N, C), or neither; rows may be empty.
        tail: K reason tokens and Q read-outs.
        prefill_adapter: For "kv_detach": adapter that also reads the completions, so that only the
            tail runs under the embedding adapter. None is "reencode".
    """
    read = partial(_read_tail, backbone, peft_model, tail=tail, prefill_adapter=prefill_adapter)
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
    if tail.takes_last:
        prefix = _without_last(prefix, ~has_completion(completions, len(prefix)))
    ids = prefix.next_position.new_tensor(tail.ids).expand(len(prefix), -1)
    mask = torch.ones_like(ids)
    # Also if all are empty: processes must run in step.
    if "completion_ids" in completions and completions["completion_ids"].shape[1]:
        written = completions["completion_ids"], completions["completion_mask"]
        if prefill_adapter is None:
            ids, mask = torch.cat([written[0], ids], 1), torch.cat([written[1], mask], 1)
        else:
            _, prefix = continue_prefix(
                backbone, peft_model, prefix, *written, adapter=prefill_adapter
            )
    states, _ = continue_prefix(
        backbone, peft_model, prefix, ids, mask, adapter=EMBEDDING_ADAPTER, tail=tail
    )
    return states[:, -len(tail.ids) :]


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
