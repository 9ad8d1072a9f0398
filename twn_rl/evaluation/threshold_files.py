"""What a threshold of thinking was chosen from: figures, curve and plot on disk."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path

from twn_rl.evaluation.gate_threshold import ChosenThreshold, CurvePoint, GateCurve, curve_rows
from twn_rl.runtime.extras import extra
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.whole_files import write_text

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


def log_choice(side: str, found: ChosenThreshold, metric: str) -> None:
    """Log what the decision to think costs and gives on the validation split."""
    logger.log(
        NOTICE,
        "%s: validation AUC %s, ECE %.3f, threshold %.3f",
        *(side, found.metrics["validation_auc"], found.metrics["validation_ece"]),
        found.chosen.threshold,
    )
    curve = found.curve
    points = (curve.never, found.chosen, curve.always, curve.oracle)
    for name, point in zip(("never", "chosen", "always", "oracle"), points, strict=True):
        logger.log(
            NOTICE,
            "%-8s %-7s %s %5.1f   %6.2f tokens   %5.1f %% think   random at that rate %5.1f",
            *(side, name, metric, 100 * point.quality, point.think_tokens),
            *(100 * point.think_rate, 100 * point.random_quality),
        )
