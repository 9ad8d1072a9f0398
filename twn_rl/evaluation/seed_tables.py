"""Runs of several arms and seeds -> mean and spread, tables and plots; knows no model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from twn_rl.evaluation.results import METRICS_FILE, REPORTED_SPLITS
from twn_rl.runtime.extras import extra
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GROUPS = ("hop0", "hop1", "hop2", "hop3", "all")
MODES = ("never", "always", "auto", "auto_better", "policy", "sampled", "gold")
# What thinking costs: metric -> modes in which the numbers are not the same for every arm.
COST_MODES = {
    "think_tokens": ("always", "auto", "policy", "sampled"),
    "think_rate": ("auto", "policy"),
}
PLOT_MODES = {"always": "always think", "auto": "the gate decides", "policy": "the policy decides"}
# From so many runs on the worst and the best are told, too.
MIN_RUNS_OF_RANGE = 4
# Columns of `method_table` that are no metrics of an evaluation.
COST_TITLES = {
    "milliseconds": "ms a query",
    "trainable_parameters": "trained parameters",
    "training_minutes": "training minutes",
}


class Cell(TypedDict):
    """One metric of one arm over its seeds."""

    mean: float
    std: float
    values: list[float]


# Arm -> metric key, `<split>/<group>/<mode>/<metric>`, -> its cell.
Summary = dict[str, dict[str, Cell]]


def save_arms(output: Path, arms: Mapping[str, Sequence[Path]]) -> str:
    """Write summary.json, summary.md and summary.png of evaluated arms; return the tables.

    Args:
        output: Folder to write into.
        arms: Arm -> one evaluation folder a seed, in the same order for every arm.
    """
    runs = {
        arm: {str(f): json.loads((f / METRICS_FILE).read_text(encoding="utf-8")) for f in folders}
        for arm, folders in arms.items()
    }
    summary = summarize(runs)
    text = tables(summary)
    save_summary(output / "summary", summary, text)
    plot_summary(summary, output / "summary.png")
    return text


def save_summary(path: Path, summary: Summary, text: str) -> None:
    """Write the numbers of a summary and its text to `path` with suffixes .json and .md."""
    write_json(path.with_suffix(".json"), summary, indent=1)
    write_text(path.with_suffix(".md"), text)


def summarize(runs: Mapping[str, Mapping[str, Mapping[str, float]]]) -> Summary:
    """Return arm -> metric key -> mean, sample standard deviation and the values by seed.

    Args:
        runs: Arm -> name of a run, one a seed in the same order for every arm -> flat metrics.

    Raises:
        ValueError: If the seeds of an arm measured different metrics.
    """
    summary: Summary = {}
    for arm, seeds in runs.items():
        first, expected = next(iter(seeds.items()))
        for run, metrics in seeds.items():
            if differing := sorted(set(metrics) ^ set(expected)):
                raise ValueError(
                    f"{run} measured other metrics than {first}: {differing[:5]}; expected the "
                    "same; evaluate both with the same splits and modes"
                )
        summary[arm] = {
            key: describe([metrics[key] for metrics in seeds.values()]) for key in expected
        }
    return summary


def describe(values: Sequence[float]) -> Cell:
    """Return mean, sample standard deviation (0 for one value) and the values.

    >>> describe([1.0, 3.0])["std"]
    1.4142135623730951
    """
    std = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return {"mean": float(np.mean(values)), "std": std, "values": list(values)}


def served_metrics(metrics: Mapping[str, float], mode: str) -> dict[str, float]:
    """Return quality and cost of the mode in which a method serves, under keys without the mode.

    >>> served_metrics({"test/all/auto/hit@1": 0.5, "test/all/never/hit@1": 0.4}, "auto")
    {'test/all/hit@1': 0.5}

    Raises:
        ValueError: If the mode was not measured.
    """
    shown = [(group, "hit@1") for group in GROUPS]
    shown += [("all", "think_rate"), ("all", "think_tokens")]
    found = {
        f"{split}/{group}/{metric}": metrics[key]
        for split in REPORTED_SPLITS
        for group, metric in shown
        if (key := f"{split}/{group}/{mode}/{metric}") in metrics
    }
    if not any(key.endswith("hit@1") for key in found):
        raise ValueError(
            f"metrics without hit@1 of mode {mode!r}; expected at least one; evaluate the model "
            "with that mode"
        )
    return found


def tables(summary: Summary) -> str:
    """Return hit@1 and, as far as measured, what thinking costs, as Markdown tables."""
    texts = [table(summary)]
    for metric, modes in COST_MODES.items():
        if _headline_keys(summary, metric, modes):
            texts.append(table(summary, metric=metric, modes=modes))
    return "\n".join(texts)


def table(summary: Summary, *, metric: str = "hit@1", modes: Sequence[str] = MODES) -> str:
    """Return a Markdown table of one metric: rows split/group/mode, columns arms.

    Shares are in per cent, tokens are counts.
    """
    unit = "" if metric.endswith("_tokens") else " in %"
    rows = [
        [key.rpartition("/")[0], *(_text(key, metrics.get(key)) for metrics in summary.values())]
        for key in _headline_keys(summary, metric, modes)
    ]
    return markdown_table([f"{metric}{unit}", *summary], rows)


def method_table(summary: Summary) -> str:
    """Return a Markdown table of what methods reach and cost: a row a method, a column a metric."""
    columns = list(dict.fromkeys(key for metrics in summary.values() for key in metrics))
    rows = [
        [method, *(_text(key, metrics.get(key)) for key in columns)]
        for method, metrics in summary.items()
    ]
    return markdown_table(["method", *map(_title, columns)], rows)


def _text(key: str, cell: Cell | None) -> str:
    if cell is None:
        return "-"
    if key == "trainable_parameters":
        return f"{cell['mean']:,.0f}"
    scale = 1.0 if key in COST_TITLES or key.endswith("_tokens") else 100.0
    text = f"{scale * cell['mean']:.1f} ± {scale * cell['std']:.1f}"
    if len(cell["values"]) < MIN_RUNS_OF_RANGE:
        return text
    return f"{text} ({scale * min(cell['values']):.1f} to {scale * max(cell['values']):.1f})"


def _title(key: str) -> str:
    """Return what a reader would call a column of `method_table`.

    >>> _title("test/hop2/hit@1"), _title("test/all/think_tokens"), _title("milliseconds")
    ('test hop2', 'test think tokens', 'ms a query')
    """
    if key in COST_TITLES:
        return COST_TITLES[key]
    split, group, metric = key.split("/")
    return f"{split} {group}" if metric == "hit@1" else f"{split} {metric.replace('_', ' ')}"


def _headline_keys(summary: Summary, metric: str, modes: Sequence[str]) -> list[str]:
    splits = dict.fromkeys(key.split("/")[0] for metrics in summary.values() for key in metrics)
    keys = [
        f"{split}/{group}/{mode}/{metric}" for split in splits for group in GROUPS for mode in modes
    ]
    return [key for key in keys if any(key in metrics for metrics in summary.values())]


def plot_summary(summary: Summary, path: Path, *, metric: str = "hit@1") -> None:
    """Draw the quality of every arm by hops with std error bars, one column of panels a split.

    The first row always thinks; further ones, where measured, let a gate or the policy decide.
    """
    shown = _headline_keys(summary, metric, MODES)
    splits = list(dict.fromkeys(key.split("/")[0] for key in shown))
    modes = [
        mode for mode in PLOT_MODES if mode == "always" or _headline_keys(summary, metric, [mode])
    ]
    with _panels(path, len(modes), len(splits), size=(5.5, 3.6)) as axes:
        for row, mode in zip(axes, modes, strict=True):
            for axis, split in zip(row, splits, strict=True):
                _draw_bars(axis, summary, f"{split}/{{}}/{mode}/{metric}")
                axis.set_title(f"{split}: {PLOT_MODES[mode]}")
                axis.set_ylabel(f"{metric} (%)")


def _draw_bars(axis: Axes, summary: Summary, key: str) -> None:
    """Draw a bar an arm for each group, which takes the place of {} in `key`."""
    width = 0.8 / len(summary)
    for number, (arm, metrics) in enumerate(summary.items()):
        found = [metrics.get(key.format(group)) for group in GROUPS]
        places = np.arange(len(found)) + (number - (len(summary) - 1) / 2) * width
        means = [np.nan if cell is None else 100 * cell["mean"] for cell in found]
        errors = [0.0 if cell is None else 100 * cell["std"] for cell in found]
        axis.bar(places, means, width, yerr=errors, label=arm, capsize=3)
    axis.set_xticks(range(len(GROUPS)), GROUPS)
    axis.set_ylim(0, 100)


def plot_methods(
    summary: Summary,
    path: Path,
    *,
    quality: Sequence[str] = ("test/all/hit@1", "test/hop2/hit@1", "unseen_pairs/all/hit@1"),
) -> None:
    """Draw quality against milliseconds a query, one panel a quality key, std error bars."""
    shown = [key for key in quality if any(key in metrics for metrics in summary.values())]
    with _panels(path, 1, len(shown), size=(5.2, 4.0)) as axes:
        for axis, key in zip(axes[0], shown, strict=True):
            for method, metrics in summary.items():
                if key in metrics:
                    cost, value = metrics["milliseconds"], metrics[key]
                    axis.errorbar(
                        cost["mean"],
                        100 * value["mean"],
                        xerr=cost["std"],
                        yerr=100 * value["std"],
                        fmt="o",
                        capsize=3,
                        label=method,
                    )
            axis.set_title(_title(key))
            axis.set_xlabel(COST_TITLES["milliseconds"])
            axis.set_ylabel("hit@1 (%)")
            axis.set_xlim(left=0)


@contextmanager
def _panels(
    path: Path, rows: int, columns: int, *, size: tuple[float, float]
) -> Iterator[list[list[Axes]]]:
    """Give axes of a grid of panels, each `size` inches, and save what was drawn, with a legend."""
    with extra("eval"):
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt
    whole = (size[0] * columns, size[1] * rows)
    figure, axes = plt.subplots(rows, columns, figsize=whole, squeeze=False)
    yield axes.tolist()
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)
