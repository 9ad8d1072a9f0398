"""What fitting a gate found: figures, tables, curve and plot on disk; fits and labels nothing."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.calibration import expected_calibration_error, roc_auc
from twn_rl.evaluation.gate_chart import plot_gate_curves
from twn_rl.gate import Gate
from twn_rl.gating.labels import GateLabels, label_report, report_table
from twn_rl.gating.threshold import CurvePoint, GateCurve, curve_rows
from twn_rl.whole_files import write_text

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FittedSide:
    """A gate and how it came about."""

    gate: Gate
    curve: GateCurve
    chosen: CurvePoint
    metrics: dict[str, Any]


def describe(
    validation: GateLabels,
    probability: np.ndarray,
    curve: GateCurve,
    chosen: CurvePoint,
    margin: float,
) -> dict[str, Any]:
    """Return what the gate does on the validation split, for metrics.json."""
    is_worth_it = validation.gains > margin
    assert chosen.threshold is not None
    groups: dict[str, list[bool]] = {}
    for row, thinks in zip(validation.rows, probability > chosen.threshold, strict=True):
        for name in dict.fromkeys([row["task"], *([row["hop"]] if row["hop"] else [])]):
            groups.setdefault(str(name), []).append(bool(thinks))
    return {
        "validation_auc": roc_auc(probability, is_worth_it),
        "validation_ece": expected_calibration_error(probability, is_worth_it),
        "chosen": asdict(chosen),
        "never": asdict(curve.never),
        "always": asdict(curve.always),
        "oracle": asdict(curve.oracle),
        "think_rate_by_group": {n: float(np.mean(t)) for n, t in sorted(groups.items())},
        "validation_labels": label_report(validation.rows, margin),
    }


def write_results(folder: Path, fitted: Mapping[str, FittedSide], metric: str) -> None:
    """Write metrics.json, labels.md, curve.csv and curve.png, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    metrics = {side: found.metrics for side, found in fitted.items()}
    text = json.dumps({"metric": metric, **metrics}, indent=1, allow_nan=False) + "\n"
    write_text(folder / "metrics.json", text)
    tables = [
        f"## {side}, {name}\n\n{report_table(found.metrics[f'{name}_labels'])}"
        for side, found in fitted.items()
        for name in ("train", "validation")
    ]
    write_text(folder / "labels.md", "\n".join(tables))
    rows = [row for side, found in fitted.items() for row in curve_rows(found.curve, side=side)]
    table = io.StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_text(folder / "curve.csv", table.getvalue())
    curves = {side: (found.curve, found.chosen) for side, found in fitted.items()}
    plot_gate_curves(curves, folder / "curve.png", metric=metric)


def log_side(side: str, found: FittedSide, metric: str) -> None:
    """Log what the gate costs and gives on the validation split."""
    logger.info(
        "%s gate: validation AUC %s, ECE %.3f, threshold %.3f",
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
