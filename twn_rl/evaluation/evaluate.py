"""Runs a model over records under every mode and ranks the positives.

Runs in one process: give it an unwrapped model, and call it on the main process only.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Record, hop_of, task_of
from twn_rl.evaluation.modes import (
    ABLATIONS,
    BORROWING_MODES,
    CHOOSING_MODES,
    MODES,
    NO_THOUGHT,
    THINKING_TARGETS,
    WORDLESS_MODES,
    Thought,
    borrowed_thoughts,
    choose,
    gold_thoughts,
    truncated_thoughts,
    written_thoughts,
)
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.evaluation.retrieval_pools import CandidateScope, collect_candidates, describe_item
from twn_rl.inference.details import EncodeDetails
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions, ThinkMode
from twn_rl.metrics.ranking import TIE_TOLERANCE, positive_ranks, sampled_collapse
from twn_rl.modeling.config import ThinkingDecision
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.problems import Problems

logger = logging.getLogger(__name__)

NEAREST = 5
_PLAIN_MODES: tuple[ThinkMode, ...] = ("never", "latent", "always")
# Who decides -> in which modes, first the one that does what it says.
_DECIDERS: dict[ThinkingDecision, tuple[str, ...]] = {
    "gate": ("auto", "random"),
    "policy": ("policy",),
}


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
        problems.unless(
            self.modes and set(self.modes) <= set(known),
            f"modes = {self.modes}, expected some of {known}",
        )
        problems.unless(
            self.candidates in ("pool", "local"),
            f"candidates = {self.candidates!r}, expected 'pool' or 'local'",
        )
        problems.expect(self, ">= 1", "batch_size", "num_thoughts")
        problems.expect(self, "None or in [0, 1]", "gate_threshold", "policy_threshold")
        problems.unless(
            self.split and "/" not in self.split,
            f"split = {self.split!r}, expected a name without '/'",
        )
        problems.refuse("EvaluationSettings")


def evaluate(
    model: DualLoraModel,
    records: Sequence[Record],
    settings: EvaluationSettings | None = None,
) -> Evaluation:
    """Return how well `model` retrieves each record's positive under every mode.

    Args:
        model: Unwrapped model; its training mode is restored afterwards.
        records: A `RecordSet`, or a list of records whose picture paths are absolute.
        settings: What to measure; defaults if None.

    Raises:
        ValueError: For no records, an item that cannot be embedded, mode "auto" without gate or
            threshold, mode "latent" without reason tokens, or mode "policy" of a model whose
            policy does not decide.
    """
    settings = settings or EvaluationSettings()
    if not len(records):
        raise ValueError("records is empty; expected at least one; check the file and its filters")
    return _Run(ThinkingEmbedder(model), list(records), settings).run()


@dataclass(frozen=True)
class _Queries:
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
    def of(cls, details: EncodeDetails, given: Sequence[Thought | None] | None) -> "_Queries":
        """Return what an embedder says, with the thoughts it was given or else wrote."""
        if given is None:
            return cls(written_thoughts(details), details.thought_embeddings, details.seconds)
        thoughts = [[] if thought is None else [thought] for thought in given]
        return cls(thoughts, list(np.asarray(details.embeddings)[:, None]), details.seconds)

    def used(self) -> NDArray[Any]:
        """Return all vectors (n, D) of queries that are not left out."""
        pairs = zip(self.embeds, self.thoughts, strict=True)
        return np.concatenate([embeds for embeds, thoughts in pairs if thoughts])


class _Run:
    """One evaluation: targets are embedded once, queries are read once, at most twice."""

    def __init__(
        self, embedder: ThinkingEmbedder, records: list[Record], settings: EvaluationSettings
    ) -> None:
        self.embedder, self.records, self.settings = embedder, records, settings
        config = embedder.model.config
        own = {"gate": settings.gate_threshold, "policy": settings.policy_threshold}
        stored = {"gate": config.gate_threshold, "policy": config.policy_threshold}
        self.thresholds: dict[ThinkingDecision, float] = {}
        for decider, deciding in _DECIDERS.items():
            if not set(settings.modes) & set(deciding):
                continue
            threshold = stored[decider] if own[decider] is None else own[decider]
            if threshold is None:
                raise ValueError(
                    f"modes = {settings.modes} without a threshold; expected a model with a fitted "
                    f"{decider}; fit one with recipes/gate_embed.py, pass gate_threshold, or drop "
                    "the modes auto and random"
                )
            self.thresholds[decider] = threshold
        self.candidates = collect_candidates(records, scope=settings.candidates)
        self.queries: dict[str, _Queries] = {}
        self.asked: dict[str, EncodeDetails] = {}  # "gate", "policy" -> what it says
        self.metrics: dict[str, float] = {}  # those that are not of rows

    def run(self) -> Evaluation:
        settings, asked = self.settings, set(self.settings.modes)
        to_thinking = asked & set(THINKING_TARGETS)
        measured = asked & {*_PLAIN_MODES, "sampled", *ABLATIONS}
        measured |= {"never", "always"} if asked & set(CHOOSING_MODES) else set()
        measured |= {THINKING_TARGETS[mode] for mode in to_thinking}
        measured |= {"sampled"} if "averaged" in asked else set()
        self._embed_queries(measured)
        targets = self._embed_targets("targets", "never")
        rows = {mode: self._rank_all(targets, mode) for mode in measured}
        if asked & set(CHOOSING_MODES):
            rows |= self._choose_all(rows["never"], rows["always"])
        if "averaged" in asked:
            rows["averaged"] = self._average(targets)
        if to_thinking:
            targets = self._embed_targets("thinking_targets", "always")
            for mode in to_thinking:
                rows[mode] = self._rank_all(targets, THINKING_TARGETS[mode], label=mode)
        if "always" in measured:
            self._compare_with_own(measured - {"always", "sampled"})
        for decider, threshold in self.thresholds.items():
            if (mode := _DECIDERS[decider][0]) in asked:
                self.metrics[f"{settings.split}/all/{mode}/{decider}_threshold"] = threshold
        found = [row for mode in settings.modes for row in rows[mode]]
        metrics = summarize(
            found, split=settings.split, confidence=settings.confidence, seed=settings.seed
        )
        return Evaluation(metrics | self.metrics, found, self.candidates.describe())

    def _options(self, title: str) -> EncodeOptions:
        settings = self.settings
        return EncodeOptions(
            batch_size=settings.batch_size,
            max_think_tokens=settings.max_think_tokens,
            show_progress_bar=settings.show_progress_bar and f"{settings.split}: {title}",
        )

    def _embed_queries(self, measured: set[str]) -> None:
        """Embed all queries; thoughts made of own ones need these first and a second reading."""
        records, seed = self.records, self.settings.seed
        borrowing = measured & set(BORROWING_MODES)
        given: dict[str, Sequence[Thought | None]] = dict.fromkeys(
            WORDLESS_MODES, [NO_THOUGHT] * len(records)
        )
        given |= {"gold": gold_thoughts(records), "empty": [Thought("")] * len(records)}
        first = measured - borrowing | ({"always"} if borrowing else set())
        self._embed([mode for mode in (*MODES, *ABLATIONS) if mode in first], given)
        if borrowing:
            own = [thoughts[0] for thoughts in self.queries["always"].thoughts]
            given = {
                "shuffled": borrowed_thoughts(records, own, is_same_group=True, seed=seed),
                "foreign": borrowed_thoughts(records, own, is_same_group=False, seed=seed),
                "truncated": truncated_thoughts(own),
            }
            self._embed(sorted(borrowing), given)

    def _embed(self, chosen: Sequence[str], given: Mapping[str, Sequence[Thought | None]]) -> None:
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
        for decider in self.thresholds if "never" in chosen else ():
            # A threshold of 1 asks about everything and lets nothing be thought about.
            asking = replace(options, think="auto", think_decision=decider, think_threshold=1.0)
            ways[decider] = asking
        with _named([f"query of record {record.id!r}" for record in self.records]):
            found = self.embedder.encode_ways([record.query for record in self.records], ways)
        self.asked |= {decider: found[decider] for decider in self.thresholds if decider in found}
        for mode in chosen:
            self.queries[mode] = queries = _Queries.of(found[mode], given.get(mode))
            if any(queries.thoughts):
                self._note_collapse(f"query_{mode}", queries.used())
            else:
                logger.warning("mode %r has no query with a thought to embed: left out", mode)

    def _embed_targets(self, name: str, think: ThinkMode) -> NDArray[Any]:
        """Return unit vectors (M, D) of all candidates."""
        options = replace(self._options(name.replace("_", " ")), think=think)
        with _named([f"target {key}" for key in self.candidates.keys]):
            items = self.candidates.items
            found = self.embedder.encode_ways(items, {name: options}, side="document")
        self._note_collapse(name, found[name].embeddings)
        return found[name].embeddings

    def _note_collapse(self, name: str, embeds: NDArray[Any]) -> None:
        start = f"{self.settings.split}/collapse/{name}"
        report = sampled_collapse(embeds)
        self.metrics |= {f"{start}/{metric}": value for metric, value in report.items()}

    def _compare_with_own(self, others: set[str]) -> None:
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

    def _rank_all(
        self, targets: NDArray[Any], mode: str, *, label: str | None = None
    ) -> list[dict[str, Any]]:
        """Return a row per record with a thought, labelled with the mode or `label`."""
        queries = self.queries[mode]
        rows = enumerate(zip(queries.thoughts, queries.embeds, queries.seconds, strict=True))
        return [
            {
                **self._row(targets, index, thoughts, embeds),
                "mode": label or mode,
                "think_rate": float(mode not in WORDLESS_MODES),
                "seconds": seconds,
            }
            for index, (thoughts, embeds, seconds) in rows
            if thoughts
        ]

    def _average(self, targets: NDArray[Any]) -> list[dict[str, Any]]:
        """Return rows of the mean vectors of the first 1, 2, ... sampled thoughts.

        As in serving, thoughts that are no thoughts are left out of the mean.
        """
        rows, sampled = [], self.queries["sampled"]
        for count in range(1, self.settings.num_thoughts + 1):
            pairs = enumerate(zip(sampled.thoughts, sampled.embeds, strict=True))
            for index, (thoughts, embeds) in pairs:
                first = thoughts[:count]
                usable = [thought.problem is None for thought in first]
                mean = (embeds[:count][usable] if any(usable) else embeds[:1]).mean(axis=0)
                row = self._row(targets, index, first, (mean / np.linalg.norm(mean))[None])
                row |= {
                    "mode": f"averaged{count}",
                    "think_tokens": [sum(row["think_tokens"])],
                    "problems": row["problems"][:1],
                    "think_rate": 1.0,
                }
                rows.append(row)
        return rows

    def _row(
        self,
        targets: NDArray[Any],
        index: int,
        thoughts: Sequence[Thought],
        embeds: NDArray[Any],
    ) -> dict[str, Any]:
        record = self.records[index]
        ranked = [self._rank(targets, index, embed) for embed in embeds]
        return {
            "split": self.settings.split,
            "id": record.id,
            "task": task_of(record),
            "hop": hop_of(record),
            "mode": "",
            "ranks": [rank for rank, _ in ranked],
            "cot": thoughts[0].text,
            "think_tokens": [thought.think_tokens for thought in thoughts],
            "problems": [thought.problem for thought in thoughts],
            "nearest": ranked[0][1],
            "positive": self.candidates.keys[self.candidates.positive[index]],
            "query": describe_item(record.query),
        }

    def _rank(
        self, targets: NDArray[Any], index: int, embed: NDArray[Any]
    ) -> tuple[int, list[str]]:
        """Return the rank of a record's positive, and the keys of the nearest candidates."""
        columns = np.asarray(self.candidates.competing(index))
        scores = targets[columns] @ embed  # (M of the pool,)
        is_positive = columns == self.candidates.positive[index]
        rank = positive_ranks(scores[None], [int(is_positive.argmax())])[0]
        # The positive sorts last among equals, so that the list agrees with the rank.
        order = np.lexsort((is_positive, TIE_TOLERANCE * is_positive - scores))[:NEAREST]
        return int(rank), [self.candidates.keys[column] for column in columns[order]]

    def _choose_all(
        self, never: list[dict[str, Any]], always: list[dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of modes that choose between never and always."""
        pairs = list(zip(never, always, strict=True))
        rows = {"oracle": [choose("oracle", n, a, a["ranks"][0] < n["ranks"][0]) for n, a in pairs]}
        for decider, threshold in self.thresholds.items():
            asked = self.asked[decider]
            said = asked.gate_probabilities if decider == "gate" else asked.policy_probabilities
            chances = [chance for chance in said if chance is not None]
            thinks = [chance > threshold for chance in chances]
            waits = [t - row["seconds"] for t, row in zip(asked.seconds, never, strict=True)]
            mode = _DECIDERS[decider][0]
            rows[mode] = [
                choose(mode, *pair, think, probability=chance, **{f"{decider}_seconds": wait})
                for pair, think, chance, wait in zip(pairs, thinks, chances, waits, strict=True)
            ]
            if decider == "gate":
                rate = sum(thinks) / len(thinks)
                rows["random"] = [choose("random", *pair, rate) for pair in pairs]
        return rows


@contextmanager
def _named(names: Sequence[str]) -> Iterator[None]:
    """Name what an input is that cannot be embedded."""
    try:
        yield
    except InputError as error:
        raise ValueError(f"{names[error.position]}: {error.problem}") from error
