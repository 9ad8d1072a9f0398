"""Runs a benchmark by name: mteb's own, MRMR, the emoji scenes; scores with their costs beside.

Finished subsets of a task are kept in mteb's result cache and never embedded again, unless model,
settings or data have changed. A task that fails leaves the others their scores.
"""

from __future__ import annotations

import difflib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from mteb.abstasks.aggregated_task import AbsTaskAggregate
from mteb.cache import ResultCache
from torch import distributed

from twn_rl.data.record import Record
from twn_rl.evaluation.mteb import mrmr
from twn_rl.evaluation.mteb.encoder import MtebEncoder
from twn_rl.evaluation.mteb.summary import format_row, format_table
from twn_rl.evaluation.mteb.tasks import EMOJI_SCENES, records_task
from twn_rl.evaluation.usage import UsageBook
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import ThinkMode
from twn_rl.modeling.gate import QUERY_SIDE
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

SUMMARY_FILE = "benchmark.json"
TABLE_FILE = "benchmark.md"


@dataclass(frozen=True)
class BenchmarkSettings:
    """What to run.

    Attributes:
        benchmark: Name: mteb's, "mrmr" or "EmojiScenes".
        output_dir: Where results, costs and the summary go.
        tasks: Tasks of the benchmark; all if None.
        think: For queries and tasks without sides; None is "auto" with a fitted gate, else "never".
        think_documents: For documents.
        gate_threshold: Probability above which "auto" thinks; None takes the model's.
        max_think_tokens: Longest thought; None takes the model's.
        batch_size: Inputs a forward.
        data_root: Folder of MRMR's files.
        show_progress_bar: Whether to draw progress bars.
    """

    benchmark: str
    output_dir: str | Path
    tasks: Sequence[str] | None = None
    think: ThinkMode | None = None
    think_documents: ThinkMode = "never"
    gate_threshold: float | None = None
    max_think_tokens: int | None = None
    batch_size: int = 32
    data_root: str | Path | None = None
    show_progress_bar: bool = True


class BenchmarkError(RuntimeError):
    """Tasks have failed; the others have their scores."""


def run_benchmark(
    embedder: ThinkingEmbedder,
    settings: BenchmarkSettings,
    *,
    name: str,
    splits: Mapping[str, Sequence[Record]] | None = None,
) -> dict[str, Any]:
    """Run a benchmark and return its summary, which is also written to `benchmark.json`.

    Every process must call this; they share the inputs, and the first one writes.

    Args:
        embedder: The model.
        settings: What to run.
        name: What results call the model.
        splits: Records of the emoji scenes, for that benchmark.

    Raises:
        ValueError: For names of a benchmark or of tasks that do not exist.
        FileNotFoundError: For missing data of MRMR.
        BenchmarkError: If a task has failed, after all others were run.
    """
    tasks = find_tasks(settings, splits)
    is_gated = QUERY_SIDE in embedder.model.gates
    encoder = MtebEncoder(
        embedder,
        name=name,
        think=settings.think or ("auto" if is_gated else "never"),
        think_documents=settings.think_documents,
        think_threshold=settings.gate_threshold,
        max_think_tokens=settings.max_think_tokens,
    )
    return _Run(encoder, settings, tasks).run()


def find_tasks(
    settings: BenchmarkSettings, splits: Mapping[str, Sequence[Record]] | None = None
) -> list[Any]:
    """Return the tasks that `settings` names.

    Raises:
        ValueError: For an unknown name, with those like it.
        FileNotFoundError: For missing data of MRMR.
    """
    asked = settings.benchmark
    if asked.lower() == mrmr.NAME:
        _check_names(settings.tasks, [mrmr.task_name(name) for name in mrmr.INSTRUCTIONS])
        return mrmr.mrmr_tasks(settings.data_root, settings.tasks)
    if asked == EMOJI_SCENES and not splits:
        raise ValueError(
            f"benchmark = {asked!r} without records; expected its splits; run it with the "
            "embedded default's data, that is without record files"
        )
    if asked == EMOJI_SCENES:
        tasks: list[Any] = [records_task(EMOJI_SCENES, splits or {})]
    else:
        known = {alias: each for each in mteb.get_benchmarks() for alias in each.aliases or ()}
        known |= {each.name: each for each in mteb.get_benchmarks()}
        if asked not in known:
            own = ["mmeb_v2", mrmr.NAME, EMOJI_SCENES]
            raise ValueError(
                f"benchmark = {asked!r}; expected one of {own} or of mteb's names"
                f"{_like(asked, [*known, *own])}; correct the name"
            )
        tasks = list(known[asked].tasks)
    _check_names(settings.tasks, [task.metadata.name for task in tasks])
    return [t for t in tasks if settings.tasks is None or t.metadata.name in settings.tasks]


class _Run:
    """One benchmark; the summary is written after each task."""

    def __init__(self, encoder: MtebEncoder, settings: BenchmarkSettings, tasks: list[Any]) -> None:
        self.encoder, self.settings, self.tasks = encoder, settings, tasks
        self.output = Path(settings.output_dir)
        self.writes = not distributed.is_initialized() or distributed.get_rank() == 0
        self.meta = encoder.meta
        # Costs are those of one model under one set of settings, as mteb's results are.
        path = Path(self.meta.revision or "") / (self.meta.experiment_name or "")
        encoder.usage = UsageBook(self.output / "costs" / path if self.writes else None)
        self.cache = (ResultCache if self.writes else _ReadOnlyCache)(self.output)
        self.rows: list[dict[str, Any]] = []
        self.skipped: dict[str, str] = {}
        self.failed: dict[str, str] = {}

    def run(self) -> dict[str, Any]:
        for task in self.tasks:
            name = task.metadata.name
            lacking = sorted(set(task.metadata.modalities) - set(self.meta.modalities))
            if lacking:
                self.skipped[name] = f"needs {', '.join(lacking)}"
                logger.warning("%s: left out, the model has no %s", name, ", ".join(lacking))
            else:
                self._run_task(task)
            self._write()
        if self.failed:
            lines = "\n".join(f"  {name}: {problem}" for name, problem in self.failed.items())
            raise BenchmarkError(
                f"{len(self.failed)} of {len(self.tasks)} tasks failed; the others have their "
                f"scores in {self.output}; mend these and run the same command again:\n{lines}"
            )
        return self.summary()

    def summary(self) -> dict[str, Any]:
        """Return what is known so far; a mean over all tasks only when all have scores."""
        scores = [row["score"] for row in self.rows]
        is_complete = len(scores) == len(self.tasks)
        return {
            "benchmark": self.settings.benchmark,
            "model": self.meta.name,
            "revision": self.meta.revision,
            "settings": dict(self.meta.experiment_kwargs or {}),
            "mteb": mteb.__version__,
            "num_tasks": len(self.tasks),
            "mean": float(np.mean(scores)) if is_complete and scores else None,
            "mean_of_measured": float(np.mean(scores)) if scores else None,
            "tasks": self.rows,
            "skipped": self.skipped,
            "failed": self.failed,
        }

    def _run_task(self, task: Any) -> None:
        name = task.metadata.name
        parts = task.metadata.tasks if isinstance(task, AbsTaskAggregate) else [task]
        if distributed.is_initialized():
            distributed.barrier()  # nobody reads a cache that the first process still writes
        is_stale = False
        for part in (*parts, *([task] if len(parts) > 1 else [])):
            is_stale |= self._resume(part)
        self.encoder.open_picture = getattr(task, "open_picture", None)
        outcome = mteb.evaluate(
            self.encoder,  # pyright: ignore[reportArgumentType]  # only mteb's command line builds
            task,
            co2_tracker=False,
            raise_error=False,
            encode_kwargs={
                "batch_size": self.settings.batch_size,
                "show_progress_bar": self.settings.show_progress_bar and self.writes,
            },
            cache=self.cache,
            overwrite_strategy="always" if is_stale else "only-missing",
            show_progress_bar=False,
        )
        errors = [error.exception for error in outcome.exceptions or ()]
        if errors or not outcome.task_results:
            problems = [f"{error}{_offline_hint(error)}" for error in errors]
            self.failed[name] = "; ".join(problems) or "no result"
            return
        self.rows.append(self._row(task, outcome.task_results[0], [p.metadata.name for p in parts]))
        logger.info("%s", format_row(self.rows[-1]))

    def _resume(self, task: Any) -> bool:
        """Read the costs of what has scores; return whether these are of other data."""
        cached = self.cache.load_task_result(task.metadata.name, self.meta)
        is_stale = cached is not None and cached.dataset_revision != task.metadata.revision
        done = set()
        if is_stale:
            logger.warning("%s: its data have changed; measured anew", task.metadata.name)
        elif cached is not None:
            done = {(s, row["hf_subset"]) for s, rows in cached.scores.items() for row in rows}
        self.encoder.usage.resume(task.metadata.name, done)
        return is_stale

    def _row(self, task: Any, result: Any, parts: list[str]) -> dict[str, Any]:
        filtered = result.validate_and_filter_scores(task)
        # As mteb keeps them on disk, so that a resumed run says the same.
        subsets = {
            split: {row["hf_subset"]: round(row["main_score"], 6) for row in rows}
            for split, rows in filtered.scores.items()
        }
        costs = self.encoder.usage
        return {
            "task": task.metadata.name,
            "metric": task.metadata.main_score,
            "score": float(np.mean([s for split in subsets.values() for s in split.values()])),
            "scores": subsets,
            "dataset_revision": result.dataset_revision,
            "queries": costs.total(parts, "query").rates(),
            "documents": costs.total(parts, "document").rates(),
        }

    def _write(self) -> None:
        if self.writes:
            summary = self.summary()
            text = json.dumps(summary, indent=1, ensure_ascii=False, allow_nan=False)
            write_text(self.output / SUMMARY_FILE, text + "\n")
            write_text(self.output / TABLE_FILE, format_table(summary))


class _ReadOnlyCache(ResultCache):
    """The cache of processes that leave writing to the first one."""

    def save_to_cache(self, *args: Any, **kwargs: Any) -> None:
        """Write nothing."""


def _check_names(asked: Sequence[str] | None, known: Sequence[str]) -> None:
    for name in asked or ():
        if name not in known:
            raise ValueError(
                f"tasks = {name!r}; expected tasks of the benchmark{_like(name, known)}; correct "
                "the name"
            )


def _like(name: str, known: Iterable[str]) -> str:
    """Return which names are like a wrong one, or some of all."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    close = difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.5)
    if close:
        return f", such as {', '.join(by_lower[match] for match in close)}"
    return f": {', '.join(sorted(by_lower.values())[:12])}, ..."


def _offline_hint(problem: str) -> str:
    is_offline = any(os.environ.get(f"{kind}_OFFLINE") == "1" for kind in ("HF_DATASETS", "HF_HUB"))
    is_missing = "offline" in problem.lower() or "cache" in problem.lower()
    if not (is_offline and is_missing):
        return ""
    return " (offline mode: only data sets in the local cache can be read; fetch this one first)"
