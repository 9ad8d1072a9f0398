"""The quality/token curve of a routing gate as a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
