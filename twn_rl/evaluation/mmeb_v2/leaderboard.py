"""Scores of tasks on disk, their means, and the leaderboard's file.

`GROUP/TASK_score.json` is the same however many processes made it; what a machine took for it is in
`GROUP/TASK_cost.json`. Scores under repaired and unrepaired page labels, or of different models or
settings, are never averaged: the repair alone is worth 1.2 points of the mean over 78.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.evaluation.mmeb_v2.tasks import FIXED_SUFFIX, GROUPS, MmebTask
from twn_rl.metrics.ranking import KS
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import read_json, write_json, write_text

logger = logging.getLogger(__name__)

SUMMARY_FILE = "summary.json"
LEADERBOARD_FILE = "leaderboard.json"
TABLE_FILE = "scores.md"
# What is kept of a task: its scores, its seconds, and the best targets of each query.
SCORES, COST, PREDICTIONS = "score.json", "cost.json", "pred.jsonl"
_KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
OFFICIAL_KEYS = (*(f"{kind}@{k}" for kind in _KINDS for k in KS), "num_pred", "num_data")
MISSING = "FILE_N/A"  # what the official report writes for a task without scores


class MixedScoresError(ValueError):
    """Scores that must not be averaged or continued: other labels, model or settings."""


def task_path(output: Path, task: MmebTask, kind: str) -> Path:
    """Return where the scores of a task (or `kind`) are, as the official report looks for them."""
    return output / task.group / f"{task.task}_{kind}"


def read_score(output: Path, task: MmebTask, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scores an earlier run has left, None if there are none.

    Raises:
        MixedScoresError: If they were made otherwise than `plan` says.
    """
    path, stored = task_path(output, task, SCORES), _stored(output, task)
    there = plan if stored is None else stored.get("plan", {})
    different = [name for name in plan if there.get(name) != plan[name]]
    if different:
        named = "; ".join(f"{n} = {plan[n]!r:.60}, there {there.get(n)!r:.60}" for n in different)
        raise MixedScoresError(
            f"{path} was made otherwise: {named}; expected the same, as scores of one folder are "
            "averaged; pass another --output_dir, or --overwrite true"
        )
    return stored


def read_scores(output: Path, tasks: Iterable[MmebTask]) -> dict[str, dict[str, Any]]:
    """Return the scores of the tasks that have some, by task.

    Raises:
        MixedScoresError: If they are not of one label set, one model and one way of thinking.
    """
    scores: dict[str, dict[str, Any]] = {}
    first: tuple[str, Mapping[str, Any]] | None = None
    for task in tasks:
        stored = _stored(output, task)
        if stored is None:
            continue
        shared = {k: v for k, v in stored.get("plan", {}).items() if k != "task"}
        shared["label_set"] = stored.get("label_set")
        first = first or (task.task, shared)
        names = sorted({*shared, *first[1]})
        different = [name for name in names if shared.get(name) != first[1].get(name)]
        if different:
            raise MixedScoresError(
                f"{first[0]} and {task.task} in {output} differ in {different} "
                f"({[first[1].get(n) for n in different]!r:.80} and "
                f"{[shared.get(n) for n in different]!r:.80}); expected one label set, "
                "model and way of thinking, as their mean would mean nothing; measure one of them "
                "into another --output_dir"
            )
        scores[task.task] = stored
    return scores


def _stored(output: Path, task: MmebTask) -> dict[str, Any] | None:
    path = task_path(output, task, SCORES)
    stored = read_json(path)
    if stored is None and path.exists():
        logger.warning("%s is damaged: its task counts as not measured", path)
    return stored


def summarize(scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[MmebTask]) -> dict[str, Any]:
    """Return the means of every meta-task and group, and the one over all tasks.

    A mean stands for whole groups only: where tasks are missing it is None, and the mean of those
    that are there has another name, `mean_of_measured`.

    Args:
        scores: Of `read_scores`.
        tasks: All tasks of the benchmark.
    """
    values = {t.task: float(scores[t.task][t.metric]) for t in tasks if t.task in scores}
    names = dict.fromkeys([*(t.subgroup for t in tasks), *(t.group for t in tasks), "overall"])
    means = {
        name: _mean(values, [t for t in tasks if name in (t.group, t.subgroup, "overall")])
        for name in names
    }
    labels = {score["label_set"] for score in scores.values()}
    return {
        "label_set": labels.pop() if labels else None,
        "num_tasks": len(tasks),
        "num_measured": len(values),
        "overall": means["overall"]["mean"],
        "means": means,
        "tasks": values,
        "warnings": {name: s["warnings"] for name, s in scores.items() if s["warnings"]},
    }


def write_reports(
    output: Path, tasks: Sequence[MmebTask], metadata: Mapping[str, Any]
) -> dict[str, Any]:
    """Write the summary, Markdown tables and the leaderboard's file; return the summary.

    Args:
        output: Folder of the scores.
        tasks: All tasks of the benchmark.
        metadata: What the leaderboard's file says of the model.

    Raises:
        MixedScoresError: As `read_scores`.
    """
    scores = read_scores(output, tasks)
    summary = summarize(scores, tasks)
    write_json(output / SUMMARY_FILE, summary)
    costs = {task.task: read_json(task_path(output, task, COST)) or {} for task in tasks}
    write_text(output / TABLE_FILE, score_tables(scores, costs, summary, tasks))
    date = datetime.now(tz=UTC).isoformat(timespec="seconds")
    about = {**metadata, "label_set": summary["label_set"], "report_generated_date": date}
    board = {"metadata": about, "metrics": leaderboard_metrics(scores, tasks)}
    write_json(output / LEADERBOARD_FILE, board)
    return summary


def leaderboard_metrics(
    scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[MmebTask]
) -> dict[str, dict[str, Any]]:
    """Return group -> task -> official metrics; repaired pages have the suffix "-fixed"."""
    metrics: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for task in tasks:
        score, name = scores.get(task.task), task.task
        if task.has_page_labels and score is not None and score["label_set"] == "page-fixed":
            name += FIXED_SUFFIX
        metrics[task.group][name] = (
            MISSING if score is None else {key: score[key] for key in OFFICIAL_KEYS}
        )
    return metrics


def score_tables(
    scores: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    tasks: Sequence[MmebTask],
) -> str:
    """Return all scores with what they cost, and the means, as Markdown."""
    rows = []
    for task in tasks:
        if task.task in scores:
            score, seconds = scores[task.task], costs[task.task].get("seconds_per_query")
            shares = f"{100 * score[task.metric]:.1f}", f"{100 * score['think_rate']:.0f}"
            spent = f"{score['think_tokens']:.1f}", "" if seconds is None else f"{seconds:.3f}"
            rows.append((task.task, task.metric, *shares, *spent))
    head = ("task", "metric", "score in %", "think rate in %", "think tokens", "seconds a query")
    means = [
        (
            name if mean["mean"] is not None else f"{name} (incomplete)",
            f"{mean['num_measured']} of {mean['num_tasks']}",
            f"{100 * mean['mean_of_measured']:.1f}",
        )
        for name, mean in summary["means"].items()
        if mean["num_measured"]
    ]
    measured = f"{summary['num_measured']} of {summary['num_tasks']}"
    return (
        f"Labels: {summary['label_set']}; tasks: {measured}.\n\n"
        + markdown_table(head, rows, texts=(0, 1))
        + "\n"
        + markdown_table(("mean", "tasks", "score in %"), means)
    )


def _mean(values: Mapping[str, float], tasks: Sequence[MmebTask]) -> dict[str, Any]:
    found = [values[task.task] for task in tasks if task.task in values]
    mean = float(np.mean(found)) if found else None
    return {
        "mean": mean if len(found) == len(tasks) else None,
        "mean_of_measured": mean,
        "num_tasks": len(tasks),
        "num_measured": len(found),
    }
