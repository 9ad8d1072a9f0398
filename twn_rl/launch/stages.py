"""Runs recipes as processes of their own, each once: finished stages are kept between runs.

Knows folders and flags; not what a recipe does.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

FINISHED_FILE = "finished.json"


@dataclass(frozen=True)
class Stages:
    """How recipes are started.

    Attributes:
        recipes: Folder of the recipes.
        launcher: Arguments of accelerate launch.
    """

    recipes: Path
    launcher: Sequence[str] = ("--num_processes", "1")

    def run(
        self, recipe: str, flags: Sequence[str], target: Path, *, is_cheap: bool = False
    ) -> bool:
        """Run one recipe to its end with its own log file; return False if it had been run before.

        Args:
            recipe: File name.
            flags: Its flags; a finished stage of other flags is kept with a warning.
            target: Folder of the stage.
            is_cheap: Run a finished stage of other flags again instead of keeping it.

        Raises:
            RuntimeError: If the recipe fails; the message ends with its log.
        """
        done = target / FINISHED_FILE
        if done.exists():
            is_same = finished_flags(done, recipe) == list(flags)
            if is_same:
                logger.info("Kept %s", target)
                return False
            if not is_cheap:
                logger.warning("Kept %s, which was run with other flags: see %s", target, done)
                return False
            logger.info("%s was run with other flags: running it again", target)
            forget(target)
        target.mkdir(parents=True, exist_ok=True)
        for outdated in target.glob(f"*/{FINISHED_FILE}"):  # measured on what was there
            forget(outdated.parent)
        command = [sys.executable, "-m", "accelerate.commands.launch", *self.launcher]
        command += [str(self.recipes / recipe), *flags]
        logger.info("Running %s, log in %s", target, target / "log.txt")
        started = time.perf_counter()
        with (target / "log.txt").open("w", encoding="utf-8") as log:
            status = subprocess.run(
                command, stdout=log, stderr=subprocess.STDOUT, check=False
            ).returncode
        if status != 0:
            tail = (target / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
            raise RuntimeError(
                f"{recipe} for {target} ended with status {status}; expected 0; "
                f"see {target / 'log.txt'}:\n{tail}"
            )
        seconds = time.perf_counter() - started
        write_text(done, json.dumps({"command": command, "seconds": seconds}))
        return True


def finished_flags(done: Path, recipe: str) -> list[str]:
    """Return the flags that a finished stage gave its recipe."""
    command = json.loads(done.read_text(encoding="utf-8"))["command"]
    names = [Path(word).name for word in command]
    return command[names.index(recipe) + 1 :]


def forget(target: Path) -> None:
    """Let a stage run again, finished or not: what it rests on is no longer the same."""
    (target / FINISHED_FILE).unlink(missing_ok=True)


def seconds_of(target: Path) -> float:
    """Return the wall-clock seconds of a finished stage."""
    return json.loads((target / FINISHED_FILE).read_text(encoding="utf-8"))["seconds"]
