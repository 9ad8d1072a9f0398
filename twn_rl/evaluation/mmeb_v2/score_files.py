"""Scores of tasks on disk, their means, and the leaderboard's file. Knows no vectors and no models.

`GROUP/TASK_score.json` is the same however many processes made it; what a machine took for it is in
`GROUP/TASK_cost.json`. Scores under repaired and unrepaired page labels, or of different models or
settings, are never averaged: the repair alone is worth 1.2 points of the mean over 78.
"""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.evaluation.mmeb_v2.tasks import FIXED_SUFFIX, GROUPS, MmebTask
from twn_rl.metrics.graded import KS
from twn_rl.runtime.whole_files import read_json, write_json, write_text

SUMMARY_FILE = "summary.json"
LEADERBOARD_FILE = "leaderboard.json"
TABLE_FILE = "scores.md"
_KINDS = ("hit", "ndcg_linear", "ndcg_exponential", "precision", "recall", "f1", "map", "mrr")
OFFICIAL_KEYS = (*(f"{kind}@{k}" for kind in _KINDS for k in KS), "num_pred", "num_data")
MISSING = "FILE_N/A"  # what the official report writes for a task without scores


class MixedScoresError(ValueError):
    """Scores that must not be averaged or continued: other labels, model or settings."""


def score_path(output: Path, task: MmebTask) -> Path:
    """Return where the scores of a task are, as the official report looks for them."""
    return output / task.group / f"{task.task}_score.json"


def cost_path(output: Path, task: MmebTask) -> Path:
    """Return where a task's seconds are."""
    return output / task.group / f"{task.task}_cost.json"


def prediction_path(output: Path, task: MmebTask) -> Path:
    """Return where the best targets of each query are."""
    return output / task.group / f"{task.task}_pred.jsonl"


def read_score(output: Path, task: MmebTask, plan: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the scores an earlier run has left, None if there are none.

    Raises:
        MixedScoresError: If they were made otherwise than `plan` says.
    """
    path = score_path(output, task)
    stored = read_json(path)
    if stored is None:
        return None
    there = stored.get("plan", {})
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
        stored = read_json(score_path(output, task))
        if stored is None:
            continue
        shared = {k: v for k, v in stored.get("plan", {}).items() if k != "task"}
        shared["label_set"] = stored.get("label_set")
        first = first or (task.task, shared)
        different = [
            name for name in {*shared, *first[1]} if shared.get(name) != first[1].get(name)
        ]
        if different:
            raise MixedScoresError(
                f"{first[0]} and {task.task} in {output} differ in {sorted(different)} "
                f"({[first[1].get(n) for n in sorted(different)]!r:.80} and "
                f"{[shared.get(n) for n in sorted(different)]!r:.80}); expected one label set, "
                "model and way of thinking, as their mean would mean nothing; measure one of them "
                "into another --output_dir"
            )
        scores[task.task] = stored
    return scores


def summarize(scores: Mapping[str, Mapping[str, Any]], tasks: Sequence[MmebTask]) -> dict[str, Any]:
    """Return the means of every meta-task and group, and the one over all tasks.

    A mean stands for whole groups only: where tasks are missing it is None, and the mean of those
    that are there has another name, `mean_of_measured`.

    Args:
        scores: Of `read_scores`.
        tasks: All tasks of the benchmark.
    """
    values = {
        task.task: float(scores[task.task][task.metric]) for task in tasks if task.task in scores
    }
    means = {
        name: _mean(values, [t for t in tasks if name in (t.group, t.subgroup, "overall")])
        for name in dict.fromkeys(
            [*(t.subgroup for t in tasks), *(t.group for t in tasks), "overall"]
        )
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
    """Write the summary, a Markdown table and the leaderboard's file; return the summary.

    Args:
        output: Folder of the scores.
        tasks: All tasks of the benchmark.
        metadata: Of the leaderboard.

    Raises:
        MixedScoresError: As `read_scores`.
    """
    scores = read_scores(output, tasks)
    summary = summarize(scores, tasks)
    write_json(output / SUMMARY_FILE, summary)
    costs = {task.task: read_json(cost_path(output, task)) or {} for task in tasks}
    write_text(output / TABLE_FILE, table(scores, costs, summary, tasks))
    write_json(
        output / LEADERBOARD_FILE,
        {
            "metadata": {
                **metadata,
                "label_set": summary["label_set"],
                "report_generated_date": datetime.now(tz=UTC).isoformat(timespec="seconds"),
            },
            "metrics": leaderboard_metrics(scores, tasks),
        },
    )
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


def table(
    scores: Mapping[str, Mapping[str, Any]],
    costs: Mapping[str, Mapping[str, Any]],
    summary: Mapping[str, Any],
    tasks: Sequence[MmebTask],
) -> str:
    """Return all scores with what they cost, and the means, as Markdown."""
    measured = f"{summary['num_measured']} of {summary['num_tasks']}"
    lines = [
        f"Labels: {summary['label_set']}; tasks: {measured}.",
        "",
        "| task | metric | score in % | think rate in % | think tokens | seconds a query |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for task in tasks:
        if task.task not in scores:
            continue
        score, seconds = scores[task.task], costs[task.task].get("seconds_per_query")
        lines.append(
            f"| {task.task} | {task.metric} | {100 * score[task.metric]:.1f} "
            f"| {100 * score['think_rate']:.0f} | {score['think_tokens']:.1f} "
            f"| {'' if seconds is None else f'{seconds:.3f}'} |"
        )
    lines += ["", "| mean | tasks | score in % |", "| --- | ---: | ---: |"]
    for name, mean in summary["means"].items():
        if mean["num_measured"]:
            shown = 100 * mean["mean_of_measured"]
            part = "" if mean["mean"] is not None else " (incomplete)"
            lines.append(
                f"| {name}{part} | {mean['num_measured']} of {mean['num_tasks']} | {shown:.1f} |"
            )
    return "\n".join(lines) + "\n"


def _mean(values: Mapping[str, float], tasks: Sequence[MmebTask]) -> dict[str, Any]:
    found = [values[task.task] for task in tasks if task.task in values]
    is_whole = len(found) == len(tasks)
    mean = float(np.mean(found)) if found else None
    return {
        "mean": mean if is_whole else None,
        "mean_of_measured": mean,
        "num_tasks": len(tasks),
        "num_measured": len(found),
    }
