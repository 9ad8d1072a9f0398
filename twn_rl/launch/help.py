"""`--help` of a recipe: its own settings first, by subject, within a second; knows no torch."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from twn_rl.launch.source_settings import PACKAGE, Section, Setting, Unknown, read_recipe

# What people set of the trainer's more than hundred settings.
USUAL = {
    "output_dir": "Where the run goes.",
    "max_steps": "Optimiser steps; -1 goes by num_train_epochs.",
    "num_train_epochs": "Passes over the records.",
    "per_device_train_batch_size": "Records (GRPO: rollouts) a step and process.",
    "gradient_accumulation_steps": "Batches an optimiser step.",
    "learning_rate": "Peak learning rate.",
    "num_generations": "Rollouts of a prompt (GRPO).",
    "max_completion_length": "Longest rollout in tokens (GRPO).",
    "logging_steps": "Steps between two logs.",
    "save_strategy": "no, steps or epoch: when a checkpoint is written.",
    "save_steps": "Steps between two checkpoints.",
    "metric_for_best_model": "Measure each checkpoint: hit@1, no_think_hit@1, in RL also reward.",
    "load_best_model_at_end": "Keep the best checkpoint's model, not the last's.",
    "resume_from_checkpoint": "A checkpoint, or true for the newest whole one.",
    "report_to": "Trackers: none, tensorboard, trackio, wandb, ...",
    "seed": "Of every draw.",
}
OF_GRPO = ("num_generations", "max_completion_length", "reward_weights")
REWARD_WEIGHTS = "Factor of each reward; 1 each if --rewards is given without them."
GENERAL = {
    "config FILE": "Read settings from YAML; flags override them.",
    "help-all": "Every setting of the trainer, too.",
    "verbose": "Show all logs, progress bars and warnings of libraries.",
    "debug": "Show the traceback of an error.",
}
TITLES = {"DataArguments": "data", "ModelArguments": "model", "ThresholdRule": "threshold"}


def recipe_help(path: Path, program: str, config: str | None = None) -> str:
    """Return the help of the recipe at `path`.

    Args:
        path: Its file.
        program: What the user typed to start it.
        config: File whose values are the defaults to show; None: the recipe's own.
    """
    text, sections, default = read_recipe(path)
    shown = None if default is None else f"recipes/configs/{default}"
    file = Path(config) if config else PACKAGE / str(shown) if shown else None
    values = yaml.safe_load(file.read_text(encoding="utf-8")) if file and file.is_file() else {}
    title, _, rest = text.partition("\n")
    lines = [f"usage: {program} [--config FILE] [--FIELD VALUE ...]", "", title]
    if file:
        lines += ["", f"Defaults are those of {config or shown}, and else as below."]
    for name, line, settings in _groups(sections, values):
        lines += ["", f"{name}: {line}" if line else f"{name}:"]
        lines += [each for setting in settings for each in _entry(setting)]
    lines += ["", "general:"]
    lines += [each for name, told in GENERAL.items() for each in _entry(Setting(name, None, told))]
    examples = [line for line in rest.split("\n") if line.startswith("    ")]
    prose = "\n".join(line for line in rest.split("\n") if not line.startswith("    ")).strip()
    if examples:
        lines += ["", "examples:", *(_typed(line, path, program) for line in examples)]
    return "\n".join([*lines, "", re.sub(r"\n{3,}", "\n\n", prose)]).rstrip() + "\n"


def _groups(
    sections: Iterable[Section], values: Mapping[str, Any]
) -> Iterable[tuple[str, str, list[Setting]]]:
    """Yield title, first line and settings; rewards and the trainer's have groups of their own."""
    rewards: list[Setting] = []
    trainers, known = [], set()
    for section in sections:
        settings = [
            Setting(s.name, values.get(s.name, s.default), s.help) for s in section.settings
        ]
        known |= {setting.name for setting in settings}
        rewards += [setting for setting in settings if setting.name.startswith("reward")]
        trainers += [section] if section.is_trainer else []
        own = [setting for setting in settings if not setting.name.startswith("reward")]
        title = TITLES.get(section.name, "method" if section.is_trainer else "this stage")
        yield title, section.line, own
    is_grpo = any("GRPO" in section.name for section in trainers)
    if rewards:
        weights = Setting("reward_weights", values.get("reward_weights"), REWARD_WEIGHTS)
        yield "rewards", "", [*rewards, *([weights] if is_grpo else [])]
    if trainers:
        rest = [name for name in values if name not in {*known, *USUAL, "reward_weights", "env"}]
        usual = [
            Setting(name, values.get(name), line)
            for name, line in USUAL.items()
            if name not in known and (is_grpo or name not in OF_GRPO)
        ]
        others = [Setting(name, values[name], "") for name in rest]
        yield "trainer", "what people set most; all of it: --help-all", [*usual, *others]


def _entry(setting: Setting) -> list[str]:
    """Return one setting as lines: name and default, then what it is."""
    default = setting.default
    if isinstance(default, (list, tuple)):
        default = " ".join(map(str, default))
    shown = "" if default is None or isinstance(default, Unknown) else f" {default}"
    shown = shown.lower() if isinstance(default, bool) else shown
    start = f"  --{setting.name}{shown}"
    width = min(shutil.get_terminal_size((100, 24)).columns, 110)
    column = 36
    words = textwrap.wrap(setting.help, max(30, width - column)) or [""]
    if len(start) + 2 > column:
        return [start, *(" " * column + line for line in words if line)]
    first, *more = words
    return [f"{start:<{column}}{first}".rstrip(), *(" " * column + line for line in more)]


def _typed(example: str, path: Path, program: str) -> str:
    """Return an example as the user would type it, where it needs no launch file."""
    if "--config_file" in example or not program.startswith("twn-rl"):
        return example
    launch = rf"(accelerate launch( --num_processes \d+)?|python) recipes/(\w+/)?{path.name}"
    return re.sub(launch, program, example)
