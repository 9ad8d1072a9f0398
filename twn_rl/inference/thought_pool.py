"""Inputs that are to think: pooled over batches, written together, read out where reading stopped.

Knows neither who chose them nor how inputs came in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from twn_rl.inference.ledger import Ledger
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.thought_cache import CotCache, Thoughts, cache_key
from twn_rl.modeling.kv_prefix import Prefix, merge, prefix_bytes
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.prompt_features import Prompts, merge_prompts

NOT_FINITE = "not_finite"  # one more problem beside those of `Think`


@dataclass(frozen=True)
class ThoughtCache:
    """The cache on disk, and whose thoughts to look for there."""

    store: CotCache
    fingerprint: str


@dataclass(frozen=True)
class Chunk:
    """Some inputs and what was read of them, to write from and to read out from.

    Attributes:
        positions: Places among the inputs.
        keys: Content keys; "" where nobody needs them.
        start: Where writing starts: prompts, or what the reasoning adapter has read of them.
        prefix: Where reading out starts, after the thoughts.
    """

    positions: list[int]
    keys: list[str]
    start: Prompts | Prefix
    prefix: Prefix

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def is_mergeable(self) -> bool:
        """Whether single rows can be taken out and wait for those of other batches."""
        return self.start.is_mergeable and self.prefix.is_mergeable

    def select(self, rows: Sequence[int]) -> Chunk:
        """Return some rows of a mergeable chunk; the memory of the others can be freed."""
        return Chunk(
            [self.positions[row] for row in rows],
            [self.keys[row] for row in rows],
            self.start.select(rows),
            self.prefix.select(rows),
        )

    def num_bytes(self) -> int:
        """Return the memory of a mergeable chunk."""
        start = self.start
        written = prefix_bytes(start) if isinstance(start, Prefix) else start.num_bytes()
        return written + prefix_bytes(self.prefix)


def merge_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of all rows."""
    return Chunk(
        [position for chunk in chunks for position in chunk.positions],
        [key for chunk in chunks for key in chunk.keys],
        _merge_starts([chunk.start for chunk in chunks]),
        merge([chunk.prefix for chunk in chunks]),
    )


def _merge_starts(starts: Sequence[Prompts | Prefix]) -> Prompts | Prefix:
    """Return one start of all rows; those of a call are all of one kind."""
    prefixes = [start for start in starts if isinstance(start, Prefix)]
    return (
        merge(prefixes)
        if prefixes
        else merge_prompts([s for s in starts if isinstance(s, Prompts)])
    )


class ThoughtPool:
    """Collects rows that are to think until there are enough of them to write together."""

    def __init__(
        self,
        model: DualLoraModel,
        options: EncodeOptions,
        ledger: Ledger,
        cache: ThoughtCache | None = None,
    ) -> None:
        """Write thoughts of `model` and leave vectors and texts in `ledger`."""
        self.model, self.options, self.ledger, self.cache = model, options, ledger, cache
        self.budget = options.max_think_tokens or model.config.max_think_tokens
        self.capacity = max(1, options.batch_size // options.num_thoughts)
        self.waiting: list[Chunk] = []

    @property
    def needs_keys(self) -> bool:
        """Whether content keys are used at all; hashing pictures takes time."""
        return self.cache is not None or self.options.do_sample

    def add(self, chunk: Chunk, rows: Sequence[int]) -> None:
        """Let some rows of a chunk think, now or when the pool is full."""
        rows = self._without_cached(chunk, rows)
        if not rows:
            return
        if not chunk.is_mergeable:
            for start in range(0, len(rows), self.capacity):
                self._write(chunk, rows[start : start + self.capacity])
            return
        self.waiting.append(chunk.select(rows))
        while sum(map(len, self.waiting)) >= self.capacity:
            self._write_waiting()

    def finish(self) -> None:
        """Write what is still waiting."""
        while self.waiting:
            self._write_waiting()

    def _without_cached(self, chunk: Chunk, rows: Sequence[int]) -> list[int]:
        """Embed the rows whose thoughts are on disk; return the others."""
        if self.cache is None or not rows:
            return list(rows)
        keys = {row: self._cache_key(chunk.keys[row]) for row in rows}
        found = self.cache.store.get(list(keys.values()))
        known = [row for row in rows if keys[row] in found]
        if known:
            self.ledger.details.cot_cache_hits += len(known)
            positions = [chunk.positions[row] for row in known]
            thoughts = [found[keys[row]] for row in known]
            self._read_out(chunk.prefix.select(known), positions, thoughts)
        return [row for row in rows if keys[row] not in found]

    def _write_waiting(self) -> None:
        taken: list[Chunk] = []
        missing = self.capacity
        while missing and self.waiting:
            chunk = self.waiting.pop(0)
            if len(chunk) > missing:
                self.waiting.insert(0, chunk.select(range(missing, len(chunk))))
                chunk = chunk.select(range(missing))
            taken.append(chunk)
            missing -= len(chunk)
        chunk = merge_chunks(taken)
        self._write(chunk, range(len(chunk)))

    def _write(self, chunk: Chunk, rows: Sequence[int]) -> None:
        options = self.options
        keys = [chunk.keys[row] for row in rows]
        with self.ledger.timed("write"):
            ids = self.model.reason(
                chunk.start,
                rows,
                max_think_tokens=self.budget,
                do_sample=options.do_sample,
                temperature=options.temperature,
                top_p=options.top_p,
                num_thoughts=options.num_thoughts,
                seeds=[seed_of(options.seed, key) for key in keys],
            )
        count = options.num_thoughts
        thoughts = [ids[start : start + count] for start in range(0, len(ids), count)]
        if self.cache is not None:
            self.cache.store.put(dict(zip(map(self._cache_key, keys), thoughts, strict=True)))
        positions = [chunk.positions[row] for row in rows]
        self._read_out(chunk.prefix.select(rows), positions, thoughts)

    def _read_out(
        self, prefix: Prefix, positions: Sequence[int], thoughts: Sequence[Thoughts]
    ) -> None:
        """Replace the no-think vectors of n inputs by those with their thoughts."""
        flat = [(row, ids) for row, written in enumerate(thoughts) for ids in written]
        thinks = [self.model.think(ids) for _, ids in flat]
        usable = [index for index, think in enumerate(thinks) if think.is_complete]
        states = self._states(prefix, [flat[index] for index in usable])
        is_finite = torch.isfinite(states).all(dim=1)
        for index, is_fine in zip(usable, is_finite.tolist(), strict=True):
            if not is_fine:
                thinks[index] = replace(thinks[index], problem=NOT_FINITE)
        eos = self.model.backbone.eos_token_id
        for (row, ids), think in zip(flat, thinks, strict=True):
            tokens = sum(token != eos for token in ids)
            self.ledger.details.add_thought(positions[row], think, tokens)
        owners = torch.tensor([flat[index][0] for index in usable])
        for row, position in enumerate(positions):
            own = states[(owners == row) & is_finite] if usable else states
            if len(own):
                self.ledger.accept([position], mean_vector(own)[None])
            else:
                self.ledger.details.fallbacks.append(position)

    def _states(self, prefix: Prefix, rows: Sequence[tuple[int, list[int]]]) -> Tensor:
        """Return the vectors (n, D) of (row of the prefix, thought) pairs, on the CPU."""
        parts = [torch.zeros(0, self.model.hidden_size)]
        with self.ledger.timed("read_out"):
            for start in range(0, len(rows), self.options.batch_size):
                part = rows[start : start + self.options.batch_size]
                completions = [self.model.completion_for_embedding(ids) for _, ids in part]
                selected = prefix.select([row for row, _ in part])
                parts.append(self.model.read_out(selected, completions).float().cpu())
        return torch.cat(parts)

    def _cache_key(self, content_key: str) -> str:
        assert self.cache is not None
        options = self.options
        settings = {"max_think_tokens": self.budget, "do_sample": options.do_sample}
        if options.do_sample:
            names = ("temperature", "top_p", "num_thoughts", "seed")
            settings |= {name: getattr(options, name) for name in names}
        return cache_key(content_key, self.cache.fingerprint, settings)


def seed_of(seed: int, content_key: str) -> int:
    """Return the seed of an input's dice: of its content, not of its place in a batch.

    >>> seed_of(0, "a") == seed_of(0, "a"), seed_of(0, "a") == seed_of(1, "a")
    (True, False)
    """
    digest = hashlib.sha256(f"{seed} {content_key}".encode()).digest()
    return int.from_bytes(digest[:8], "big")


def mean_vector(states: Tensor) -> Tensor:
    """Return the mean (D,) of the unit vectors of states (n, D), as long as states are on average.

    One state comes back as it is.
    """
    directions = torch.nn.functional.normalize(states, dim=1).mean(dim=0)
    return directions * states.norm(dim=1).mean()
