"""Runs a model over records under every mode and ranks the positives; knows no training.

Runs in one process: give it an unwrapped model, and call it on the main process only.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import normalize

from twn_rl.data.record import Record
from twn_rl.evaluation import modes
from twn_rl.evaluation.modes import (
    CHOOSING_MODES,
    THINKING_TARGETS,
    WORDLESS_MODES,
    Thought,
    hop_of,
    task_of,
)
from twn_rl.evaluation.queries import (
    EvaluationSettings,
    Gate,
    Queries,
    batches,
    check_embeds,
    item_size,
)
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.evaluation.retrieval_pools import Candidates, collect_candidates, describe_item
from twn_rl.metrics.ranking import TIE_TOLERANCE, positive_ranks
from twn_rl.modeling import gate as gate_network
from twn_rl.modeling.model import DualLoraModel

__all__ = ["EvaluationSettings", "Gate", "evaluate"]

NEAREST = 5


def evaluate(
    model: DualLoraModel,
    records: Sequence[Record],
    settings: EvaluationSettings | None = None,
    *,
    data_root: str | Path | None = None,
    gate: Gate | None = None,
) -> Evaluation:
    """Return how well `model` retrieves each record's positive under every mode.

    Args:
        model: Unwrapped model; its training mode is restored afterwards.
        records: A `RecordSet` or a list of records.
        settings: What to measure; defaults if None.
        data_root: Folder of relative picture paths; a `RecordSet` hands out absolute ones.
        gate: For modes "auto" and "random"; the model's own query gate if None.

    Raises:
        ValueError: For no records, non-finite vectors, mode "auto" without gate or threshold, or
            mode "latent" without reason tokens, or mode "policy" of a model whose policy does not
            decide.
    """
    settings = settings or EvaluationSettings()
    if not len(records):
        raise ValueError("records is empty; expected at least one; check the file and its filters")
    if gate is None and gate_network.QUERY_SIDE in model.gates:
        gate = cast(gate_network.Gate, model.gates[gate_network.QUERY_SIDE]).probability
    threshold = settings.gate_threshold
    threshold = model.config.gate_threshold if threshold is None else threshold
    if {"auto", "random"} & set(settings.modes) and (gate is None or threshold is None):
        missing = "gate" if gate is None else "threshold"
        raise ValueError(
            f"modes = {settings.modes} without a {missing}; expected a model with a routing gate; "
            "fit one with recipes/gate_embed.py or drop the modes auto and random"
        )
    if "latent" in settings.modes and not model.reason_ids:
        raise ValueError(
            f"modes = {settings.modes} with num_reason_tokens = 0; expected a model with reason "
            "tokens; train one with recipes/latent_embed.py or drop the mode latent"
        )
    if "policy" in settings.modes and not model.is_policy_deciding:
        raise ValueError(
            f"modes = {settings.modes} with thinking_decision = "
            f"{model.config.thinking_decision!r}; expected a policy that learned to decide; train "
            "one with recipes/adaptive_embed.py or drop the mode policy"
        )
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _Run(model, list(records), settings, data_root, gate, threshold).run()
    finally:
        model.train(was_training)


class _Run:
    """One evaluation: targets are embedded once, queries are read once, at most twice."""

    def __init__(
        self,
        model: DualLoraModel,
        records: list[Record],
        settings: EvaluationSettings,
        data_root: str | Path | None,
        gate: Gate | None,
        threshold: float | None,
    ) -> None:
        self.model, self.records, self.settings = model, records, settings
        self.data_root, self.threshold = data_root, threshold
        own = settings.policy_threshold
        self.policy_threshold = model.config.policy_threshold if own is None else own
        self.candidates: Candidates = collect_candidates(
            records, scope=settings.candidates, data_root=data_root
        )
        self.queries = Queries(model, records, settings, data_root, gate)
        self.rows: dict[str, list[dict[str, Any] | None]] = {}  # mode -> a row per record

    def run(self) -> Evaluation:
        settings, asked = self.settings, set(self.settings.modes)
        self.targets, collapse = self._embed_targets()
        chosen, to_thinking = asked & set(CHOOSING_MODES), asked & set(THINKING_TARGETS)
        measured = asked - chosen - to_thinking - {"averaged"}
        measured |= {"never", "always"} if chosen else set()
        measured |= {THINKING_TARGETS[mode] for mode in to_thinking}
        measured |= {"sampled"} if "averaged" in asked else set()
        self.queries.embed(measured)
        for mode in measured:
            self.rows[mode] = self._rank_all(mode, self.queries.embeds[mode])
        if chosen:
            self._choose_all(chosen)
        if "averaged" in asked:
            self.rows["averaged"] = self._average()
        if to_thinking:
            self.targets, report = self._embed_targets(is_thinking=True)
            collapse |= report
            for mode in to_thinking:
                own = THINKING_TARGETS[mode]
                self.rows[mode] = self._rank_all(own, self.queries.embeds[own], label=mode)
        rows = [row for mode in settings.modes for row in self.rows[mode] if row is not None]
        metrics = summarize(
            rows, split=settings.split, confidence=settings.confidence, seed=settings.seed
        )
        metrics |= collapse | self.queries.collapse
        if "always" in measured:
            metrics |= self._cosine_metrics(measured - {"always", "sampled"})
        if "auto" in asked and self.threshold is not None:
            metrics[f"{settings.split}/all/auto/gate_threshold"] = self.threshold
        if "policy" in asked:
            metrics[f"{settings.split}/all/policy/policy_threshold"] = self.policy_threshold
        return Evaluation(metrics, rows, self.candidates.describe())

    def _cosine_metrics(self, measured: set[str]) -> dict[str, float]:
        """Return mean and spread of the cosine between vectors with the own and another thought.

        A model whose vectors ignore their thoughts has means near 1 and no spread.
        """
        metrics = {}
        for mode in sorted(measured):
            cosines = self.queries.cosines(mode)
            if len(cosines):
                name = f"{self.settings.split}/collapse/own_to_{mode}"
                metrics[f"{name}/cosine_mean"] = float(cosines.mean())
                metrics[f"{name}/cosine_std"] = float(cosines.std())
        return metrics

    def _rank_all(
        self, mode: str, embeds: Sequence[NDArray[Any]], *, label: str | None = None
    ) -> list[dict[str, Any] | None]:
        """Return a row per record: the ranks of its vectors, labelled with the mode or `label`."""
        thoughts = self.queries.thoughts[mode]
        rows = [
            self._row(mode, index, thoughts[index], embeds[index]) if thoughts[index] else None
            for index in range(len(self.records))
        ]
        return [None if row is None else {**row, "mode": label or mode} for row in rows]

    def _average(self) -> list[dict[str, Any] | None]:
        """Return rows of the mean vectors of the first 1, 2, ... sampled thoughts.

        As in serving, thoughts that are no thoughts are left out of the mean.
        """
        rows: list[dict[str, Any] | None] = []
        for count in range(1, self.settings.num_thoughts + 1):
            means = []
            for thoughts, embeds in zip(
                self.queries.thoughts["sampled"], self.queries.embeds["sampled"], strict=True
            ):
                usable = [t.completion is not None for t in thoughts[:count]]
                first = embeds[:count]
                mean = (first[usable] if any(usable) else first[:1]).mean(axis=0)
                means.append((mean / np.linalg.norm(mean))[None])
            for row in self._rank_all("sampled", means, label=f"averaged{count}"):
                if row is not None:
                    tokens = sum(row["think_tokens"][:count])
                    del row["seconds"]  # those of all thoughts
                    row |= {"think_tokens": [tokens], "problems": [row["problems"][0]]}
                rows.append(row)
        return rows

    def _row(
        self, mode: str, index: int, thoughts: Sequence[Thought], embeds: NDArray[Any]
    ) -> dict[str, Any]:
        record = self.records[index]
        ranked = [self._rank(index, embed) for embed in embeds]
        return {
            "split": self.settings.split,
            "id": record.id,
            "task": task_of(record),
            "hop": hop_of(record),
            "mode": mode,
            "ranks": [rank for rank, _ in ranked],
            "cot": thoughts[0].text,
            "think_tokens": [thought.think_tokens for thought in thoughts],
            "problems": [thought.problem for thought in thoughts],
            "nearest": ranked[0][1],
            "positive": self.candidates.keys[self.candidates.positive[index]],
            "query": describe_item(record.query),
            "think_rate": float(mode not in WORDLESS_MODES),
            "seconds": float(self.queries.seconds[mode][index]),
        }

    def _rank(self, index: int, embed: NDArray[Any]) -> tuple[int, list[str]]:
        columns = np.asarray(self.candidates.competing[index])
        scores = self.targets[columns] @ embed  # (M of the pool,)
        is_positive = columns == self.candidates.positive[index]
        rank = positive_ranks(scores[None], [int(is_positive.argmax())])[0]
        # The positive sorts last among equals, so that the list agrees with the rank.
        order = np.lexsort((is_positive, TIE_TOLERANCE * is_positive - scores))[:NEAREST]
        return int(rank), [self.candidates.keys[column] for column in columns[order]]

    def _choose_all(self, chosen: set[str]) -> None:
        """Make the rows of modes that choose between never and always."""
        pairs = list(zip(self.rows["never"], self.rows["always"], strict=True))
        if "oracle" in chosen:
            self.rows["oracle"] = [
                modes.choose("oracle", n, a, bool(a and n and a["ranks"][0] < n["ranks"][0]))
                for n, a in pairs
            ]
        if chosen & {"auto", "random"}:
            assert self.queries.probabilities is not None
            assert self.threshold is not None
            chances = self.queries.probabilities
            thinks = [chance > self.threshold for chance in chances]
            waits = self.queries.gate_seconds.tolist()
            self.rows["auto"] = [
                modes.choose("auto", *pair, think, probability=chance, gate_seconds=wait)
                for pair, think, chance, wait in zip(pairs, thinks, chances, waits, strict=True)
            ]
            rate = sum(thinks) / len(thinks)
            self.rows["random"] = [modes.choose("random", *pair, rate) for pair in pairs]
        if "policy" in chosen:
            said = self.queries.policy_probabilities.tolist()
            waits = self.queries.policy_seconds.tolist()
            self.rows["policy"] = [
                modes.choose(
                    "policy",
                    *pair,
                    chance > self.policy_threshold,
                    probability=chance,
                    decision_seconds=wait,
                )
                for pair, chance, wait in zip(pairs, said, waits, strict=True)
            ]

    def _embed_targets(self, *, is_thinking: bool = False) -> tuple[NDArray[Any], dict[str, float]]:
        """Return unit vectors (M, D) of all candidates, and how far they have collapsed."""
        items = self.candidates.items
        order = sorted(range(len(items)), key=lambda i: item_size(items[i]))
        name = "thinking_targets" if is_thinking else "targets"
        parts = []
        for rows in batches(order, self.settings, name.replace("_", " ")):
            batch = self.model.collate([items[row].load(self.data_root) for row in rows])
            is_latent = self.model.config.latent_documents
            parts.append(
                self._think_and_embed(batch)
                if is_thinking
                else self.model.embed(batch, is_latent=is_latent)
            )
        embeds = torch.cat(parts).cpu().numpy()
        report = check_embeds(f"{self.settings.split}/collapse/{name}", embeds)
        return embeds[np.argsort(order)], report

    def _think_and_embed(self, batch: dict[str, Any]) -> Tensor:
        prompts = self.model.prepare(batch)
        written = self.model.reason(prompts, max_think_tokens=self.settings.max_think_tokens)
        usable = [self.model.completion_for_embedding(ids) for ids in written]
        return normalize(self.model.read_out(self.model.read(prompts), usable), dim=-1)
