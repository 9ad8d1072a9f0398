"""What a threshold of thinking was chosen from: figures, curve and plot on disk; knows no model."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.evaluation.gate_threshold import CurvePoint, GateCurve, curve_rows
from twn_rl.metrics.calibration import expected_calibration_error, roc_auc
from twn_rl.runtime.extras import extra
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ChosenThreshold:
    """A curve, the point of it that is served, and figures for metrics.json."""

    curve: GateCurve
    chosen: CurvePoint
    metrics: dict[str, Any]


def describe(
    probability: np.ndarray,
    is_worth_it: np.ndarray,
    rows: Sequence[Mapping[str, Any]],
    curve: GateCurve,
    chosen: CurvePoint,
) -> dict[str, Any]:
    """Return what a decision to think does on the validation split.

    Args:
        probability: (N,) of thinking.
        is_worth_it: (N,) whether the thought helped, as bool.
        rows: (N,) with `task` and `hop`, the groups each input counts in.
        curve: Its curve.
        chosen: The point that is served.
    """
    assert chosen.threshold is not None
    rates: dict[str, list[bool]] = {}
    for row, thinks in zip(rows, probability > chosen.threshold, strict=True):
        for name in dict.fromkeys([row["task"], *([row["hop"]] if row["hop"] else [])]):
            rates.setdefault(str(name), []).append(bool(thinks))
    return {
        "validation_auc": roc_auc(probability, is_worth_it),
        "validation_ece": expected_calibration_error(probability, is_worth_it),
        "chosen": asdict(chosen),
        "never": asdict(curve.never),
        "always": asdict(curve.always),
        "oracle": asdict(curve.oracle),
        "think_rate_by_group": {n: float(np.mean(t)) for n, t in sorted(rates.items())},
    }


def write_results(folder: Path, found: Mapping[str, ChosenThreshold], metric: str) -> None:
    """Write metrics.json, curve.csv and curve.png; one entry a side."""
    folder.mkdir(parents=True, exist_ok=True)
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


def log_choice(side: str, found: ChosenThreshold, metric: str) -> None:
    """Log what the decision to think costs and gives on the validation split."""
    logger.info(
        "%s: validation AUC %s, ECE %.3f, threshold %.3f",
        side,
        found.metrics["validation_auc"],
        found.metrics["validation_ece"],
        found.chosen.threshold,
    )
    named = {
        "never": found.curve.never,
        "chosen": found.chosen,
        "always": found.curve.always,
        "oracle": found.curve.oracle,
    }
    for name, point in named.items():
        logger.info(
            "%-8s %-7s %s %5.1f   %6.2f tokens   %5.1f %% think   random at that rate %5.1f",
            side,
            name,
            metric,
            100 * point.quality,
            point.think_tokens,
            100 * point.think_rate,
            100 * point.random_quality,
        )
