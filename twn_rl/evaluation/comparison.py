"""Several methods, several seeds -> one table and one picture of quality against cost.

Knows flat metrics and costs; no model and no training.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from twn_rl.evaluation.seed_tables import describe

SPLITS = ("test", "ood")
GROUPS = ("hop0", "hop1", "hop2", "all")
Cell = dict[str, float | list[float]]
# Method -> column -> mean, sample standard deviation and values by seed.
Comparison = dict[str, dict[str, Cell]]


@dataclass(frozen=True)
class Measured:
    """One method with one seed.

    Attributes:
        metrics: Flat metrics of `eval_embed.py`.
        mode: Evaluation mode in which the method serves.
        milliseconds: Wall-clock per query of the public encoder.
        trainable_parameters: Adapters, tokens and gate together, as served.
        training_seconds: Of all stages it needs, each once.
    """

    metrics: Mapping[str, float]
    mode: str
    milliseconds: float
    trainable_parameters: int
    training_seconds: float

    def columns(self) -> dict[str, float]:
        """Return the row of this method: quality in [0, 1], cost in the unit its name says."""
        found = {}
        for split in SPLITS:
            for group in GROUPS:
                key = f"{split}/{group}/{self.mode}/hit@1"
                if key in self.metrics:
                    found[f"{split}/{group}/hit@1"] = self.metrics[key]
            for name in ("think_rate", "think_tokens"):
                key = f"{split}/all/{self.mode}/{name}"
                if key in self.metrics:
                    found[f"{split}/all/{name}"] = self.metrics[key]
        return found | {
            "milliseconds": self.milliseconds,
            "trainable_parameters": float(self.trainable_parameters),
            "training_minutes": self.training_seconds / 60,
        }


def compare(runs: Mapping[str, Sequence[Measured]]) -> Comparison:
    """Return method -> column -> mean, spread and values over its seeds.

    Raises:
        ValueError: If a method's seeds did not measure the same columns, or nothing at all.
    """
    comparison: Comparison = {}
    for method, seeds in runs.items():
        rows = [measured.columns() for measured in seeds]
        if not rows or not any(name.endswith("hit@1") for name in rows[0]):
            raise ValueError(
                f"method {method!r} has {len(rows)} runs without hit@1 of its mode; expected at "
                "least one; evaluate it with that mode"
            )
        for row in rows:
            if set(row) != set(rows[0]):
                differing = sorted(set(row) ^ set(rows[0]))[:5]
                raise ValueError(
                    f"seeds of method {method!r} differ in {differing}; expected the same columns; "
                    "evaluate all of them with the same splits"
                )
        comparison[method] = {name: describe([row[name] for row in rows]) for name in rows[0]}
    return comparison


def comparison_table(comparison: Comparison) -> str:
    """Return the Markdown table: a row a method; shares in per cent, mean ± standard deviation."""
    columns = list(dict.fromkeys(name for cells in comparison.values() for name in cells))
    lines = [
        "| method | " + " | ".join(_title(name) for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for method, cells in comparison.items():
        texts = [_text(name, cells.get(name)) for name in columns]
        lines.append(f"| {method} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def _title(column: str) -> str:
    """Return what a reader would call a column.

    >>> _title("test/hop2/hit@1"), _title("ood/all/think_tokens"), _title("milliseconds")
    ('test hop2', 'ood think tokens', 'ms a query')
    """
    fixed = {
        "milliseconds": "ms a query",
        "trainable_parameters": "trained parameters",
        "training_minutes": "training minutes",
    }
    if column in fixed:
        return fixed[column]
    split, group, metric = column.split("/")
    return f"{split} {group}" if metric == "hit@1" else f"{split} {metric.replace('_', ' ')}"


def _text(column: str, cell: Cell | None) -> str:
    if cell is None:
        return "-"
    mean, std = _number(cell["mean"]), _number(cell["std"])
    if column == "trainable_parameters":
        return f"{mean:,.0f}"
    scale = 100.0 if column.endswith(("hit@1", "think_rate")) else 1.0
    return f"{scale * mean:.1f} ± {scale * std:.1f}"


def plot_comparison(
    comparison: Comparison,
    path: Path,
    *,
    quality: Sequence[str] = ("test/all/hit@1", "test/hop2/hit@1", "ood/all/hit@1"),
) -> None:
    """Draw quality against milliseconds a query, one panel a quality column, std error bars."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shown = [name for name in quality if any(name in cells for cells in comparison.values())]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.2 * len(shown), 4.0), squeeze=False)
    for axis, name in zip(axes[0], shown, strict=True):
        for method, cells in comparison.items():
            if name not in cells:
                continue
            cost, value = cells["milliseconds"], cells[name]
            axis.errorbar(
                _number(cost["mean"]),
                100 * _number(value["mean"]),
                xerr=_number(cost["std"]),
                yerr=100 * _number(value["std"]),
                fmt="o",
                capsize=3,
                label=method,
            )
        axis.set_title(_title(name))
        axis.set_xlabel("ms a query")
        axis.set_ylabel("hit@1 (%)")
        axis.set_xlim(left=0)
    axes[0][0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _number(value: float | list[float]) -> float:
    assert np.isscalar(value)
    return float(value)  # type: ignore[arg-type]
