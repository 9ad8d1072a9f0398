"""Quality against cost over all thresholds of the gate, for some tasks of MMEB-V2.

Every query is embedded without and with its thought once; each threshold is then a choice between
the two.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from twn_rl.evaluation.gate_threshold import CurvePoint, GateCurve, ThresholdRule, gate_curve
from twn_rl.evaluation.mmeb_v2.encoding import TaskEncoder
from twn_rl.evaluation.mmeb_v2.run_tasks import attempt, embed_task, make_encoder, vectors_folder
from twn_rl.evaluation.mmeb_v2.score_task import score_task
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask
from twn_rl.evaluation.threshold_files import write_curves
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.runtime.processes import Processes

logger = logging.getLogger(__name__)

CURVES_NAME = "threshold_sweep"
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

    Arguments are those of `run_tasks`; `think` and `think_threshold` of `settings` do not count.

    Raises:
        ValueError: If the model has no query gate.
    """
    ways = {
        "no_think": replace(settings, think="auto", think_threshold=NOBODY_THINKS),
        "always": replace(settings, think="always", think_threshold=None),
    }
    encoders = {
        name: make_encoder(
            embedder, way, processes, variant=name, show_progress_bar=show_progress_bar
        )
        for name, way in ways.items()
    }
    curves: dict[str, tuple[GateCurve, CurvePoint]] = {}
    failed: dict[str, str] = {}
    for task in tasks:
        data, problem = None, None
        for encoder in encoders.values():
            if problem is None:
                data, problem = attempt(
                    partial(embed_task, encoder, task, folder, output), processes
                )
        if data is None or problem is not None:
            failed[task.task] = problem or "no data"
            logger.error("%s failed: %s", task.task, problem)
        elif encoders["always"].index == 0:
            curve = _task_curve(task, data, encoders, output)
            curves[task.task] = (curve, ThresholdRule().pick(curve.points))
    if curves:
        write_curves(output, CURVES_NAME, curves, key="task", metric="main metric", side="query")
    return failed


def _task_curve(
    task: MmebTask, data: TaskData, encoders: Mapping[str, TaskEncoder], output: Path
) -> GateCurve:
    """Return a task's main metric and tokens at every threshold that tells queries apart."""
    folder = vectors_folder(output, task)
    no_think, always = (encoders[name].read(data, folder) for name in ("no_think", "always"))
    before, after = (
        [row[task.metric] for row in score_task(data, *vectors, metric=task.metric).queries]
        for vectors in ((no_think.queries, no_think.targets), (always.queries, no_think.targets))
    )
    probabilities = [line["gate_probability"] for line in no_think.details]
    tokens = [line["think_tokens"] for line in always.details]
    return gate_curve(probabilities, before, after, tokens)
