"""What a threshold of thinking was chosen from: figures, curve and plot on disk."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twn_rl.evaluation.gate_threshold import ChosenThreshold, CurvePoint, GateCurve, curve_rows
from twn_rl.evaluation.report.charts import PALETTE
from twn_rl.runtime.whole_files import write_text, written_aside

logger = logging.getLogger(__name__)


def write_thresholds(folder: Path, found: Mapping[str, ChosenThreshold], metric: str) -> None:
    """Write metrics.json, curve.csv and curve.png; one entry a side."""
    metrics = {side: choice.metrics for side, choice in found.items()}
    text = json.dumps({"metric": metric, **metrics}, indent=1, allow_nan=False) + "\n"
    write_text(folder / "metrics.json", text)
    curves = {side: (choice.curve, choice.chosen) for side, choice in found.items()}
    write_curves(folder, "curve", curves, key="side", metric=metric)


def write_curves(
    folder: Path,
    name: str,
    curves: Mapping[str, tuple[GateCurve, CurvePoint]],
    *,
    key: str,
    metric: str,
    side: str | None = None,
) -> None:
    """Write curves as NAME.csv and NAME.png, each whole or not at all.

    Args:
        folder: Where to write.
        name: Of both files.
        curves: Name of a curve -> the curve and the point of it that is chosen.
        key: Column of the names.
        metric: What quality is.
        side: Whose gate all curves are of; each of the side it is named after if None.
    """
    rows = [
        row for label, (curve, _) in curves.items() for row in curve_rows(curve, **{key: label})
    ]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / f"{name}.csv", table.getvalue())
    try:
        with extra("eval"):
            from twn_rl.evaluation.report.gate_chart import plot_gate_curves
    except ModuleNotFoundError as error:  # the numbers are there without the picture
        logger.warning("No picture of the curves: %s", error)
        return
    plot_gate_curves(curves, folder / f"{name}.png", metric=metric, side=side)


def plot_gate_curves(
    curves: Mapping[str, tuple[GateCurve, CurvePoint]],
    path: str | Path,
    *,
    metric: str,
    side: str | None = None,
) -> None:
    """Draw quality over tokens, one panel a curve, with never, always, random, oracle and the pick.

    Args:
        curves: Name of a panel -> its curve and the chosen point.
        path: PNG file to write.
        metric: What quality is, for the axis.
        side: Whose gate all panels are of; each of the side it is named after if None.
    """
    # No pyplot: it keeps global state and would look for a display.
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(5.2 * len(curves), 3.6), layout="constrained")
        panels = figure.subplots(1, len(curves), squeeze=False)[0]
        for axes, (name, (curve, chosen)) in zip(panels, curves.items(), strict=True):
            _draw(axes, curve, chosen)
            axes.set_title(f"{name} gate" if side is None else name)
            axes.set_xlabel(f"think tokens per {side or name}")
            axes.set_ylabel(f"{metric} (%)")
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=150)


def _draw(axes: Axes, curve: GateCurve, chosen: CurvePoint) -> None:
    def draw(points: Sequence[CurvePoint], label: str, **style: Any) -> None:
        tokens, qualities = zip(*((p.think_tokens, 100 * p.quality) for p in points), strict=True)
        axes.plot(tokens, qualities, label=label, **style)

    draw(curve.points, "gate", color=PALETTE[0], linewidth=1.6)
    ends = (curve.never, curve.always)
    draw(ends, "never, random, always", color="0.6", linestyle="--", marker="o")
    draw([curve.oracle], "oracle", color=PALETTE[2], marker="*", markersize=11, linestyle="")
    share = f"chosen: {100 * chosen.think_rate:.0f} % think"
    draw([chosen], share, color=PALETTE[4], marker="D", linestyle="")
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="lower right")


def log_choice(side: str, found: ChosenThreshold, metric: str) -> None:
    """Log what the decision to think costs and gives on the validation split."""
    logger.info(
        "%s: validation AUC %s, ECE %.3f, threshold %.3f",
        *(side, found.metrics["validation_auc"], found.metrics["validation_ece"]),
        found.chosen.threshold,
    )
    curve = found.curve
    points = (curve.never, found.chosen, curve.always, curve.oracle)
    for name, point in zip(("never", "chosen", "always", "oracle"), points, strict=True):
        logger.info(
            "%-8s %-7s %s %5.1f   %6.2f tokens   %5.1f %% think   random at that rate %5.1f",
            *(side, name, metric, 100 * point.quality, point.think_tokens),
            *(100 * point.think_rate, 100 * point.random_quality),
        )
