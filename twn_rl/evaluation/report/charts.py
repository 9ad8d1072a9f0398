"""Curves and bars as SVG text that takes its ink from the page."""

import io
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart by colour-blind readers on light and dark pages.
PALETTE = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9")
MARKERS = ("o", "s", "*", "X", "D", "^")
_INK = "#010203"  # replaced by the page's own text colour
_INKED = ("text.color", "axes.labelcolor", "axes.edgecolor", "grid.color", "xtick.color")
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.alpha": 0.2,
    "legend.frameon": False,
    "ytick.color": _INK,
    **dict.fromkeys(_INKED, _INK),
}
# Panel title -> which logged names it shows, in this order.
PANELS = {
    "Loss": r"loss|loss[_/].*|.*_loss",
    "Reward": r"reward|rewards/.*/mean",
    "Spread of rewards": r"reward_std",
    "Groups without signal": r"frac_reward_zero_std",
    "Hit@1 of rollouts": r"rollouts/(no_think_)?hit@1",
    "Completion length in tokens": r"completions/mean_length|rollouts/think_tokens",
    "KL to the reference": r"kl",
}


@dataclass(frozen=True)
class Chart:
    """A drawing and the words that stand for it."""

    title: str
    svg: str
    alt: str


def read_curves(path: str | Path) -> dict[str, list[tuple[float, float]]]:
    """Return logged name -> (step, value) pairs of a `metrics.jsonl`, finite values only.

    Raises:
        ValueError: If a line is no JSON object.
    """
    curves: dict[str, list[tuple[float, float]]] = {}
    for row, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        try:
            logs: dict[str, Any] = dict(json.loads(line))
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"{path}, row {row}: {line[:60]!r} is no JSON object; expected one log a line; "
                "remove the broken line"
            ) from error
        for name, value in logs.items():
            if isinstance(value, int | float) and math.isfinite(value) and "step" in logs:
                curves.setdefault(name, []).append((float(logs["step"]), float(value)))
    return curves


def draw_curves(curves: Mapping[str, Sequence[tuple[float, float]]]) -> list[Chart]:
    """Return one chart for each panel of `PANELS` that has something to show."""
    charts = []
    for title, pattern in PANELS.items():
        names = [name for name in curves if re.fullmatch(pattern, name) and len(curves[name]) > 1]
        if names:
            charts.append(_curve_chart(title, {name: curves[name] for name in names}))
    return charts


def _curve_chart(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> Chart:
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(4.4, 2.6)
        for index, (name, points) in enumerate(curves.items()):
            steps, values = zip(*points, strict=True)
            axes.plot(steps, values, color=PALETTE[index % len(PALETTE)], label=name, linewidth=1.4)
        axes.set_xlabel("step")
        if len(curves) > 1:
            axes.legend(fontsize=7, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1))
        ends = "; ".join(
            f"{name} from {p[0][1]:.3g} to {p[-1][1]:.3g}" for name, p in curves.items()
        )
        return Chart(title, _svg(figure, title), f"{title} over steps: {ends}")


def draw_bars(
    title: str, groups: Mapping[str, Mapping[str, tuple[float, float, float]]], *, label: str
) -> Chart:
    """Return grouped bars with error bars: group -> bar name -> (value, low, high)."""
    names = list(dict.fromkeys(name for bars in groups.values() for name in bars))
    width = 0.8 / max(1, len(names))
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(max(4.4, 0.2 * len(groups) * len(names) + 1.5), 2.9)
        for index, name in enumerate(names):
            shown = [(x, bars[name]) for x, bars in enumerate(groups.values()) if name in bars]
            centers = [x + (index - (len(names) - 1) / 2) * width for x, _ in shown]
            values = [value for _, (value, _, _) in shown]
            errors = [
                [max(0.0, value - low) for _, (value, low, _) in shown],
                [max(0.0, high - value) for _, (value, _, high) in shown],
            ]
            axes.bar(centers, values, width * 0.92, color=PALETTE[index % len(PALETTE)], label=name)
            axes.errorbar(centers, values, yerr=errors, fmt="none", ecolor=_INK, elinewidth=0.8)
        axes.set_xticks(range(len(groups)), list(groups))
        axes.set_ylabel(label)
        axes.set_ylim(0, 1.02)
        axes.legend(
            fontsize=7, ncols=min(3, len(names)), loc="lower center", bbox_to_anchor=(0.5, 1)
        )
        words = "; ".join(
            f"{group}: " + ", ".join(f"{name} {value[0]:.2f}" for name, value in bars.items())
            for group, bars in groups.items()
        )
        return Chart(title, _svg(figure, title), f"{title}, {label}. {words}")


def draw_tradeoff(
    title: str,
    lines: Mapping[str, Sequence[tuple[float, float]]],
    marks: Mapping[str, tuple[float, float]],
    *,
    x_label: str,
    y_label: str,
) -> Chart:
    """Return lines, the first one solid, below named marks: name -> (x, y)."""
    with mpl.rc_context(_STYLE):
        figure, axes = _figure(5.6, 4.2)
        for index, (name, points) in enumerate(lines.items()):
            x, y = zip(*points, strict=True)
            style = {"linestyle": "--", "alpha": 0.6} if index else {}
            axes.plot(x, y, color=_INK, linewidth=1.2, label=name, **style)
        for index, (name, (x, y)) in enumerate(marks.items()):
            axes.plot(
                [x],
                [y],
                MARKERS[index % len(MARKERS)],
                color=PALETTE[index % len(PALETTE)],
                markersize=9,
                linestyle="none",
                label=name,
            )
        axes.set_xlabel(x_label)
        axes.set_ylabel(y_label)
        axes.legend(fontsize=8, ncols=3, loc="lower center", bbox_to_anchor=(0.5, 1))
        words = "; ".join(f"{name} {y:.3f} at {x:.1f}" for name, (x, y) in marks.items())
        return Chart(title, _svg(figure, title), f"{title}, {y_label} against {x_label}. {words}")


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    # No pyplot: it keeps global state and would look for a display.
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.patch.set_alpha(0)
    axes = figure.subplots()
    axes.patch.set_alpha(0)
    return figure, axes


def _svg(figure: Figure, name: str) -> str:
    """Return the drawing without prologue, metadata and fixed ink; ids are salted by its name."""
    buffer = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(
        r'\bid="(figure|axes|patch|line2d|text|xtick|ytick|matplotlib|legend)[^"]*"', "", text
    )
    return text.replace(_INK, "currentColor").replace("<svg ", '<svg aria-hidden="true" ', 1)
