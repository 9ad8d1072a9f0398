"""Inputs that are to think: pooled over batches, written together, read out from their prompts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twn_rl.data.record import refuse_in_thought
from twn_rl.inference.details import Ledger, timed
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions, GivenThought
from twn_rl.inference.thought import Thought, note_states, written_thought
from twn_rl.inference.thought_cache import CotCache, cache_key
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.kv_prefix import Prefix, merge, prefix_bytes
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.prompt_features import Prompts, merge_prompts

_SAMPLING = ("temperature", "top_p", "num_thoughts")


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
        start: Where writing starts: prompts, or what has been read of them; where that serves both
            adapters, the very prefix that is read out from.
        prefix: Where reading out starts, after the thoughts.
    """

    positions: list[int]
    keys: list[str]
    start: Prompts | Prefix
    prefix: Prefix

    def __len__(self) -> int:
        return len(self.positions)

    @property
    def is_shared(self) -> bool:
        """Whether writing and reading out start from the same cache, which is kept once."""
        return self.start is self.prefix

    @property
    def is_mergeable(self) -> bool:
        """Whether single rows can be taken out and wait for those of other batches."""
        return self.start.is_mergeable and self.prefix.is_mergeable

    def select(self, rows: Sequence[int]) -> Chunk:
        """Return some rows of a mergeable chunk; the memory of the others can be freed."""
        prefix = self.prefix.select(rows)
        return Chunk(
            [self.positions[row] for row in rows],
            [self.keys[row] for row in rows],
            prefix if self.is_shared else self.start.select(rows),
            prefix,
        )

    def num_bytes(self) -> int:
        """Return the memory of a mergeable chunk."""
        start = self.start
        if self.is_shared:
            return prefix_bytes(self.prefix)
        written = prefix_bytes(start) if isinstance(start, Prefix) else start.num_bytes()
        return written + prefix_bytes(self.prefix)


def merge_chunks(chunks: Sequence[Chunk]) -> Chunk:
    """Return one chunk of all rows."""
    prefix = merge([chunk.prefix for chunk in chunks])
    return Chunk(
        [position for chunk in chunks for position in chunk.positions],
        [key for chunk in chunks for key in chunk.keys],
        _merge_starts(chunks) or prefix,
        prefix,
    )


def _merge_starts(chunks: Sequence[Chunk]) -> Prompts | Prefix | None:
    """Return where writing starts; None if that is where reading out does. All are of one kind."""
    if all(chunk.is_shared for chunk in chunks):
        return None
    prefixes = [chunk.start for chunk in chunks if isinstance(chunk.start, Prefix)]
    prompts = [chunk.start for chunk in chunks if isinstance(chunk.start, Prompts)]
    return merge(prefixes) if prefixes else merge_prompts(prompts)


class ThoughtPool:
    """Collects rows that are to think until there are enough of them to write together."""

    def __init__(
        self,
        model: DualLoraModel,
        options: EncodeOptions,
        ledger: Ledger,
        *,
        given: Mapping[int, GivenThought],
        judge: Judge | None = None,
        cache: ThoughtCache | None = None,
    ) -> None:
        """Write thoughts of `model`, or read `given` ones, by position; leave all in `ledger`.

        The judge, if there is one, says how plausible each is; `options.keep` makes that count.
        """
        self.model, self.options, self.ledger, self.cache = model, options, ledger, cache
        self.given, self.judge = given, judge
        self.budget = options.max_think_tokens or model.config.max_think_tokens
        self.capacity = max(1, options.batch_size // options.num_thoughts)
        self.waiting: list[Chunk] = []

    @property
    def needs_keys(self) -> bool:
        """Whether content keys are used at all; hashing pictures takes time."""
        has_own_seeds = isinstance(self.options.seed, Sequence)
        return self.cache is not None or (self.options.do_sample and not has_own_seeds)

    def add(self, chunk: Chunk, rows: Sequence[int]) -> None:
        """Let some rows of a chunk think, now or when the pool is full."""
        rows = self._without_cached(chunk, self._without_given(chunk, rows))
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

    def _without_given(self, chunk: Chunk, rows: Sequence[int]) -> Sequence[int]:
        """Embed the rows that are given a thought; return the others."""
        known: dict[int, list[Thought]] = {}
        for row in rows:
            position = chunk.positions[row]
            if position in self.given:
                try:
                    known[row] = [self._given(self.given[position])]
                except ValueError as error:
                    self.ledger.refuse(InputError(position, str(error)))
        if known:
            positions = [chunk.positions[row] for row in known]
            self._read_out(chunk.prefix.select(list(known)), positions, list(known.values()))
        return [row for row in rows if chunk.positions[row] not in self.given]

    def _given(self, thought: GivenThought) -> Thought:
        """Return a given thought, whose span may be empty."""
        model, renderer, eos = self.model, self.model.renderer, self.model.backbone.eos_token_id
        if isinstance(thought, str):
            refuse_in_thought(thought, "think", model.backbone.markup(renderer))
            empty = f"{renderer.think_open} {renderer.think_close}"
            span = renderer.completion(thought) if thought else empty
            return Thought(model.completion_ids(span), thought)
        ids = [token for token in thought if token != eos]
        return Thought(model.until_close(ids), model.think([*ids, eos]).text)

    def _without_cached(self, chunk: Chunk, rows: Sequence[int]) -> Sequence[int]:
        """Embed the rows whose thoughts are on disk; return the others."""
        if self.cache is None or not rows:
            return rows
        keys = {row: self._cache_key(chunk, row) for row in rows}
        found = self.cache.store.get(list(keys.values()))
        known = [row for row in rows if keys[row] in found]
        if known:
            self.ledger.details.cot_cache_hits += len(known)
            positions = [chunk.positions[row] for row in known]
            thoughts = [
                [written_thought(self.model, ids) for ids in found[keys[row]]] for row in known
            ]
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
        options, count = self.options, self.options.num_thoughts
        positions = [chunk.positions[row] for row in rows]
        with timed("write", positions, [self.ledger]):
            ids = self.model.reason(
                chunk.start,
                rows,
                max_think_tokens=self.budget,
                do_sample=options.do_sample,
                temperature=options.temperature,
                top_p=options.top_p,
                num_thoughts=count,
                seeds=[self._seed(chunk, row) for row in rows] if options.do_sample else None,
            )
        thoughts = [ids[start : start + count] for start in range(0, len(ids), count)]
        if self.cache is not None:
            keys = [self._cache_key(chunk, row) for row in rows]
            self.cache.store.put(dict(zip(keys, thoughts, strict=True)))
        read = [[written_thought(self.model, own) for own in several] for several in thoughts]
        self._read_out(chunk.prefix.select(rows), positions, read)

    def _read_out(
        self, prefix: Prefix, positions: Sequence[int], thoughts: Sequence[Sequence[Thought]]
    ) -> None:
        """Replace the no-think vectors of n inputs by those with their thoughts."""
        details, no_think = self.ledger.details, self.ledger.states[list(positions)]
        flat = [(row, thought) for row, own in enumerate(thoughts) for thought in own]
        usable = [(row, thought) for row, thought in flat if thought.problem is None]
        with timed("read_out", positions, [self.ledger]):
            states = self._states(prefix, usable)
            without = torch.from_numpy(no_think[[row for row, _ in usable]])
            read, keep = [thought for _, thought in usable], self.options.keep
            note_states(read, states, without, judge=self.judge, keep=keep)
        for position, own, without in zip(positions, thoughts, no_think, strict=True):
            details.thoughts[position] += [thought.text for thought in own]
            details.thought_ids[position] += [thought.ids for thought in own]
            details.problems[position] += [thought.problem for thought in own]
            details.plausibilities[position] += [thought.plausibility for thought in own]
            details.think_tokens[position] += sum(thought.written_tokens for thought in own)
            if self.options.return_details:
                self.ledger.thought_states[position] += [
                    without if thought.state is None else thought.state.numpy() for thought in own
                ]
            if found := [thought.state for thought in own if thought.state is not None]:
                self.ledger.accept([position], mean_vector(torch.stack(found))[None])
            else:
                details.fallbacks.append(position)

    def _states(self, prefix: Prefix, rows: Sequence[tuple[int, Thought]]) -> Tensor:
        """Return the vectors (n, D) of (row of the prefix, thought) pairs, on the CPU."""
        parts = [torch.zeros(0, self.model.hidden_size)]
        for start in range(0, len(rows), self.options.batch_size):
            part = rows[start : start + self.options.batch_size]
            selected = prefix.select([row for row, _ in part])
            states = self.model.read_out(selected, [thought.ids for _, thought in part])
            parts.append(states.float().cpu())
        return torch.cat(parts)

    def _seed(self, chunk: Chunk, row: int) -> int:
        """Return the seed of a row's dice: its own, or one of its content."""
        seed = self.options.seed
        if isinstance(seed, Sequence):
            return seed[chunk.positions[row]]
        return seed_of(seed, chunk.keys[row])

    def _cache_key(self, chunk: Chunk, row: int) -> str:
        assert self.cache is not None
        options = self.options
        settings = {"max_think_tokens": self.budget, "do_sample": options.do_sample}
        if options.do_sample:
            settings |= {name: getattr(options, name) for name in _SAMPLING}
            if isinstance(options.seed, Sequence):
                settings["own_seed"] = options.seed[chunk.positions[row]]
            else:
                settings["seed"] = options.seed
        return cache_key(chunk.keys[row], self.cache.fingerprint, settings)


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
