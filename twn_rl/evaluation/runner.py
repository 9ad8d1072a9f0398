"""Runs a model over records under every mode and ranks the positives; knows no training.

Runs in one process: give it an unwrapped model, and call it on the main process only.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm.auto import tqdm

from twn_rl.evaluation import modes
from twn_rl.evaluation.candidates import (
    Candidates,
    CandidateScope,
    collect_candidates,
    describe_item,
)
from twn_rl.evaluation.modes import ABLATIONS, MODES, NO_THOUGHT, Thought, hop_of, task_of
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.metrics import TIE_TOLERANCE, collapse_report, positive_ranks
from twn_rl.model import DualLoraModel
from twn_rl.records import Item, Record

logger = logging.getLogger(__name__)

COLLAPSE_SAMPLE = 2000  # a singular value decomposition of more rows takes minutes on a CPU
NEAREST = 5


@dataclass(frozen=True)
class EvaluationSettings:
    """What to measure.

    Attributes:
        split: First part of every metric key.
        modes: Any of `MODES` and `ABLATIONS`.
        candidates: "pool" or "local"; see `collect_candidates`.
        batch_size: Queries or targets a forward.
        max_think_tokens: Budget of one thought; None takes the model's.
        num_thoughts: Sampled thoughts a query, in mode "sampled".
        temperature: Of sampling.
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
    confidence: float = 0.95
    seed: int = 0
    show_progress_bar: bool = True

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        known = (*MODES, *ABLATIONS)
        checks = {
            f"modes = {self.modes}, expected some of {known}": set(self.modes) <= set(known)
            and bool(self.modes),
            f"candidates = {self.candidates!r}, expected 'pool' or 'local'": self.candidates
            in ("pool", "local"),
            f"batch_size = {self.batch_size}, expected at least 1": self.batch_size >= 1,
            f"num_thoughts = {self.num_thoughts}, expected at least 1": self.num_thoughts >= 1,
            f"split = {self.split!r}, expected a name without '/'": bool(self.split)
            and "/" not in self.split,
        }
        problems = [problem for problem, is_fine in checks.items() if not is_fine]
        if problems:
            raise ValueError("EvaluationSettings: " + "; ".join(problems) + "; change these fields")


Gate = Callable[[Tensor], Sequence[bool]]


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
        gate: For mode "auto": no-think vectors (N, D) -> whether each query should think.

    Raises:
        ValueError: For no records, non-finite vectors, or mode "auto" without a gate.
    """
    settings = settings or EvaluationSettings()
    if not len(records):
        raise ValueError("records is empty; expected at least one; check the file and its filters")
    if "auto" in settings.modes and gate is None:
        raise ValueError("mode 'auto' without a gate; expected one; pass gate= or drop the mode")
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            return _Run(model, list(records), settings, data_root, gate).run()
    finally:
        model.train(was_training)


class _Run:
    """One evaluation: targets are embedded once, own thoughts are written once."""

    def __init__(
        self,
        model: DualLoraModel,
        records: list[Record],
        settings: EvaluationSettings,
        data_root: str | Path | None,
        gate: Gate | None,
    ) -> None:
        self.model, self.records, self.settings = model, records, settings
        self.data_root, self.gate = data_root, gate
        self.queries = [record.query for record in records]
        self.candidates: Candidates = collect_candidates(
            records, scope=settings.candidates, data_root=data_root
        )
        self.collapse: dict[str, float] = {}
        self.rows: dict[str, list[dict[str, Any] | None]] = {}  # mode -> a row per record

    def run(self) -> Evaluation:
        asked = self.settings.modes
        self.targets = self._embed_targets()
        paired = {"oracle", "auto"} & set(asked)
        if "never" in asked or paired:
            self._measure("never", [[NO_THOUGHT]] * len(self.records))
        needs_own = paired or {"always", "shuffled", "foreign"} & set(asked)
        own = self._write_thoughts() if needs_own else []
        if "always" in asked or paired:
            self._measure("always", [[thought] for thought in own])
        if "sampled" in asked:
            self._measure("sampled", self._sample_thoughts())
        for mode in ABLATIONS:
            if mode in asked:
                thoughts = self._ablation(mode, own)
                self._measure(mode, [None if t is None else [t] for t in thoughts])
        if "oracle" in asked:
            self.rows["oracle"] = self._choose("oracle", self._oracle_thinks())
        if "auto" in asked and self.gate is not None:
            thinks = self.gate(torch.from_numpy(self.no_think_embeds))
            self.rows["auto"] = self._choose("auto", [bool(think) for think in thinks])
        rows = [row for mode in asked for row in self.rows[mode] if row is not None]
        split, seed = self.settings.split, self.settings.seed
        metrics = summarize(rows, split=split, confidence=self.settings.confidence, seed=seed)
        return Evaluation(metrics | self.collapse, rows, self.candidates.describe())

    def _measure(self, mode: str, thoughts: Sequence[Sequence[Thought] | None]) -> None:
        """Embed each query with each of its thoughts and keep one row a query."""
        pairs = [(i, t) for i, ts in enumerate(thoughts) for t in ts or ()]
        if not pairs:
            logger.warning("mode %r has no query with a thought to embed: left out", mode)
        items = [self.queries[index] for index, _ in pairs]
        embeds = self._embed(items, [thought.completion for _, thought in pairs], mode)
        if mode == "never":
            self.no_think_embeds = embeds
        self._watch(f"query_{mode}", embeds)
        rows: list[dict[str, Any] | None] = [None] * len(self.records)
        for (index, thought), embed in zip(pairs, embeds, strict=True):
            rank, nearest = self._rank(index, embed)
            row = rows[index] or self._row(index, mode, thought, nearest)
            row["ranks"].append(rank)
            row["think_tokens"].append(thought.think_tokens)
            row["problems"].append(thought.problem)
            rows[index] = row
        self.rows[mode] = rows

    def _row(self, index: int, mode: str, thought: Thought, nearest: list[str]) -> dict[str, Any]:
        record = self.records[index]
        return {
            "split": self.settings.split,
            "id": record.id,
            "task": task_of(record),
            "hop": hop_of(record),
            "mode": mode,
            "ranks": [],
            "cot": thought.text,
            "think_tokens": [],
            "problems": [],
            "nearest": nearest,
            "positive": self.candidates.keys[self.candidates.positive[index]],
            "query": describe_item(record.query),
        }

    def _rank(self, index: int, embed: NDArray[Any]) -> tuple[int, list[str]]:
        columns = np.asarray(self.candidates.competing[index])
        scores = self.targets[columns] @ embed  # (M of the pool,)
        is_positive = columns == self.candidates.positive[index]
        rank = positive_ranks(scores[None], [int(is_positive.argmax())])[0]
        # The positive sorts last among equals, so that the list agrees with the rank.
        order = np.lexsort((is_positive, TIE_TOLERANCE * is_positive - scores))[:NEAREST]
        return int(rank), [self.candidates.keys[column] for column in columns[order]]

    def _oracle_thinks(self) -> list[bool]:
        pairs = zip(self.rows["never"], self.rows["always"], strict=True)
        return [bool(a and n and a["ranks"][0] < n["ranks"][0]) for n, a in pairs]

    def _choose(self, mode: str, thinks: Sequence[bool]) -> list[dict[str, Any] | None]:
        triples = zip(thinks, self.rows["always"], self.rows["never"], strict=True)
        chosen = [always if think else never for think, always, never in triples]
        return [None if row is None else {**row, "mode": mode} for row in chosen]

    def _write_thoughts(self, *, num_thoughts: int = 1, do_sample: bool = False) -> list[Thought]:
        thoughts = []
        seed = self.settings.seed
        for start in self._batches(len(self.queries), "thinking"):
            items = self.queries[start : start + self.settings.batch_size]
            rows = self.model.reason(
                self.model.collate([item.load(self.data_root) for item in items]),
                max_think_tokens=self.settings.max_think_tokens,
                do_sample=do_sample,
                temperature=self.settings.temperature,
                num_thoughts=num_thoughts,
                seeds=[seed * 1_000_003 + start + row for row in range(len(items))],
            )
            thoughts += [self._thought(ids) for ids in rows]
        return thoughts

    def _sample_thoughts(self) -> list[list[Thought]]:
        count = self.settings.num_thoughts
        flat = self._write_thoughts(num_thoughts=count, do_sample=True)
        return [flat[start : start + count] for start in range(0, len(flat), count)]

    def _thought(self, ids: list[int]) -> Thought:
        think = self.model.think(ids)
        completion = self.model.completion_for_embedding(ids)
        return Thought(
            completion=tuple(completion) if completion else None,
            text=think.text,
            think_tokens=sum(token != self.model.backbone.eos_token_id for token in ids),
            problem=think.problem,
        )

    def _ablation(self, mode: str, own: Sequence[Thought]) -> list[Thought | None]:
        if mode == "gold":
            return modes.gold_thoughts(self.records, self.model.renderer)
        if mode == "empty":
            return modes.empty_thoughts(self.records, self.model.renderer)
        borrow = modes.shuffled_thoughts if mode == "shuffled" else modes.foreign_thoughts
        return borrow(self.records, own, seed=self.settings.seed)

    def _embed_targets(self) -> NDArray[Any]:
        items = self.candidates.items
        # Texts with texts and pictures with pictures: a batch is as long as its longest row.
        order = sorted(range(len(items)), key=lambda i: len(items[i].images) + len(items[i].video))
        embeds = self._embed([items[i] for i in order], [None] * len(items), "targets")
        self._watch("targets", embeds)
        return embeds[np.argsort(order)]

    def _embed(self, items: Sequence[Item], completions: Sequence[Any], name: str) -> NDArray[Any]:
        """Return unit vectors (N, D); the metrics refuse non-finite ones."""
        parts = [np.zeros((0, self.model.hidden_size), np.float32)]
        for start in self._batches(len(items), f"embedding {name}"):
            stop = start + self.settings.batch_size
            loaded = [item.load(self.data_root) for item in items[start:stop]]
            batch = self.model.collate(loaded, completions[start:stop])
            parts.append(self.model.embed(batch).float().cpu().numpy())
        embeds = np.concatenate(parts)
        is_bad = ~np.isfinite(embeds).all(axis=1)
        if is_bad.any():
            raise ValueError(
                f"{int(is_bad.sum())} of {len(embeds)} vectors of {name!r} are non-finite (first: "
                f"row {int(is_bad.argmax())}); expected finite ones; check dtype and checkpoint"
            )
        return embeds

    def _watch(self, name: str, embeds: NDArray[Any]) -> None:
        if len(embeds) < 2:
            return
        step = -(-len(embeds) // COLLAPSE_SAMPLE)
        for metric, value in collapse_report(embeds[::step]).items():
            self.collapse[f"{self.settings.split}/collapse/{name}/{metric}"] = value

    def _batches(self, count: int, description: str) -> Any:
        return tqdm(
            range(0, count, self.settings.batch_size),
            desc=f"{self.settings.split}: {description}",
            disable=not self.settings.show_progress_bar,
            leave=False,
        )
