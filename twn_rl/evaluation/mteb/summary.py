"""What a benchmark's summary looks like to a reader."""

from collections.abc import Mapping
from typing import Any

from twn_rl.runtime.text_tables import markdown_table


def format_row(row: Mapping[str, Any]) -> str:
    """Return one line about a task."""
    cost, spent = row["queries"], ""
    if cost:
        spent = (
            f", think rate {cost['think_rate']:.2f}, {cost['think_tokens']:.1f} think tokens and "
            f"{cost['seconds']:.4f} s a query"
        )
    return f"{row['task']}: {row['metric']} {row['score']:.4f}{spent}"


def flat_metrics(summary: Mapping[str, Any]) -> dict[str, float]:
    """Return the scores as `<task>/<metric>`, and what queries cost, for trackers."""
    found: dict[str, float] = {}
    for row in summary["tasks"]:
        found[f"{row['task']}/{row['metric']}"] = row["score"]
        costs = row["queries"] or {}
        for name in ("think_rate", "think_tokens", "seconds"):
            if name in costs:
                found[f"{row['task']}/{name}"] = costs[name]
    return found


def format_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    rows = []
    for row in summary["tasks"]:
        cost, spent = row["queries"], ("", "", "")
        if cost:
            rates = f"{cost['think_rate']:.3f}", f"{cost['think_tokens']:.1f}"
            spent = (*rates, f"{cost['seconds']:.4f}")
        rows.append((row["task"], row["metric"], f"{row['score']:.4f}", *spent, ""))
    for kind in ("skipped", "failed"):
        for task, reason in summary[kind].items():
            remark = f"{kind}: {reason}".replace("|", "/").replace("\n", " ")
            rows.append((task, *[""] * 5, remark))
    if count := len(summary["tasks"]):
        which = f"mean of {count} of {summary['num_tasks']} tasks"
        rows.append((which, "", f"{summary['mean_of_measured']:.4f}", *[""] * 4))
    columns = ("task", "metric", "score", "think rate", "think tokens", "seconds a query", "remark")
    return markdown_table(columns, rows, texts=(0, 1, 6))
