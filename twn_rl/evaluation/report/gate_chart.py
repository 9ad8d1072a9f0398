"""The quality/token curve of a routing gate as a picture."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from twn_rl.evaluation.gate_threshold import CurvePoint, GateCurve
from twn_rl.evaluation.report.charts import PALETTE
from twn_rl.runtime.whole_files import written_aside


def plot_gate_curves(
    curves: Mapping[str, tuple[GateCurve, CurvePoint]],
    path: str | Path,
    *,
    metric: str,
    side: str | None = None,
) -> None:
    """Draw quality over tokens, one panel a side, with never, always, random, oracle and the pick.

    Args:
        curves: Side -> its curve and the chosen point; any panel name if `side` is given.
        path: PNG file to write.
        metric: What quality is, for the axis.
        side: Whose gate all panels are of.
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
    tokens = [point.think_tokens for point in curve.points]
    qualities = [100 * point.quality for point in curve.points]
    axes.plot(tokens, qualities, color=PALETTE[0], linewidth=1.6, label="gate")
    ends = [curve.never, curve.always]
    axes.plot(
        [point.think_tokens for point in ends],
        [100 * point.quality for point in ends],
        color="0.6",
        linestyle="--",
        marker="o",
        label="never, random, always",
    )
    oracle = (curve.oracle.think_tokens, 100 * curve.oracle.quality)
    axes.plot(*oracle, color=PALETTE[2], marker="*", markersize=11, linestyle="", label="oracle")
    pick = (chosen.think_tokens, 100 * chosen.quality)
    share = f"chosen: {100 * chosen.think_rate:.0f} % think"
    axes.plot(*pick, color=PALETTE[4], marker="D", linestyle="", label=share)
    axes.grid(alpha=0.2)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
