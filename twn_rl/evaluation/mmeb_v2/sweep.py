"""Quality against cost over all thresholds of the gate, for some tasks of MMEB-V2.

Every query is embedded without and with its thought once; each threshold is then a choice between
the two.
"""

import csv
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from twn_rl.evaluation.gate_threshold import (
    CurvePoint,
    GateCurve,
    ThresholdRule,
    curve_rows,
    gate_curve,
)
from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.encoding import EncodedTask
from twn_rl.evaluation.mmeb_v2.runner import check_gate, encode_task, make_encoder, read_vectors
from twn_rl.evaluation.mmeb_v2.scoring import score_task
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask
from twn_rl.evaluation.report.gate_chart import plot_gate_curves
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.runtime.processes import Processes

logger = logging.getLogger(__name__)

CHART_FILE = "threshold_sweep.png"
CURVES_FILE = "threshold_sweep.csv"
# The gate is asked, and no probability is above 1.
NOBODY_THINKS = 1.0


def sweep_thresholds(
    embedder: Any,
    tasks: Sequence[MmebTask],
    folder: BenchmarkFolder,
    output: Path,
    settings: EncodeSettings,
    *,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> dict[str, str]:
    """Write the curves as CSV and the chart as PNG; return why tasks are not in them.

    Args:
        embedder: A `ThinkingEmbedder` with a query gate.
        tasks: What to measure.
        folder: Where the data is.
        output: Where vectors, CSV and PNG go.
        settings: How to embed; its `think` and `think_threshold` are not looked at.
        processes: `PartialState` when several share the work.
        show_progress_bar: Show rows done, on the main process.

    Raises:
        ValueError: If the model has no query gate.
    """
    ways = {
        "no_think": replace(settings, think="auto", think_threshold=NOBODY_THINKS),
        "always": replace(settings, think="always", think_threshold=None),
    }
    check_gate(embedder, ways["no_think"])
    encoders = {
        name: make_encoder(
            embedder, way, processes, variant=name, show_progress_bar=show_progress_bar
        )
        for name, way in ways.items()
    }
    curves: dict[str, tuple[GateCurve, CurvePoint]] = {}
    failed: dict[str, str] = {}
    for task in tasks:
        encoded: dict[str, EncodedTask] = {}
        for name, encoder in encoders.items():
            data, problem = encode_task(encoder, task, folder, output, processes)
            if data is None or problem is not None:
                failed[task.task] = problem or "no data"
                logger.error("%s failed: %s", task.task, problem)
                break
            if encoder.index == 0:
                encoded[name] = read_vectors(encoder, task, data, output)
                if len(encoded) == len(encoders):
                    curve = task_curve(task, data, encoded["no_think"], encoded["always"])
                    curves[task.task] = (curve, ThresholdRule().pick(curve.points))
    if curves:
        _write(output, curves)
    return failed


def task_curve(
    task: MmebTask, data: TaskData, no_think: EncodedTask, always: EncodedTask
) -> GateCurve:
    """Return a task's main metric and tokens at every threshold that tells queries apart.

    Args:
        task: The task.
        data: Who is whose candidate.
        no_think: Vectors without thoughts, with what the gate said.
        always: Vectors with thoughts.
    """
    quality = [
        [
            row[task.metric]
            for row in score_task(data, way.queries, no_think.targets, metric=task.metric).queries
        ]
        for way in (no_think, always)
    ]
    probabilities = [line["gate_probability"] for line in no_think.details]
    tokens = [line["think_tokens"] for line in always.details]
    return gate_curve(probabilities, quality[0], quality[1], tokens)


def _write(output: Path, curves: dict[str, tuple[GateCurve, CurvePoint]]) -> None:
    rows = [row for name, (curve, _) in curves.items() for row in curve_rows(curve, task=name)]
    with (output / CURVES_FILE).open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    plot_gate_curves(curves, output / CHART_FILE, metric="main metric", side="query")
