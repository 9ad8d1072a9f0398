"""MMEB-V2 from folders to score files: one task after another, each kept when it is done.

A task whose data is bad costs its own score only; the others go on, and the report names it.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object

from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.encoding import EncodedTask, TaskEncoder
from twn_rl.evaluation.mmeb_v2.loaders import load_task, missing_data
from twn_rl.evaluation.mmeb_v2.score_files import (
    cost_path,
    prediction_path,
    read_score,
    score_path,
)
from twn_rl.evaluation.mmeb_v2.scoring import TaskScores, score_task
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask
from twn_rl.inference.encode_file import fingerprints
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.runtime.processes import Processes, wait
from twn_rl.runtime.whole_files import write_json, write_json_lines

logger = logging.getLogger(__name__)

# What bad data, a full disk or a full memory can raise; anything else is a mistake of ours.
TASK_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
VECTORS_DIR = "vectors"


@dataclass
class RunReport:
    """What became of the tasks: measured now, measured before, or why not."""

    measured: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Return the report as lines, failures last."""
        lines = [f"{len(self.measured)} tasks measured, {len(self.kept)} from an earlier run"]
        lines += [f"FAILED {task}: {problem}" for task, problem in self.failed.items()]
        return "\n".join(lines)


def check_data(
    tasks: Sequence[MmebTask], folder: BenchmarkFolder, *, skip_missing: bool = False
) -> dict[str, str]:
    """Return what is missing, by task, before anything is loaded or embedded.

    Args:
        tasks: Those asked for.
        folder: Where the data is.
        skip_missing: Return what is missing; otherwise it is an error.

    Raises:
        FileNotFoundError: If a folder of annotations, pictures or frames is missing.
    """
    problems = missing_data(tasks, folder)
    if problems and not skip_missing:
        listed = "\n".join(problems.values())
        raise FileNotFoundError(
            f"{len(problems)} of {len(tasks)} tasks have no data:\n{listed}\nexpected all of it; "
            "complete the download, choose --tasks, or pass --on_missing_data skip"
        )
    return problems


def run_tasks(
    embedder: Any,
    tasks: Sequence[MmebTask],
    folder: BenchmarkFolder,
    output: Path,
    settings: EncodeSettings,
    *,
    averaged_with: Sequence[MmebTask] = (),
    overwrite: bool = False,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> RunReport:
    """Measure the tasks that have no scores yet; every process calls this.

    Args:
        embedder: A `ThinkingEmbedder`.
        tasks: What to measure.
        folder: Where the data is.
        output: Where scores and vectors go; the same for all processes.
        settings: How queries think; targets never do.
        averaged_with: Further tasks whose scores in `output` must have been made alike.
        overwrite: Measure anew what is there.
        processes: `PartialState` when several share the work.
        show_progress_bar: Show rows done, on the main process.

    Raises:
        ValueError: If the gate is to decide and the model has none.
        MixedScoresError: If `output` has scores that were made otherwise.
    """
    check_gate(embedder, settings)
    plan = make_plan(embedder, folder, settings)
    report = RunReport()
    encoder = make_encoder(embedder, settings, processes, show_progress_bar=show_progress_bar)
    for task in dict.fromkeys([*tasks, *averaged_with]):  # now, not after hours
        if overwrite and task in tasks:
            continue
        stored = read_score(output, task, {**plan, "task": task.fingerprint()})
        if stored is not None and task in tasks:
            report.kept.append(task.task)
    wait(processes)  # all have looked before the first new score appears
    for task in tasks:
        if task.task in report.kept:
            continue
        problem = _run_task(encoder, task, folder, output, plan, overwrite, processes)
        if problem is None:
            report.measured.append(task.task)
        else:
            report.failed[task.task] = problem
            logger.error("%s failed: %s", task.task, problem)
    return report


def make_plan(embedder: Any, folder: BenchmarkFolder, settings: EncodeSettings) -> dict[str, Any]:
    """Return what all scores of a folder must have in common."""
    think = settings.think_mode("query")
    return {
        "model": fingerprints(embedder.model, "query", think),
        "think": think,
        "think_threshold": settings.think_threshold,
        "max_think_tokens": settings.max_think_tokens,
        "dtype": settings.dtype,
        "labels": folder.labels,
    }


def make_encoder(
    embedder: Any,
    settings: EncodeSettings,
    processes: Processes | None,
    *,
    variant: str = "",
    show_progress_bar: bool = True,
) -> TaskEncoder:
    """Return what embeds tasks in one way of thinking."""
    return TaskEncoder(
        embedder,
        settings,
        {
            "query": fingerprints(embedder.model, "query", settings.think_mode("query")),
            "document": fingerprints(embedder.model, "document", "never"),
        },
        variant=variant,
        processes=processes,
        show_progress_bar=show_progress_bar,
    )


def check_gate(embedder: Any, settings: EncodeSettings) -> None:
    """Refuse to ask a gate that is not there, before anything is embedded.

    Raises:
        ValueError: If there is none.
    """
    if settings.think_mode("query") == "auto" and "query" not in embedder.model.gates:
        raise ValueError(
            "think = 'auto' but the model has no query gate; expected a fitted one; run "
            "recipes/gate_embed.py on this checkpoint, or pass --think always or never"
        )


def encode_task(
    encoder: TaskEncoder,
    task: MmebTask,
    folder: BenchmarkFolder,
    output: Path,
    processes: Processes | None,
    *,
    overwrite: bool = False,
) -> tuple[TaskData | None, str | None]:
    """Load and embed a task on all processes; return its data, or the first problem of any."""
    data, problem = None, None
    try:
        data = load_task(task, folder)
        vectors = output / VECTORS_DIR / task.group / task.task
        encoder.encode_share(data, vectors, overwrite=overwrite)
    except TASK_ERRORS as error:
        problem = _describe(error)
    return data, agree(problem, processes)


def read_vectors(encoder: TaskEncoder, task: MmebTask, data: TaskData, output: Path) -> EncodedTask:
    """Return the vectors that `encode_task` has written."""
    return encoder.read(data, output / VECTORS_DIR / task.group / task.task)


def agree(problem: str | None, processes: Processes | None) -> str | None:
    """Return the first problem any process has, the same on all of them."""
    if processes is None or processes.num_processes == 1:
        return problem
    found: list[str | None] = gather_object([problem])
    return next((one for one in found if one is not None), None)


def _run_task(
    encoder: TaskEncoder,
    task: MmebTask,
    folder: BenchmarkFolder,
    output: Path,
    plan: Mapping[str, Any],
    overwrite: bool,
    processes: Processes | None,
) -> str | None:
    data, problem = encode_task(encoder, task, folder, output, processes, overwrite=overwrite)
    if problem is not None or data is None:
        return problem
    if encoder.index == 0:
        try:
            _score(encoder, task, data, output, {**plan, "task": task.fingerprint()})
        except TASK_ERRORS as error:
            problem = _describe(error)
    return agree(problem, processes)


def _score(
    encoder: TaskEncoder, task: MmebTask, data: TaskData, output: Path, plan: Mapping[str, Any]
) -> None:
    """Write predictions, cost and, last, the scores of a task."""
    encoded = read_vectors(encoder, task, data, output)
    scores = score_task(data, encoded.queries, encoded.targets, metric=task.metric)
    warnings = [*data.warnings, *scores.warnings]
    for warning in warnings:
        logger.warning("%s: %s", task.task, warning)
    happened = ("thought", "think_tokens", "gate_probability", "problem")
    write_json_lines(
        prediction_path(output, task),
        [
            {**row, **{name: line[name] for name in happened}}
            for row, line in zip(scores.queries, encoded.details, strict=True)
        ],
    )
    seconds = encoded.seconds
    write_json(
        cost_path(output, task),
        {
            "seconds_per_query": seconds["query"] / len(data.queries),
            "seconds_per_target": seconds["document"] / len(data.targets.keys),
            "num_processes": encoder.count,
        },
    )
    write_json(
        score_path(output, task), _score_content(task, data, encoded, scores, warnings, plan)
    )
    logger.info("%s: %s = %.4f", task.task, task.metric, scores.metrics[task.metric])


def _score_content(
    task: MmebTask,
    data: TaskData,
    encoded: EncodedTask,
    scores: TaskScores,
    warnings: Sequence[str],
    plan: Mapping[str, Any],
) -> dict[str, Any]:
    """Return a score file: official metrics, then how they came about; nothing of the machine."""
    details, count = encoded.details, len(data.queries)
    return {
        **scores.metrics,
        "num_pred": count,
        "num_data": count,
        "main_metric": task.metric,
        "label_set": plan["labels"],
        "candidates": task.candidates,
        "num_targets": len(data.targets.keys),
        "think_rate": sum(line["thought"] is not None for line in details) / count,
        "think_tokens": sum(line["think_tokens"] or 0 for line in details) / count,
        "unused_thought_rate": sum(line["problem"] is not None for line in details) / count,
        "spread": scores.spread,
        "warnings": list(warnings),
        "plan": dict(plan),
    }


def _describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
