"""Runs a model over records under every mode and ranks the positives."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Record, hop_of, task_of
from twn_rl.evaluation.mode_vectors import EvaluationSettings, ModeVectors
from twn_rl.evaluation.modes import (
    ABLATIONS,
    CHOOSING_MODES,
    THINKING_TARGETS,
    WORDLESS_MODES,
    Thought,
    choose,
    judge,
)
from twn_rl.evaluation.pool_ranking import rank_in_pools
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.evaluation.retrieval_pools import collect_candidates, describe_item
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import ThinkMode
from twn_rl.modeling.config import ThinkingDecision
from twn_rl.modeling.gate import QUERY_SIDE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import Processes

__all__ = ["EvaluationSettings", "evaluate"]

NEAREST = 5
# Who decides -> in which modes, first the one that does what it says.
_DECIDERS: dict[ThinkingDecision, tuple[str, ...]] = {
    "gate": ("auto", "auto_better", "random"),
    "policy": ("policy",),
}


def evaluate(
    model: DualLoraModel,
    records: Sequence[Record],
    settings: EvaluationSettings | None = None,
    *,
    processes: Processes | None = None,
) -> Evaluation:
    """Return how well `model` retrieves each record's positive under every mode.

    Args:
        model: Unwrapped model; its training mode is restored afterwards.
        records: A `RecordSet`, or a list of records whose picture paths are absolute.
        settings: What to measure; defaults if None.
        processes: Those that share the embedding: each of them must call this, with equal records
            and settings, and all get the result. None embeds everything here.

    Raises:
        RuntimeError: If another process failed.
        ValueError: For no records, an item that cannot be embedded, mode "auto" without gate or
            threshold, mode "auto_better" without judge, mode "latent" without reason
            tokens, or mode "policy" of a model whose policy does not decide.
    """
    settings = settings or EvaluationSettings()
    if not len(records):
        raise ValueError("records is empty; expected at least one; check the file and its filters")
    return _Run(ThinkingEmbedder(model), list(records), settings, processes).run()


class _Run:
    """One evaluation: targets are embedded once, queries are read once, at most twice."""

    def __init__(
        self,
        embedder: ThinkingEmbedder,
        records: list[Record],
        settings: EvaluationSettings,
        processes: Processes | None,
    ) -> None:
        self.records, self.settings = records, settings
        self.vectors = ModeVectors(embedder, records, settings, processes)
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
        self.judge = embedder.model.judge(QUERY_SIDE)
        if self.judge is None and "auto_better" in settings.modes:
            raise ValueError(
                f"modes = {settings.modes} without a judge; expected a gate that was fitted with "
                "one; fit it with recipes/gate_embed.py, or drop the mode auto_better"
            )
        self.candidates = collect_candidates(records, scope=settings.candidates)

    def run(self) -> Evaluation:
        settings, asked = self.settings, set(self.settings.modes)
        to_thinking = asked & set(THINKING_TARGETS)
        measured = asked & {*WORDLESS_MODES, "always", "sampled", *ABLATIONS}
        measured |= {"never", "always"} if asked & set(CHOOSING_MODES) else set()
        measured |= {THINKING_TARGETS[mode] for mode in to_thinking}
        measured |= {"sampled"} if "averaged" in asked else set()
        self.vectors.embed_queries(measured, list(self.thresholds))
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
            self.vectors.compare_with_own(measured - {"always", "sampled"})
        metrics = dict(self.vectors.metrics)
        for decider, threshold in self.thresholds.items():
            if (mode := _DECIDERS[decider][0]) in asked:
                metrics[f"{settings.split}/all/{mode}/{decider}_threshold"] = threshold
        found = [row for mode in settings.modes for row in rows[mode]]
        summary = summarize(
            found, split=settings.split, confidence=settings.confidence, seed=settings.seed
        )
        return Evaluation(summary | metrics, found, self.candidates.describe())

    def _embed_targets(self, name: str, think: ThinkMode) -> NDArray[Any]:
        return self.vectors.embed_targets(self.candidates.items, self.candidates.keys, name, think)

    def _rank_all(
        self, targets: NDArray[Any], mode: str, *, label: str | None = None
    ) -> list[dict[str, Any]]:
        """Return a row per record with a thought, labelled with the mode or `label`."""
        queries = self.vectors.queries[mode]
        indices = [index for index, thoughts in enumerate(queries.thoughts) if thoughts]
        rows = self._rows(
            targets,
            indices,
            [queries.thoughts[index] for index in indices],
            [queries.embeds[index] for index in indices],
        )
        own = {"mode": label or mode, "think_rate": float(mode not in WORDLESS_MODES)}
        seconds = [queries.seconds[index] for index in indices]
        return [{**row, **own, "seconds": spent} for row, spent in zip(rows, seconds, strict=True)]

    def _average(self, targets: NDArray[Any]) -> list[dict[str, Any]]:
        """Return rows of the mean vectors of the first 1, 2, ... sampled thoughts.

        As in serving, thoughts that are no thoughts are left out of the mean.
        """
        found, sampled = [], self.vectors.queries["sampled"]
        for count in range(1, self.settings.num_thoughts + 1):
            first = [thoughts[:count] for thoughts in sampled.thoughts]
            means = []
            for thoughts, embeds in zip(first, sampled.embeds, strict=True):
                usable = [thought.problem is None for thought in thoughts]
                mean = (embeds[:count][usable] if any(usable) else embeds[:1]).mean(axis=0)
                means.append((mean / np.linalg.norm(mean))[None])
            for row in self._rows(targets, range(len(first)), first, means):
                row |= {
                    "mode": f"averaged{count}",
                    "think_tokens": [sum(row["think_tokens"])],
                    "problems": row["problems"][:1],
                    "think_rate": 1.0,
                }
                found.append(row)
        return found

    def _rows(
        self,
        targets: NDArray[Any],
        indices: Sequence[int],
        thoughts: Sequence[Sequence[Thought]],
        embeds: Sequence[NDArray[Any]],
    ) -> list[dict[str, Any]]:
        """Return the rows of some records with the vectors (thoughts, D) of each."""
        if not indices:
            return []
        counts = [len(each) for each in embeds]
        ranks, nearest = rank_in_pools(
            self.candidates,
            targets,
            [index for index, count in zip(indices, counts, strict=True) for _ in range(count)],
            np.concatenate(embeds),
            num_nearest=NEAREST,
        )
        ends = np.cumsum(counts).tolist()
        spans = [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]
        return [
            self._row(index, own, ranks[span].tolist(), nearest[span.start])
            for index, own, span in zip(indices, thoughts, spans, strict=True)
        ]

    def _row(
        self, index: int, thoughts: Sequence[Thought], ranks: list[int], nearest: list[int]
    ) -> dict[str, Any]:
        record, keys = self.records[index], self.candidates.keys
        return {
            "split": self.settings.split,
            "id": record.id,
            "task": task_of(record),
            "hop": hop_of(record),
            "mode": "",
            "ranks": ranks,
            "cot": thoughts[0].text,
            "think_tokens": [thought.think_tokens for thought in thoughts],
            "problems": [thought.problem for thought in thoughts],
            "nearest": [keys[row] for row in nearest],
            "positive": keys[self.candidates.positive[index]],
            "query": describe_item(record.query),
        }

    def _choose_all(
        self, never: list[dict[str, Any]], always: list[dict[str, Any]]
    ) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of modes that choose between never and always."""
        pairs = list(zip(never, always, strict=True))
        rows = {"oracle": [choose("oracle", n, a, a["ranks"][0] < n["ranks"][0]) for n, a in pairs]}
        for decider, threshold in self.thresholds.items():
            asked = self.vectors.asked[decider]
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
                rows["auto_better"] = self._judge_all(rows["auto"], never)
                rows["random"] = [choose("random", *pair, rate) for pair in pairs]
        return rows

    def _judge_all(
        self, auto: list[dict[str, Any]], never: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the rows of the gate's decisions once the judge has seen the thoughts."""
        if self.judge is None:
            return []
        said = [thoughts[0].plausibility for thoughts in self.vectors.queries["always"].thoughts]
        is_refused = [chance is not None and not self.judge.keeps(chance) for chance in said]
        rows = zip(auto, never, is_refused, strict=True)
        return [judge(decided, without, is_refused=refused) for decided, without, refused in rows]
