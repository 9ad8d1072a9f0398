"""What was read of prompts, to be continued many times: key/value caches and positions.

Knows token tensors only: no items, no text, no losses. A cache belongs to the adapter that made it;
one that no adapter made, that of the bare backbone, serves all of them.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from twn_rl.modeling.prompt_features import pad_left


@dataclass(frozen=True)
class Prefix:
    """What a model has read of N sequences under one adapter, to be continued any number of times.

    Attributes:
        cache: Keys and values of P tokens; never changed, continuations fork it.
        attention_mask: (N, P), 1 on real tokens.
        next_position: (N,) position of the next token.
        logits: (N, V) of the next token, if they were asked for.
        pending: (N,) last token of each prompt, which whoever goes on reads first, if the bare
            backbone read the prompts: an adapter's first state comes from it.
    """

    cache: Any
    attention_mask: Tensor
    next_position: Tensor
    logits: Tensor | None = None
    pending: Tensor | None = None

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
        pending = None if self.pending is None else self.pending[index]
        return Prefix(cache, self.attention_mask[index], self.next_position[index], logits, pending)

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
    logits = _join([prefix.logits for prefix in prefixes])
    pending = _join([prefix.pending for prefix in prefixes])
    return Prefix(cache, torch.cat(masks), positions, logits, pending)


def _join(parts: Sequence[Tensor | None]) -> Tensor | None:
    present = [part for part in parts if part is not None]
    return torch.cat(present) if len(present) == len(parts) else None


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
