"""What surrounds every run: processes, logs, what was resolved, where to go on; knows no losses."""

from __future__ import annotations

import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, is_dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from twn_rl.launch.command_line import is_on, show_logs
from twn_rl.launch.progress import clock, quieten, show_progress
from twn_rl.modeling.checkpoint import has_adapters_of
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.modeling.lineage import RUN_FILE
from twn_rl.modeling.model_card import write_card
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import gather_objects, join_processes
from twn_rl.runtime.whole_files import owned, write_json, write_text
from twn_rl.training.whole_checkpoints import (
    SEAL_FILE,
    damage_of,
    final_checkpoint,
    is_finished,
    newest_whole,
)

logger = logging.getLogger(__name__)

# What asks for the newest checkpoint in the folder of the run.
_NEWEST = ("true", "last")
PACKAGES = ("torch", "transformers", "peft", "trl", "accelerate", "deepspeed", "datasets", "numpy")


def set_up_logging() -> None:
    """Show stages and results on the first process, warnings on all; with `--verbose` all of it."""
    level = logging.INFO if is_on("--verbose") else NOTICE
    level = level if join_processes().is_main_process else logging.WARNING
    quieten()
    show_logs(level)
    for noisy in ("httpx", "filelock", "deepspeed", "DeepSpeed"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def save_run(directory: str | Path, *arguments: Any) -> None:
    """Write `run.yaml` (resolved settings) and `environment.json` (versions, commit, command)."""
    if not join_processes().is_main_process:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    resolved = {type(a).__name__: _plain(a) for a in arguments}
    text = yaml.safe_dump(resolved, sort_keys=True, allow_unicode=True)
    write_text(directory / RUN_FILE, text)
    environment = {
        "command": sys.argv,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "num_processes": join_processes().num_processes,
        "distributed_type": join_processes().distributed_type,
    }
    write_json(directory / "environment.json", environment, indent=1)


@contextmanager
def owned_run(output: str | Path, training: Any = None) -> Iterator[None]:
    """Let no other run write to the folder of this one while the body runs; all processes enter.

    Args:
        output: Folder of the run.
        training: Settings of a run that ends by writing a model there: one that is there already
            is not trained over.

    Raises:
        ValueError: On every process, if another run has it: which, and since when; or if it holds
            a trained model that these settings neither go on from nor replace.
        OSError: Likewise, if the folder cannot be written to.
    """
    problem: Exception | None = None
    with ExitStack() as held:
        if join_processes().is_main_process:
            try:
                held.enter_context(owned(Path(output).absolute()))
                if training is not None:
                    _spare_model(Path(output), training)
            except (ValueError, OSError) as error:
                problem = error
        problem = gather_objects(problem)[0]
        if problem is not None:
            raise problem
        yield


def _spare_model(output: Path, training: Any) -> None:
    """Refuse to train over a finished model, which may have taken days."""
    if training.overwrite_output_dir or not (output / CONFIG_FILE).is_file():
        return
    resume = _wanted_checkpoint(training.resume_from_checkpoint)
    if resume is None or (resume in _NEWEST and not any(output.glob(f"{PREFIX_CHECKPOINT_DIR}-*"))):
        raise ValueError(
            f"output_dir = {output} holds a trained model; expected a folder without one; pass "
            "another --output_dir, --resume_from_checkpoint true to go on from its checkpoints if "
            "it has any, or --overwrite_output_dir true to replace it"
        )


def train_and_save(trainer: Any, output: Path, *arguments: Any) -> None:
    """Write down the settings, train on from where a killed run stopped, and save the model.

    Args:
        trainer: Of any method.
        output: Folder of the run.
        arguments: Settings for `save_run`.
    """
    resume = _same_checkpoint(output, trainer.args.resume_from_checkpoint)
    show_progress(trainer)
    if resume is not None and is_finished(Path(resume), trainer.args):
        trainer.train(resume_from_checkpoint=resume)  # reads the weights back
        if has_adapters_of(
            output, final_checkpoint(Path(resume), trainer.args)
        ):  # a gate may have been fitted to them since
            logger.log(
                NOTICE, "%s holds the model of this finished run: nothing is changed", output
            )
            return
    save_run(output, *arguments)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(str(output))
    took = clock(time.perf_counter() - started)
    logger.log(NOTICE, "Trained %d steps in %s: %s", trainer.state.global_step, took, output)


def publish(trainer: Any, output: Path) -> None:
    """Write the card of a run's model, and push both to the hub if the run was asked to.

    Every process calls it, when the run is done.

    Args:
        trainer: Of any method.
        output: Folder of the run.
    """
    processes = join_processes()
    if processes.is_main_process:
        is_pushed = trainer.args.push_to_hub
        write_card(output, name=trainer.hub_model_id if is_pushed else None)
        if is_pushed:
            trainer.push_to_hub()
    processes.wait_for_everyone()


def _plain(arguments: Any) -> Any:
    if hasattr(arguments, "to_dict"):  # TrainingArguments hides tokens in it
        return json.loads(json.dumps(arguments.to_dict(), default=str))
    if is_dataclass(arguments) and not isinstance(arguments, type):
        return json.loads(json.dumps(asdict(arguments), default=str))
    return arguments


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """Return the commit of the working tree, with "-dirty" if it was changed; None outside git."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _same_checkpoint(output: Path, resume: str | bool | None) -> str | None:
    """Return what `checkpoint_to_resume` finds, as the first process sees the disk, on all."""
    found: str | Exception | None = None
    if join_processes().is_main_process:
        try:
            found = checkpoint_to_resume(output, resume)
        except (ValueError, OSError) as error:
            found = error
    found = gather_objects(found)[0]
    if isinstance(found, Exception):
        raise found
    return found


def _wanted_checkpoint(resume: str | bool | None) -> str | None:
    """Return a path, one of `_NEWEST`, or None: YAML gives true as a bool, a flag as a word."""
    resume = str(resume)
    known = resume.lower()
    return None if known in ("false", "none", "") else known if known in _NEWEST else resume


def checkpoint_to_resume(output_dir: str | Path, resume: str | bool | None) -> str | None:
    """Return the checkpoint to resume from: a path, the newest whole one for "true", or None.

    Raises:
        FileNotFoundError: If a path is given that is no folder.
        ValueError: If the checkpoint at a given path is damaged.
    """
    resume = _wanted_checkpoint(resume)
    if resume is None:
        return None
    if resume in _NEWEST:
        last = newest_whole(Path(output_dir))
        if last is None:
            logger.warning("No checkpoint in %s to resume from; starting at step 0", output_dir)
            return None
        logger.log(NOTICE, "Resuming from %s", last)
        return str(last)
    if not Path(resume).is_dir():
        raise FileNotFoundError(
            f"resume_from_checkpoint = {resume!r} is no folder; expected a checkpoint-N folder, or "
            "true for the last one in output_dir; correct the path"
        )
    damage = damage_of(Path(resume))
    if damage is not None and (Path(resume) / SEAL_FILE).exists():
        raise ValueError(
            f"resume_from_checkpoint = {resume}: {damage}; expected a whole checkpoint; resume "
            "from an older one, or pass true for the newest whole one in output_dir"
        )
    if damage is not None:
        logger.warning("%s cannot be checked: %s, or it is of an earlier version", resume, damage)
    return resume
