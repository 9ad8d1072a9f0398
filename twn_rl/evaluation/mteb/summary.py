"""What a benchmark's summary looks like to a reader; knows no models and not mteb."""

from collections.abc import Mapping
from typing import Any


def format_row(row: Mapping[str, Any]) -> str:
    """Return one line about a task."""
    cost = row["queries"]
    spent = (
        ""
        if not cost
        else (
            f", think rate {cost['think_rate']:.2f}, {cost['think_tokens']:.1f} think tokens and "
            f"{cost['seconds']:.4f} s a query"
        )
    )
    return f"{row['task']}: {row['metric']} {row['score']:.4f}{spent}"


def format_table(summary: Mapping[str, Any]) -> str:
    """Return the summary as a Markdown table."""
    head = "| task | metric | score | think rate | think tokens | seconds a query | remark |"
    lines = [head, "|---|---|---:|---:|---:|---:|---|"]
    for row in summary["tasks"]:
        cost = row["queries"]
        columns = [row["task"], row["metric"], f"{row['score']:.4f}"]
        columns += (
            [f"{cost['think_rate']:.3f}", f"{cost['think_tokens']:.1f}"] if cost else ["", ""]
        )
        columns += [f"{cost['seconds']:.4f}" if cost else "", ""]
        lines.append(f"| {' | '.join(columns)} |")
    for kind in ("skipped", "failed"):
        for task, reason in summary[kind].items():
            remark = f"{kind}: {reason}".replace("|", "/").replace("\n", " ")
            lines.append(f"| {task} | | | | | | {remark} |")
    count = len(summary["tasks"])
    if count:
        which = f"mean of {count} of {summary['num_tasks']} tasks"
        lines.append(f"| {which} | | {summary['mean_of_measured']:.4f} | | | | |")
    return "\n".join(lines) + "\n"
