"""Runs of several arms and seeds -> mean, spread, table, plot; knows no model and no training."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from twn_rl.evaluation.results import METRICS_FILE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Summary = dict[str, dict[str, dict[str, float | list[float]]]]
# What the table and the plot show: group -> mode of thinking.
HEADLINE_GROUPS = ("hop0", "hop1", "hop2", "all")
HEADLINE_MODES = ("never", "always", "auto", "policy", "sampled", "gold")
# What thinking costs: metric -> modes in which the numbers are not the same for every arm.
COST_MODES = {
    "think_tokens": ("always", "auto", "policy", "sampled"),
    "think_rate": ("auto", "policy"),
}
PLOT_MODES = {"always": "always think", "auto": "the gate decides", "policy": "the policy decides"}


def summarize_runs(runs: Mapping[str, Sequence[Path]]) -> Summary:
    """Return arm -> metric key -> mean, sample standard deviation and the values by seed.

    Args:
        runs: Arm -> one evaluation folder per seed, in the same order for every arm.

    Raises:
        ValueError: If the seeds of an arm measured different metrics.
    """
    summary: Summary = {}
    for arm, folders in runs.items():
        metrics = [json.loads((f / METRICS_FILE).read_text(encoding="utf-8")) for f in folders]
        for folder, measured in zip(folders, metrics, strict=True):
            if set(measured) != set(metrics[0]):
                differing = sorted(set(measured) ^ set(metrics[0]))[:5]
                raise ValueError(
                    f"{folder} measured other metrics than {folders[0]}: {differing}; expected the "
                    "same; evaluate both with the same splits and modes"
                )
        summary[arm] = {
            key: describe([measured[key] for measured in metrics]) for key in metrics[0]
        }
    return summary


def describe(values: Sequence[float]) -> dict[str, float | list[float]]:
    """Return mean, sample standard deviation (0 for one value) and the values.

    >>> describe([1.0, 3.0])["std"]
    1.4142135623730951
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "values": list(values)}


def tables(summary: Summary) -> str:
    """Return hit@1 and, as far as measured, what thinking costs, as Markdown tables."""
    texts = [table(summary)]
    for metric, modes in COST_MODES.items():
        if _headline_keys(summary, metric, modes):
            texts.append(table(summary, metric=metric, modes=modes))
    return "\n".join(texts)


def table(summary: Summary, *, metric: str = "hit@1", modes: Sequence[str] = HEADLINE_MODES) -> str:
    """Return a Markdown table of one metric: rows split/group/mode, columns arms.

    Shares are in per cent, tokens are counts.
    """
    arms = list(summary)
    is_count = metric.endswith("_tokens")
    lines = [
        f"| {metric}{'' if is_count else ' in %'} | " + " | ".join(arms) + " |",
        "| --- |" + " ---: |" * len(arms),
    ]
    for key in _headline_keys(summary, metric, modes):
        cells = [_cell(summary[arm].get(key), 1.0 if is_count else 100.0) for arm in arms]
        lines.append(f"| {key.rpartition('/')[0]} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Mapping[str, float | list[float]] | None, scale: float) -> str:
    if value is None:
        return "-"
    return f"{scale * _number(value['mean']):.1f} ± {scale * _number(value['std']):.1f}"


def _headline_keys(summary: Summary, metric: str, modes: Sequence[str]) -> list[str]:
    splits = dict.fromkeys(key.split("/")[0] for arm in summary.values() for key in arm)
    keys = [
        f"{split}/{group}/{mode}/{metric}"
        for split in splits
        for group in HEADLINE_GROUPS
        for mode in modes
    ]
    return [key for key in keys if any(key in arm for arm in summary.values())]


def plot_summary(summary: Summary, path: Path, *, metric: str = "hit@1") -> None:
    """Draw the quality of every arm by hops with std error bars, one column of panels a split.

    The first row always thinks; further ones, where measured, let a gate or the policy decide.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = _headline_keys(summary, metric, HEADLINE_MODES)
    splits = list(dict.fromkeys(key.split("/")[0] for key in shown))
    modes = [
        mode for mode in PLOT_MODES if mode == "always" or _headline_keys(summary, metric, [mode])
    ]
    figure, axes = plt.subplots(
        len(modes),
        len(splits),
        figsize=(5.5 * len(splits), 3.6 * len(modes)),
        squeeze=False,
    )
    for row, mode in zip(axes, modes, strict=True):
        for axis, split in zip(row, splits, strict=True):
            _draw_panel(axis, summary, f"{split}/{{}}/{mode}/{metric}")
            axis.set_title(f"{split}: {PLOT_MODES[mode]}")
            axis.set_ylabel(f"{metric} (%)")
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_panel(axis: Axes, summary: Summary, key: str) -> None:
    """Draw a bar an arm for each group, which takes the place of {} in `key`."""
    width = 0.8 / len(summary)
    for number, (arm, metrics) in enumerate(summary.items()):
        found = [metrics.get(key.format(group)) for group in HEADLINE_GROUPS]
        places = np.arange(len(found)) + (number - (len(summary) - 1) / 2) * width
        means = [np.nan if cell is None else 100 * _number(cell["mean"]) for cell in found]
        errors = [0.0 if cell is None else 100 * _number(cell["std"]) for cell in found]
        axis.bar(places, means, width, yerr=errors, label=arm, capsize=3)
    axis.set_xticks(range(len(HEADLINE_GROUPS)), HEADLINE_GROUPS)
    axis.set_ylim(0, 100)


def _number(value: float | list[float]) -> float:
    assert isinstance(value, float)
    return value
