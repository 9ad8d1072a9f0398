"""What happened on the way to the vectors of one call: as they come in, and as it is told."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.thought import IMPLAUSIBLE
from twn_rl.inference.vector_forms import in_form

logger = logging.getLogger(__name__)


@dataclass
class EncodeDetails:
    """The vectors of one call and how they came about; lists have one entry per input.

    Attributes:
        embeddings: What the call returns without `return_details`.
        thoughts: Texts of the thoughts of each input, malformed ones included; [] where it did not
            think.
        thought_ids: Their token ids, end of turn left out, and what was written behind the mark
            that closes a thought: it is not embedded.
        thought_embeddings: Vectors (n, D) with each of its n thoughts alone, in the form of
            `embeddings`; the no-think vector for one that was left out.
        problems: Beside each thought None, or why it was left out ("truncated", "no_open",
            "implausible", ...).
        plausibilities: Beside each thought how plausible the judge finds it, in (0, 1]; None
            without a judge, and of a thought that was left out before.
        think_tokens: Tokens written for all thoughts of each input, end of turn not counted.
        gate_probabilities: What the gate said of each input; None where it was not asked.
        policy_probabilities: How likely the policy was to open a thought about each input; None
            where it was not asked.
        seconds: Of each input: its even share of the time of every batch it was in.
        fallbacks: Positions that were to think but have their no-think vector, for want of a
            usable thought.
        truncated: Positions whose text was cut to fit `max_seq_length`.
        errors: Position -> why it has a zero vector, with `on_bad_input="skip"`.
        cot_cache_hits: Inputs whose thoughts came from the cache on disk.
        rereads: Inputs that were read twice because `prefix_cache_gib` was full.
        timings: Seconds by part of the work, and "total".
    """

    embeddings: Any
    thoughts: list[list[str]]
    thought_ids: list[list[list[int]]]
    thought_embeddings: list[Any]
    problems: list[list[str | None]]
    plausibilities: list[list[float | None]]
    think_tokens: list[int]
    gate_probabilities: list[float | None]
    policy_probabilities: list[float | None]
    seconds: list[float]
    fallbacks: list[int] = field(default_factory=list)
    truncated: list[int] = field(default_factory=list)
    errors: dict[int, str] = field(default_factory=dict)
    cot_cache_hits: int = 0
    rereads: int = 0
    timings: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, count: int) -> EncodeDetails:
        """Return the details of `count` inputs of which nothing is known yet."""
        return cls(
            embeddings=None,
            thoughts=[[] for _ in range(count)],
            thought_ids=[[] for _ in range(count)],
            thought_embeddings=[],
            problems=[[] for _ in range(count)],
            plausibilities=[[] for _ in range(count)],
            think_tokens=[0] * count,
            gate_probabilities=[None] * count,
            policy_probabilities=[None] * count,
            seconds=[0.0] * count,
        )

    @classmethod
    def joined(cls, parts: Sequence[EncodeDetails]) -> EncodeDetails:
        """Return the details of several calls, whose vectors are arrays, as those of one call.

        Args:
            parts: Details of consecutive inputs, at least one; it may be of none.
        """
        whole = cls.of(0)
        whole.embeddings = np.concatenate([part.embeddings for part in parts])
        for part in parts:
            first = len(whole.thoughts)
            for name in _PER_INPUT:
                getattr(whole, name).extend(getattr(part, name))
            whole.fallbacks += [first + position for position in part.fallbacks]
            whole.truncated += [first + position for position in part.truncated]
            whole.errors |= {first + position: text for position, text in part.errors.items()}
            whole.cot_cache_hits += part.cot_cache_hits
            whole.rereads += part.rereads
            for name, seconds in part.timings.items():
                whole.timings[name] = whole.timings.get(name, 0.0) + seconds
        return whole

    def placed(self, places: Sequence[int]) -> EncodeDetails:
        """Return the same details of a call that had its inputs in another order.

        Args:
            places: The place in that call of each input of this one.
        """
        order = np.argsort(places)
        moved = {name: [getattr(self, name)[k] for k in order] for name in _PER_INPUT}
        return replace(
            self,
            embeddings=self.embeddings[order],
            fallbacks=sorted(places[position] for position in self.fallbacks),
            truncated=sorted(places[position] for position in self.truncated),
            errors={places[position]: text for position, text in self.errors.items()},
            **moved,
        )

    def rows(self) -> list[dict[str, Any]]:
        """Return a dict for each input: its "sentence_embedding" and its entry of each list."""
        return [
            {
                "sentence_embedding": vector,
                **{name: getattr(self, name)[position] for name in _PER_INPUT[:-1]},
            }
            for position, vector in enumerate(self.embeddings)
        ]

    @property
    def has_thought(self) -> list[bool]:
        """Whether each vector was read with at least one thought."""
        return [any(problem is None for problem in row) for row in self.problems]

    def log(self) -> None:
        """Warn once of each kind of thing that went another way than asked for."""
        problems = [problem for row in self.problems for problem in row if problem is not None]
        judged, total = problems.count(IMPLAUSIBLE), sum(len(row) for row in self.problems)
        left_out = len(problems) - judged
        if judged:
            logger.info("%d of %d thoughts were implausible and left out", judged, total)
        if left_out:
            # A gate cannot tell that it is out of its domain; what it lets be written can.
            hint = (
                "; most thoughts do: raise max_think_tokens, or, if these inputs are of another "
                'kind than those it was trained on, embed them with think="never" and fit a gate '
                "to them"
            )
            logger.warning(
                "%d of %d thoughts were truncated or malformed and left out; %d inputs keep their "
                "no-think vector%s%s",
                *(left_out, total, len(self.fallbacks), _first(self.fallbacks)),
                hint if 2 * left_out > total else "",
            )
        if self.truncated:
            logger.warning(
                "%d inputs were cut to max_seq_length%s",
                *(len(self.truncated), _first(self.truncated)),
            )
        if self.errors:
            position, problem = next(iter(sorted(self.errors.items())))
            logger.warning(
                "%d inputs were skipped and have zero vectors, first: input %d: %s",
                *(len(self.errors), position, problem),
            )
        if self.rereads:
            logger.info("%d inputs were read twice: prefix_cache_gib was full", self.rereads)


# What has an entry for each input.
_PER_INPUT = (
    "thoughts",
    "thought_ids",
    "problems",
    "plausibilities",
    "think_tokens",
    "gate_probabilities",
    "policy_probabilities",
    "seconds",
    "thought_embeddings",
)


def _first(positions: list[int]) -> str:
    """Return the first few positions as the end of a phrase, nothing if there are none.

    >>> _first([2, 0]), _first([])
    (' (positions 0, 2)', '')
    """
    if not positions:
        return ""
    more = ", ..." if len(positions) > 5 else ""
    return f" (positions {', '.join(map(str, sorted(positions)[:5]))}{more})"


class Ledger:
    """What is known of N inputs so far.

    Attributes:
        states: (N, D) float32 vectors, not normalised; zeros where nothing is known.
        thought_states: Of each input (D,) vectors with each of its thoughts alone.
        details: What happened.
        is_strict: Raise at the first bad input; otherwise note it and go on.
    """

    def __init__(self, count: int, width: int, *, is_strict: bool) -> None:
        """Start with nothing known."""
        self.states = np.zeros((count, width), np.float32)
        self.thought_states: list[list[np.ndarray]] = [[] for _ in range(count)]
        self.details = EncodeDetails.of(count)
        self.is_strict = is_strict

    def refuse(self, error: InputError) -> None:
        """Raise the error, or note it; the input's vector is then zeros."""
        if self.is_strict:
            raise error
        self.details.errors[error.position] = error.problem
        self.states[error.position] = 0.0

    def accept(self, positions: Sequence[int], states: Tensor) -> None:
        """Take over vectors (n, D); those with NaN or infinity are refused."""
        is_finite = torch.isfinite(states).all(dim=1).tolist()
        rows = states.float().cpu().numpy()
        for position, row, is_usable in zip(positions, rows, is_finite, strict=True):
            if is_usable:
                self.states[position] = row
                continue
            self.refuse(
                InputError(
                    position,
                    f"its vector holds NaN or infinity (type {states.dtype}); expected finite "
                    "numbers; load the model with dtype='float32' and check the checkpoint",
                )
            )

    def finish(self, options: EncodeOptions, *, is_single: bool, device: torch.device) -> None:
        """Put all vectors into the form asked for."""
        self.details.embeddings = in_form(self.states, options, is_single=is_single, device=device)
        if options.return_details:
            shape = (-1, self.states.shape[1])
            self.details.thought_embeddings = [
                in_form(np.array(rows, np.float32).reshape(shape), options, device=device)
                for rows in self.thought_states
            ]


@contextmanager
def timed(part: str, positions: Sequence[int], ledgers: Sequence[Ledger]) -> Iterator[None]:
    """Charge the seconds of the body to a part of the work, and in even shares to some inputs."""
    started = time.perf_counter()
    try:
        yield
    finally:
        seconds = time.perf_counter() - started
        for ledger in ledgers:
            details = ledger.details
            details.timings[part] = details.timings.get(part, 0.0) + seconds
            for position in positions:
                details.seconds[position] += seconds / len(positions)
