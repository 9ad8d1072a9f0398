"""Metrics of an evaluation as the report's tables."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twn_rl.evaluation.modes import MODE_NAMES, THINKING_TARGETS, mode_name
from twn_rl.evaluation.results import Evaluation

TABLE_MODES = ("never", "latent", "always", "auto", "auto_better", "policy", "oracle", "sampled")
# Chance is measured at the rate of the gate.
ROUTING_MODES = {
    "auto": ("never", "always", "auto", "random", "oracle"),
    "policy": ("never", "always", "policy", "oracle"),
}


@dataclass(frozen=True)
class Cell:
    """One number of the table, as text."""

    value: str = "–"  # noqa: RUF001 -- a dash is what tables print for nothing
    detail: str = ""
    more: str = ""


def splits_of(evaluation: Evaluation) -> list[str]:
    """Return the splits in the order they were measured."""
    return list(dict.fromkeys(key.split("/")[0] for key in evaluation.metrics))


def groups_of(evaluation: Evaluation, split: str) -> list[str]:
    """Return hops, then everything, then tasks."""
    found = {key.split("/")[1] for key in evaluation.metrics if key.startswith(f"{split}/")}
    found.discard("collapse")
    hops = sorted(group for group in found if group.startswith("hop"))
    return [*hops, *(["all"] if "all" in found else []), *sorted(found - {"all", *hops})]


def quality_table(split: str, after: Evaluation, before: Evaluation | None) -> dict[str, Any]:
    """Return hit@1 of every group and mode, with the earlier model's beside them."""
    columns: list[tuple[str, Evaluation, str]] = []
    for mode in TABLE_MODES:
        if before is not None and _has_mode(before, split, mode):
            columns.append((f"{MODE_NAMES[mode]}, earlier model", before, mode))
        if _has_mode(after, split, mode):
            name = MODE_NAMES[mode] + (", this model" if before is not None else "")
            columns.append((name, after, mode))
    caption = f"{split}: hit@1, with its 95 % interval and mean tokens of thinking"
    return _table(caption, split, groups_of(after, split), columns)


def routing_table(split: str, evaluation: Evaluation, mode: str) -> dict[str, Any]:
    """Return quality and cost of every group where `mode` decides, and where nothing does."""
    modes = [name for name in ROUTING_MODES[mode] if _has_mode(evaluation, split, name)]
    columns = [(MODE_NAMES[name], evaluation, name) for name in modes]
    caption = f"{split}: hit@1, and what a query costs on average"
    return _table(caption, split, groups_of(evaluation, split), columns, shows_costs=True)


def further_table(split: str, evaluation: Evaluation) -> dict[str, Any] | None:
    """Return what more thoughts a query and thinking targets do; None if unmeasured."""
    start = f"{split}/all/"
    found = {key.split("/")[2] for key in evaluation.metrics if key.startswith(start)}
    averaged = sorted(m for m in found if m.startswith("averaged"))
    averaged.sort(key=len)  # 2 before 10
    extra = [*averaged, *(mode for mode in THINKING_TARGETS if mode in found)]
    if not extra:
        return None
    modes = [mode for mode in ("never", "always", *extra) if mode in found]
    columns = [(mode_name(mode), evaluation, mode) for mode in modes]
    caption = f"{split}: hit@1 with several sampled thoughts a query, and with targets that think"
    return _table(caption, split, groups_of(evaluation, split), columns)


def _has_mode(evaluation: Evaluation, split: str, mode: str) -> bool:
    return f"{split}/all/{mode}/hit@1" in evaluation.metrics


def _table(
    caption: str,
    split: str,
    groups: Sequence[str],
    columns: Sequence[tuple[str, Evaluation, str]],
    *,
    shows_costs: bool = False,
) -> dict[str, Any]:
    """Return a table with a row a group and a column for each (title, evaluation, mode)."""
    rows = [
        (
            group,
            [
                _cell(run.metrics, f"{split}/{group}/{mode}", shows_costs)
                for _, run, mode in columns
            ],
        )
        for group in groups
    ]
    return {"caption": caption, "columns": [title for title, _, _ in columns], "rows": rows}


def _cell(metrics: Mapping[str, float], key: str, shows_costs: bool) -> Cell:
    """Return hit@1 with its interval and tokens, or with what it costs."""
    if f"{key}/hit@1" not in metrics:
        return Cell()
    quality, tokens = f"{metrics[f'{key}/hit@1']:.2f}", metrics[f"{key}/think_tokens"]
    if not shows_costs:
        low, high = metrics[f"{key}/hit@1_low"], metrics[f"{key}/hit@1_high"]
        return Cell(quality, f"{low:.2f} to {high:.2f}, {tokens:.0f} tokens")
    # Evaluations of earlier versions have neither rates nor seconds.
    rate, seconds = metrics.get(f"{key}/think_rate"), metrics.get(f"{key}/seconds")
    share = "" if rate is None else f"{100 * rate:.0f} % think"
    time = "" if seconds is None else f", {1000 * seconds:.1f} ms"
    return Cell(quality, share, f"{tokens:.1f} tokens{time}")
