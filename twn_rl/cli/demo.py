"""`twn-rl demo`: the four stages on the embedded default, each shown while it runs."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from twn_rl.launch.experiment import EVALUATION_FOLDER, Stage

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, and what makes a quick try of it."""
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where to")
    parser.add_argument("--demo_scale", type=float, help="multiplies the sizes of the splits")
    parser.add_argument("--max_steps", type=int, help="steps of the warm start and of RL")


def run(arguments: argparse.Namespace) -> int:
    """Warm-start, reinforce, fit the gate, evaluate; finished stages are kept."""
    named = stages(arguments.output_dir, arguments.demo_scale, arguments.max_steps)
    for number, (name, stage) in enumerate(named.items(), start=1):
        logger.info("Stage %d of %d: %s", number, len(named), name)
        if not stage.run(["--num_processes", "1"], is_shown=True):
            logger.info("It had been run; to run it again, remove %s", stage.target)
    logger.info("Report: %s", named["evaluation"].target / "report.html")
    return 0


def stages(output: Path, demo_scale: float | None, max_steps: int | None) -> dict[str, Stage]:
    """Return what is run, by what a reader would call it."""
    sft, grpo = output / "sft", output / "grpo"
    config = "recipes/configs/demo_{}.yaml"
    data = {"demo_dir": output / "data", "demo_scale": demo_scale}
    short = {"max_steps": max_steps, **data}
    warm_start = {"config": config.format("sft"), "output_dir": sft, **short}
    # The last stage evaluates, with the gate, too.
    rl = {"config": config.format("grpo"), "output_dir": grpo, "warm_start": sft, **short}
    gate = {"config": config.format("gate"), "model": grpo, **data}
    evaluation = {"model": grpo, "before": sft, **data}
    measured = grpo / EVALUATION_FOLDER
    return {
        "warm start": Stage("sft_embed", sft, warm_start, outdates=[grpo]),
        "RL": Stage("grpo_embed", grpo, {**rl, "evaluate": False}),
        "gate": Stage("gate_embed", grpo / "gate", gate, outdates=[measured]),
        "evaluation": Stage("eval_embed", measured, evaluation),
    }
