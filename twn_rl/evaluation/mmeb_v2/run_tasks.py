"""MMEB-V2 from folders to score files: one task after another, each kept when it is done.

A task whose data is bad costs its own score only; the others go on, and the report names it.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from twn_rl.evaluation.mmeb_v2.encoding import TaskEncoder
from twn_rl.evaluation.mmeb_v2.leaderboard import COST, PREDICTIONS, SCORES, read_score, task_path
from twn_rl.evaluation.mmeb_v2.loaders import load_task
from twn_rl.evaluation.mmeb_v2.score_task import score_task
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask
from twn_rl.inference.encode_file import fingerprints
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.runtime.processes import Processes, gather_objects, wait
from twn_rl.runtime.whole_files import write_json, write_json_lines

logger = logging.getLogger(__name__)

# What bad data, a full disk or a full memory can raise; anything else is a mistake of ours.
TASK_ERRORS = (ValueError, OSError, MemoryError, torch.OutOfMemoryError)
VECTORS_DIR = "vectors"
_DETAILS = ("thought", "think_tokens", "gate_probability", "problem")

Result = TypeVar("Result")


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
    encoder = make_encoder(embedder, settings, processes, show_progress_bar=show_progress_bar)
    # What all scores of a folder must have in common.
    shared = {
        "model": encoder.fingerprints["query"],
        "think": settings.think_mode("query"),
        "think_threshold": settings.think_threshold,
        "max_think_tokens": settings.max_think_tokens,
        "dtype": settings.dtype,
        "labels": folder.labels,
    }
    report = RunReport()
    for task in dict.fromkeys([*tasks, *averaged_with]):  # now, not after hours
        if overwrite and task in tasks:
            continue
        stored = read_score(output, task, {**shared, "task": task.fingerprint()})
        if stored is not None and task in tasks:
            report.kept.append(task.task)
    wait(processes)  # all have looked before the first new score appears
    for task in tasks:
        if task.task in report.kept:
            continue
        embed = partial(embed_task, encoder, task, folder, output, overwrite=overwrite)
        data, problem = attempt(embed, processes)
        if data is not None and problem is None:
            plan = {**shared, "task": task.fingerprint()}
            _, problem = attempt(partial(_score, encoder, task, data, output, plan), processes)
        if problem is None:
            report.measured.append(task.task)
        else:
            report.failed[task.task] = problem
            logger.error("%s failed: %s", task.task, problem)
    return report


def make_encoder(
    embedder: Any,
    settings: EncodeSettings,
    processes: Processes | None,
    *,
    variant: str = "",
    show_progress_bar: bool = True,
) -> TaskEncoder:
    """Return what embeds tasks in one way of thinking.

    Raises:
        ValueError: If a gate is to be asked that is not there.
    """
    think = settings.think_mode("query")
    if think == "auto" and "query" not in embedder.model.gates:
        raise ValueError(
            "think = 'auto' but the model has no query gate; expected a fitted one; run "
            "recipes/gate_embed.py on this checkpoint, or pass --think always or never"
        )
    return TaskEncoder(
        embedder,
        settings,
        {
            "query": fingerprints(embedder.model, "query", think),
            "document": fingerprints(embedder.model, "document", "never"),
        },
        variant=variant,
        processes=processes,
        show_progress_bar=show_progress_bar,
    )


def attempt(
    work: Callable[[], Result], processes: Processes | None
) -> tuple[Result | None, str | None]:
    """Return what `work` gives, and the first problem any process had, the same on all of them."""
    result, problem = None, None
    try:
        result = work()
    except TASK_ERRORS as error:
        problem = f"{type(error).__name__}: {error}"
    if processes is not None and processes.num_processes > 1:
        problem = next((one for one in gather_objects(problem) if one is not None), None)
    return result, problem


def embed_task(
    encoder: TaskEncoder,
    task: MmebTask,
    folder: BenchmarkFolder,
    output: Path,
    *,
    overwrite: bool = False,
) -> TaskData:
    """Load a task and write this process's share of its vectors; return its data."""
    data = load_task(task, folder)
    encoder.encode_share(data, vectors_folder(output, task), overwrite=overwrite)
    return data


def vectors_folder(output: Path, task: MmebTask) -> Path:
    """Return where a task's vectors lie."""
    return output / VECTORS_DIR / task.group / task.task


def _score(
    encoder: TaskEncoder, task: MmebTask, data: TaskData, output: Path, plan: Mapping[str, Any]
) -> None:
    """Write predictions, cost and, last, the scores of a task; on the main process."""
    if encoder.index:
        return
    encoded = encoder.read(data, vectors_folder(output, task))
    scores = score_task(data, encoded.queries, encoded.targets, metric=task.metric)
    warnings = [*data.warnings, *scores.warnings]
    for warning in warnings:
        logger.warning("%s: %s", task.task, warning)
    details, count, num_targets = encoded.details, len(data.queries), len(data.targets.keys)
    predictions = [
        {**row, **{name: line[name] for name in _DETAILS}}
        for row, line in zip(scores.queries, details, strict=True)
    ]
    cost = {
        "seconds_per_query": encoded.seconds["query"] / count,
        "seconds_per_target": encoded.seconds["document"] / num_targets,
        "num_processes": encoder.count,
    }
    # Official metrics, then how they came about; nothing of the machine.
    content = {
        **scores.metrics,
        "num_pred": count,
        "num_data": count,
        "main_metric": task.metric,
        "label_set": plan["labels"],
        "candidates": task.candidates,
        "num_targets": num_targets,
        "think_rate": sum(line["thought"] is not None for line in details) / count,
        "think_tokens": sum(line["think_tokens"] or 0 for line in details) / count,
        "unused_thought_rate": sum(line["problem"] is not None for line in details) / count,
        "spread": scores.spread,
        "warnings": warnings,
        "plan": dict(plan),
    }
    write_json_lines(task_path(output, task, PREDICTIONS), predictions)
    write_json(task_path(output, task, COST), cost)
    write_json(task_path(output, task, SCORES), content)
    logger.info("%s: %s = %.4f", task.task, task.metric, scores.metrics[task.metric])
