"""Recipes as child processes that are run once and kept; knows no recipe by name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from twn_rl.evaluation.results import write_text

logger = logging.getLogger(__name__)

FINISHED_FILE = "finished.json"


def launch(launcher: Sequence[str], recipe: Path, flags: list[str], target: Path) -> bool:
    """Run one recipe to its end with its own log file; return False if it had been run before.

    Args:
        launcher: Arguments of `accelerate launch`.
        recipe: Script to run.
        flags: Its arguments.
        target: Folder of what it writes; it gets `log.txt` and, in the end, `finished.json`.

    Raises:
        RuntimeError: If the recipe fails; the message ends with its log.
    """
    done = target / FINISHED_FILE
    if done.exists():
        if finished_flags(done, recipe.name) != flags:
            logger.warning("Kept %s, which was run with other flags: see %s", target, done)
        else:
            logger.info("Kept %s", target)
        return False
    target.mkdir(parents=True, exist_ok=True)
    for outdated in target.glob(f"*/{FINISHED_FILE}"):  # fitted to or measured on what was there
        outdated.unlink()
    command = [sys.executable, "-m", "accelerate.commands.launch", *launcher, str(recipe), *flags]
    logger.info("Running %s, log in %s", target, target / "log.txt")
    started = time.perf_counter()
    with (target / "log.txt").open("w", encoding="utf-8") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status != 0:
        tail = (target / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(
            f"{recipe.name} for {target} ended with status {status}; expected 0; "
            f"see {target / 'log.txt'}:\n{tail}"
        )
    seconds = time.perf_counter() - started
    write_text(done, json.dumps({"command": command, "seconds": seconds}))
    return True


def finished_flags(done: Path, recipe: str) -> list[str]:
    """Return the flags that a finished run gave its recipe."""
    command = json.loads(done.read_text(encoding="utf-8"))["command"]
    names = [Path(word).name for word in command]
    return command[names.index(recipe) + 1 :]


def drop_if_outdated(done: Path, recipe: str, flags: list[str]) -> None:
    """Forget a finished run of other flags; only for runs that are cheap next to training."""
    if done.exists() and finished_flags(done, recipe) != flags:
        logger.info("%s was run with other flags: running it again", done.parent)
        done.unlink()
