"""`twn-rl demo`: the five stages on the embedded default, each shown while it runs."""

from __future__ import annotations

import argparse
import logging
import os
import time
from pathlib import Path

from twn_rl.launch.command_line import is_on, show_logs
from twn_rl.launch.experiment import EVALUATION_FOLDER
from twn_rl.launch.progress import STAGE_VARIABLE, clock
from twn_rl.launch.stage import Stage
from twn_rl.modeling.config import INTERFACES
from twn_rl.runtime.log_levels import NOTICE

logger = logging.getLogger(__name__)

# All that accelerate would otherwise say it chose; and no traceback of its own.
LAUNCHER = ["--quiet", "--num_processes", "1", "--num_machines", "1"]
LAUNCHER += ["--mixed_precision", "no", "--dynamo_backend", "no"]
MAX_THREADS = 4  # the model is small; measured are 1 and 2


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the folder, and what makes a quick try of it."""
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where to")
    parser.add_argument("--demo_scale", type=float, help="multiplies the sizes of the splits")
    parser.add_argument(
        "--max_steps", type=int, help="steps of the warm start, of RL and of the refit"
    )
    parser.add_argument("--seed", type=int, help="of the scenes, the adapters and the sampling")
    parser.add_argument(
        "--interface", choices=INTERFACES, help="who reads what; shared_prefill takes least time"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=usual_threads(),
        help=f"of torch: the cores at hand, at most {MAX_THREADS}, unless OMP_NUM_THREADS says it",
    )


def run(arguments: argparse.Namespace) -> int:
    """Warm-start, reinforce, refit, fit the gate, evaluate; finished stages are kept."""
    show_logs(logging.INFO if is_on("--verbose") else NOTICE)
    started = time.perf_counter()
    named = stages(
        arguments.output_dir,
        arguments.demo_scale,
        arguments.max_steps,
        arguments.seed,
        arguments.interface,
    )
    for number, (name, stage) in enumerate(named.items(), start=1):
        os.environ[STAGE_VARIABLE] = f"{number} of {len(named)}, {name}"
        logger.log(NOTICE, "Stage %s, %s so far", os.environ[STAGE_VARIABLE], so_far(started))
        if not stage.run(LAUNCHER, is_shown=True, threads=arguments.threads):
            logger.log(NOTICE, "It had been run; to run it again, remove %s", stage.target)
            if name == "evaluation":
                logger.log(NOTICE, "Report: %s", stage.target / "report.html")
    return 0


def usual_threads() -> int | None:
    """Return how many threads to use; None where the environment says it.

    Without either, accelerate takes one.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return None
    return min(len(os.sched_getaffinity(0)), MAX_THREADS)


def so_far(started: float) -> str:
    """Return how long ago that was."""
    return clock(time.perf_counter() - started)


def stages(
    output: Path,
    demo_scale: float | None,
    max_steps: int | None,
    seed: int | None = None,
    interface: str | None = None,
) -> dict[str, Stage]:
    """Return what is run, by what a reader would call it."""
    sft, grpo, refit = output / "sft", output / "grpo", output / "refit"
    config = "recipes/configs/demo_{}.yaml"
    data = {"demo_dir": output / "data", "demo_scale": demo_scale, "demo_seed": seed}
    short = {"max_steps": max_steps, "seed": seed, **data}
    # Later stages find the interface in the model.
    own = {"config": config.format("sft"), "output_dir": sft, "interface": interface}
    warm_start = {**own, **short}
    # The last stage evaluates, with the gate, too.
    rl = {"config": config.format("grpo"), "output_dir": grpo, "warm_start": sft, **short}
    read_again = {
        "config": config.format("refit"),
        "output_dir": refit,
        "checkpoint": grpo,
        **short,
    }
    gate = {"config": config.format("gate"), "model": refit, "seed": seed, **data}
    evaluation = {"model": refit, "before": sft, **data}
    measured = refit / EVALUATION_FOLDER
    return {
        "warm start": Stage("sft_embed", sft, warm_start, outdates=[grpo, refit]),
        "RL": Stage("grpo_embed", grpo, {**rl, "evaluate": False}, outdates=[refit]),
        "refit": Stage("sft_embed", refit, read_again),
        "gate": Stage("gate_embed", refit / "gate", gate, outdates=[measured]),
        "evaluation": Stage("eval_embed", measured, evaluation),
    }
