"""Queries and targets -> unit vectors under every mode, read once by the public embedder."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Item, Record
from twn_rl.evaluation.modes import (
    ABLATIONS,
    BORROWING_MODES,
    MODES,
    NO_THOUGHT,
    WORDLESS_MODES,
    Thought,
    borrowed_thoughts,
    gold_thoughts,
    truncated_thoughts,
    written_thoughts,
)
from twn_rl.evaluation.retrieval_pools import CandidateScope
from twn_rl.inference.dealt_inputs import encode_dealt
from twn_rl.inference.details import EncodeDetails
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions, Side, ThinkMode
from twn_rl.metrics.ranking import sampled_collapse
from twn_rl.modeling.config import ThinkingDecision
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import Processes, is_main

logger = logging.getLogger(__name__)

_PLAIN_MODES: tuple[ThinkMode, ...] = ("never", "latent", "always")


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure.

    Attributes:
        split: First part of every metric key.
        modes: Any of `MODES` and `ABLATIONS`.
        candidates: "pool" or "local"; see `collect_candidates`.
        batch_size: Queries or targets a forward.
        max_think_tokens: Budget of one thought; None takes the model's.
        num_thoughts: Sampled thoughts a query, in modes "sampled" and "averaged".
        temperature: Of sampling.
        gate_threshold: Probability above which mode "auto" thinks; None takes the model's.
        policy_threshold: The same of mode "policy".
        confidence: Of the bootstrap intervals.
        seed: Decides sampled and borrowed thoughts and the bootstrap.
        show_progress_bar: Whether to draw progress bars.
    """

    split: str = "test"
    modes: tuple[str, ...] = ("never", "always", "oracle")
    candidates: CandidateScope = "pool"
    batch_size: int = 32
    max_think_tokens: int | None = None
    num_thoughts: int = 4
    temperature: float = 1.0
    gate_threshold: float | None = None
    policy_threshold: float | None = None
    confidence: float = 0.95
    seed: int = 0
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems, known = Problems(), (*MODES, *ABLATIONS)
        problems.some_of(self, known, "modes")
        problems.one_of(self, ("pool", "local"), "candidates")
        problems.expect(self, ">= 1", "batch_size", "num_thoughts")
        problems.expect(self, "None or in [0, 1]", "gate_threshold", "policy_threshold")
        problems.unless(
            self.split and "/" not in self.split,
            f"split = {self.split!r}, expected a name without '/'",
        )
        problems.refuse("EvaluationSettings")


@dataclass(frozen=True)
class Queries:
    """All queries under one mode; lists have an entry per record.

    Attributes:
        thoughts: What they were embedded with; [] leaves a query out.
        embeds: (thoughts, D) unit vectors.
        seconds: What that took.
    """

    thoughts: list[list[Thought]]
    embeds: list[NDArray[Any]]
    seconds: list[float]

    @classmethod
    def of(cls, details: EncodeDetails, given: Sequence[Thought | None] | None) -> "Queries":
        """Return what an embedder says, with the thoughts it was given or else wrote."""
        if given is None:
            return cls(written_thoughts(details), details.thought_embeddings, details.seconds)
        thoughts = [[] if thought is None else [thought] for thought in given]
        return cls(thoughts, list(np.asarray(details.embeddings)[:, None]), details.seconds)

    def used(self) -> NDArray[Any]:
        """Return all vectors (n, D) of queries that are not left out."""
        pairs = zip(self.embeds, self.thoughts, strict=True)
        return np.concatenate([embeds for embeds, thoughts in pairs if thoughts])


class ModeVectors:
    """The vectors of one evaluation: queries are read once, at most twice, targets once a mode.

    Attributes:
        queries: Mode -> all queries under it.
        asked: "gate", "policy" -> what it says of each query.
        metrics: Flat metrics of the vectors themselves.
    """

    def __init__(
        self,
        embedder: ThinkingEmbedder,
        records: list[Record],
        settings: EvaluationSettings,
        processes: Processes | None = None,
    ) -> None:
        self.embedder, self.records, self.settings = embedder, records, settings
        self.processes = processes
        self.queries: dict[str, Queries] = {}
        self.asked: dict[ThinkingDecision, EncodeDetails] = {}
        self.metrics: dict[str, float] = {}

    def embed_queries(self, measured: set[str], deciders: Sequence[ThinkingDecision]) -> None:
        """Embed all queries; thoughts made of own ones need these first and a second reading.

        Args:
            measured: Plain modes, "sampled" and ablations.
            deciders: Whom to ask about each query.
        """
        records, seed = self.records, self.settings.seed
        borrowing = measured & set(BORROWING_MODES)
        given: dict[str, Sequence[Thought | None]] = dict.fromkeys(
            WORDLESS_MODES, [NO_THOUGHT] * len(records)
        )
        given |= {"gold": gold_thoughts(records), "empty": [Thought("")] * len(records)}
        first = measured - borrowing | ({"always"} if borrowing else set())
        self._embed([mode for mode in (*MODES, *ABLATIONS) if mode in first], given, deciders)
        if borrowing:
            own = [thoughts[0] for thoughts in self.queries["always"].thoughts]
            given = {
                "shuffled": borrowed_thoughts(records, own, is_same_group=True, seed=seed),
                "foreign": borrowed_thoughts(records, own, is_same_group=False, seed=seed),
                "truncated": truncated_thoughts(own),
            }
            self._embed(sorted(borrowing), given, ())

    def embed_targets(
        self, items: Sequence[Item], keys: Sequence[str], name: str, think: ThinkMode
    ) -> NDArray[Any]:
        """Return unit vectors (M, D) of all targets."""
        options = replace(self._options(name.replace("_", " ")), think=think)
        with _named([f"target {key}" for key in keys]):
            found = self._encode(items, {name: options}, side="document")
        self._note_collapse(name, found[name].embeddings)
        return found[name].embeddings

    def compare_with_own(self, others: set[str]) -> None:
        """Note mean and spread of the cosine between vectors with the own and another thought.

        A model whose vectors ignore their thoughts has means near 1 and no spread.
        """
        for mode in sorted(others):
            other = self.queries[mode]
            rows = zip(self.queries["always"].embeds, other.embeds, other.thoughts, strict=True)
            cosines = [float(own[0] @ embeds[0]) for own, embeds, thoughts in rows if thoughts]
            if cosines:
                name = f"{self.settings.split}/collapse/own_to_{mode}"
                self.metrics[f"{name}/cosine_mean"] = float(np.mean(cosines))
                self.metrics[f"{name}/cosine_std"] = float(np.std(cosines))

    def _options(self, title: str) -> EncodeOptions:
        settings = self.settings
        return EncodeOptions(
            batch_size=settings.batch_size,
            max_think_tokens=settings.max_think_tokens,
            show_progress_bar=(
                settings.show_progress_bar
                and is_main(self.processes)
                and f"{settings.split}: {title}"
            ),
        )

    def _encode(
        self, items: Sequence[Item], ways: Mapping[str, EncodeOptions], *, side: Side = "query"
    ) -> dict[str, EncodeDetails]:
        return encode_dealt(self.embedder, items, ways, side=side, processes=self.processes)

    def _embed(
        self,
        chosen: Sequence[str],
        given: Mapping[str, Sequence[Thought | None]],
        deciders: Sequence[ThinkingDecision],
    ) -> None:
        """Read every query once and embed it under every chosen mode."""
        settings, options = self.settings, self._options("queries: " + ", ".join(chosen))
        ways = {mode: replace(options, think=mode) for mode in _PLAIN_MODES if mode in chosen}
        if "sampled" in chosen:
            ways["sampled"] = replace(
                options,
                think="always",
                do_sample=True,
                temperature=settings.temperature,
                num_thoughts=settings.num_thoughts,
                seed=[settings.seed * 1_000_003 + row for row in range(len(self.records))],
            )
        for mode in set(chosen) & set(ABLATIONS):
            ways[mode] = replace(options, think=[t and t.content for t in given[mode]])
        for decider in deciders:
            # A threshold of 1 asks about everything and lets nothing be thought about.
            asking = replace(options, think="auto", think_decision=decider, think_threshold=1.0)
            ways[decider] = asking
        with _named([f"query of record {record.id!r}" for record in self.records]):
            found = self._encode([record.query for record in self.records], ways)
        self.asked |= {decider: found[decider] for decider in deciders}
        for mode in chosen:
            self.queries[mode] = queries = Queries.of(found[mode], given.get(mode))
            if any(queries.thoughts):
                self._note_collapse(f"query_{mode}", queries.used())
            elif is_main(self.processes):
                logger.warning("mode %r has no query with a thought to embed: left out", mode)

    def _note_collapse(self, name: str, embeds: NDArray[Any]) -> None:
        start = f"{self.settings.split}/collapse/{name}"
        report = sampled_collapse(embeds)
        self.metrics |= {f"{start}/{metric}": value for metric, value in report.items()}


@contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """Name what an input is that cannot be embedded."""
    try:
        yield
    except InputError as error:
        raise ValueError(f"{names[error.position]}: {error.problem}") from error
