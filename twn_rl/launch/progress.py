"""What a run shows while it goes on: its stage, one line per interval, how long it will take."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Mapping
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from twn_rl.launch.command_line import is_on
from twn_rl.runtime.log_levels import NOTICE

logger = logging.getLogger(__name__)

STAGE_VARIABLE = "TWN_RL_STAGE"  # what started this process calls it, such as "2 of 4, RL"
INTERVAL_SECONDS = 10.0
LINES = 40  # a long run has about so many lines
# Logged name -> what a reader would call it; the first three that a run logs are shown.
FIGURES = {
    "reward": "reward",
    "rollouts/hit@1": "hit@1",
    "rollouts/think_rate": "think rate",
    "rollouts/think_tokens": "think tokens",
    "loss": "loss",
    "in_batch_hit@1_think": "hit@1 in the batch",
    "loss_reconstruction": "reconstruction loss",
    "loss_token": "token loss",
    "grad_norm": "gradient norm",
}


def clock(seconds: float) -> str:
    """Return a duration as people read it.

    >>> clock(80), clock(3725)
    ('1:20', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figures(logs: Mapping[str, Any]) -> str:
    """Return the three figures worth watching of a log.

    >>> figures({"loss": 0.25, "reward": 0.5, "grad_norm": 1.0, "rollouts/hit@1": 0.75, "epoch": 1})
    'reward 0.5, hit@1 0.75, loss 0.25'
    """
    shown = [(name, logs[key]) for key, name in FIGURES.items() if key in logs]
    return ", ".join(f"{name} {float(value):.3g}" for name, value in shown[:3])


class Stages:
    """Says which of a program's stages begins; says nothing where an outer program counts them.

    >>> Stages(("warm start", False), ("RL", True), ("evaluation", True)).names
    ['RL', 'evaluation']
    """

    current = ""

    def __init__(self, *stages: tuple[str, bool]) -> None:
        """Take the names of stages, and whether each is part of this run."""
        self.names = [name for name, is_part in stages if is_part]
        Stages.current = ""

    def begin(self, name: str) -> None:
        """Log that a stage begins."""
        if os.environ.get(STAGE_VARIABLE) or len(self.names) < 2:
            return
        Stages.current = f"{self.names.index(name) + 1} of {len(self.names)}, {name}"
        logger.log(NOTICE, "Stage %s", Stages.current)


class ProgressLines(TrainerCallback):
    """Logs one line per interval: stage, step, time left, three figures.

    Attributes:
        name: Of the stage, where nobody who started this process has named it.
    """

    def __init__(self, name: str) -> None:
        self.name = os.environ.get(STAGE_VARIABLE) or Stages.current or name
        self._started = self._shown = 0.0
        self._first_step = 0

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Start the clock."""
        self._started = self._shown = time.perf_counter()
        self._first_step = state.global_step

    def on_log(self, args, state, control, logs: Any = None, **kwargs: Any) -> None:
        """Log a line if the last one is an interval ago."""
        now, text = time.perf_counter(), figures(logs or {})
        done, total = state.global_step - self._first_step, state.max_steps - self._first_step
        if not state.is_world_process_zero or not text or not done or "train_runtime" in logs:
            return
        expected = (now - self._started) * total / done
        is_first = self._shown == self._started
        if (
            is_first
            or done == total
            or now - self._shown >= max(INTERVAL_SECONDS, expected / LINES)
        ):
            self._shown = now
            left = clock(expected * (1 - done / total))
            step = f"step {state.global_step} of {state.max_steps}"
            logger.log(NOTICE, "%s, %s left: %s: %s", self.name, left, step, text)


def show_progress(trainer: Any) -> None:
    """Let a trainer log lines instead of drawing bars and printing dictionaries."""
    if is_on("--verbose"):
        return
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    name = type(trainer).__name__.removesuffix("Trainer").removeprefix("Embed")
    trainer.add_callback(ProgressLines(name.upper() if name == "Sft" else name))


# Message of a library's warning -> why nobody needs to read it.
QUIET = {
    r".*is_gradient_checkpointing.* is deprecated": "transformers reads its own former name",
    r".*gradient_checkpointing.* is deprecated.*": "the name TRL 1.16 and older files use",
    r".*torch\.jit\..* is deprecated.*": "libraries script functions; none of ours is",
}


# Start of a library's log message -> why nobody needs to read it.
QUIET_LOGS = {
    "Setting accelerator to CPU": "that there is no GPU is what the launch has checked and told",
    "Trainer is attempting to log a value of": "trackers leave out what TRL could not average",
}


def quieten() -> None:
    """Hide warnings of libraries that say nothing about a run, unless `--verbose` is on."""
    from transformers.utils import logging as transformers_logging

    if is_on("--verbose"):
        return
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)
    transformers_logging.disable_progress_bar()  # loading weights takes a second
    for name in ("DeepSpeed", "transformers.integrations.integration_utils"):
        logging.getLogger(name).addFilter(_is_worth_reading)


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(tuple(QUIET_LOGS))
