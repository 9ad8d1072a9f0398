"""One recipe as a process of its own, which is run again if what it rests on has changed.

Refuses to know what a recipe does, beyond the folder it writes and the models it rests on.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twn_rl.launch.parsing import packaged, read_settings
from twn_rl.modeling.checkpoint import adapter_digests
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.sharded_pass import differences
from twn_rl.runtime.whole_files import write_json

logger = logging.getLogger(__name__)

FINISHED_FILE = "finished.json"
# Stands in for it from the start of a stage to its end, and once what the stage rests on is new.
BEGUN_FILE = "begun.json"
# Recipes that do not train over a model unless they are told to.
TRAINING_RECIPES = ("sft_embed", "grpo_embed", "adaptive_embed", "latent_embed", "expert_iteration")
# Flags that name the folder of a model on which a stage rests.
MODEL_FLAGS = ("checkpoint", "warm_start", "model")


@dataclass(frozen=True)
class Stage:
    """One recipe that writes one folder.

    Attributes:
        recipe: Module in `twn_rl.recipes`, such as "sft_embed".
        target: Folder it writes.
        settings: Its flags by name; None leaves one out, a list gives several words.
        is_cheap: Run a finished stage of other settings or models again; otherwise it is kept with
            a warning.
        outdates: Folders that rest on what it writes: their stages run again after each run.
        removes: Folders that cannot go on from what it writes: removed after each run.
    """

    recipe: str
    target: Path
    settings: dict[str, Any]
    is_cheap: bool = False
    outdates: Sequence[Path] = ()
    removes: Sequence[Path] = ()

    @property
    def flags(self) -> list[str]:
        """Return its settings as words of a command.

        >>> Stage("sft_embed", Path(), {"a": 1, "b": None, "c": [2, 3], "d": False}).flags
        ['--a=1', '--c', '2', '3', '--d=false']
        """
        words = []
        for name, value in self.settings.items():
            if isinstance(value, bool):
                words.append(f"--{name}={str(value).lower()}")
            elif isinstance(value, (list, tuple)):
                words += [f"--{name}", *map(str, value)] if value else []
            elif value is not None:
                words.append(f"--{name}={value}")
        return words

    @property
    def basis(self) -> dict[str, Any]:
        """What its flags only name: the settings of its file that count, and models' weights."""
        basis: dict[str, Any] = {}
        if config := self.settings.get("config"):
            told = read_settings(str(config)).items()
            basis["config"] = {name: value for name, value in told if name not in self.settings}
        for name in MODEL_FLAGS:
            if (model := self.settings.get(name)) and (digests := adapter_digests(model)):
                basis[name] = digests
        return json.loads(json.dumps(basis, default=str))

    @property
    def finished_file(self) -> Path:
        """What tells that it ran to its end, and how."""
        return self.target / FINISHED_FILE

    @property
    def begun_file(self) -> Path:
        """What tells that the folder is a stage's, whose model may be trained over."""
        return self.target / BEGUN_FILE

    def run(
        self, launcher: Sequence[str], *, is_shown: bool = False, threads: int | None = None
    ) -> bool:
        """Run the recipe to its end; return False if it had been run before.

        Args:
            launcher: Arguments of accelerate launch.
            is_shown: Show what it prints instead of writing it to log.txt in its folder.
            threads: Threads of each process; None leaves them to torch.

        Raises:
            RuntimeError: If the recipe fails; the message ends with its log.
        """
        if self._is_kept():
            return False
        self.target.mkdir(parents=True, exist_ok=True)
        for outdated in self.target.glob(f"*/{FINISHED_FILE}"):  # measured on what was there
            _outdate(outdated)
        command = [sys.executable, "-m", "accelerate.commands.launch", *map(packaged, launcher)]
        command += ["-m", f"twn_rl.recipes.{self.recipe}", *self.flags]
        started, basis, log = time.perf_counter(), self.basis, self.target / "log.txt"
        told = ["--overwrite_output_dir=true"] if self._trains_over(command) else []
        if is_shown:
            logger.info("Running %s", self.target)
        else:
            logger.log(NOTICE, "Running %s, log in %s", self.target, log)
        status = _launch([*command, *told], None if is_shown else log, threads)
        if status != 0:
            where = "its output"
            if not is_shown:
                tail = log.read_text(encoding="utf-8", errors="replace")[-2000:]
                where = f"{log}:\n{tail}"
            raise RuntimeError(
                f"{self.recipe} for {self.target} ended with status {status}; expected 0; see "
                f"{where}"
            )
        for finished in (file for folder in self.outdates for file in folder.rglob(FINISHED_FILE)):
            _outdate(finished)
        for folder in self.removes:
            shutil.rmtree(folder, ignore_errors=True)
        seconds = time.perf_counter() - started
        finished = {"command": command, "seconds": seconds, "basis": basis}
        write_json(self.finished_file, finished)
        self.begun_file.unlink(missing_ok=True)
        return True

    def _trains_over(self, command: Sequence[str]) -> bool:
        """Note that the stage begins; tell whether a model in its folder is its own to replace."""
        if (self.target / CONFIG_FILE).exists() and not self.begun_file.exists():
            return False  # trained by hand: its recipe will say so
        write_json(self.begun_file, {"command": command})
        return self.recipe in TRAINING_RECIPES

    def _is_kept(self) -> bool:
        """Tell whether a finished run stands for this one."""
        if not self.finished_file.exists():
            return False
        finished = json.loads(self.finished_file.read_text(encoding="utf-8"))
        changed = self._changed(finished["command"])
        if "basis" in finished:  # earlier versions wrote none
            changed += differences(finished["basis"], self.basis)
        if not changed:
            logger.log(NOTICE, "Kept %s", self.target)
            return True
        if self.is_cheap:
            logger.info("%s was run with %s: running it again", self.target, "; ".join(changed))
            _outdate(self.finished_file)
            return False
        logger.warning(
            "Kept %s, which was run with %s: see %s; remove the folder to run it again",
            *(self.target, "; ".join(changed), self.finished_file),
        )
        return True

    def _changed(self, command: Sequence[str]) -> list[str]:
        """Return "other flags" if a finished command had others, in whatever order."""
        names = [re.split(r"[./]", word.removesuffix(".py"))[-1] for word in command]
        if self.recipe not in names:
            return ["other flags"]
        given = command[names.index(self.recipe) + 1 :]
        return [] if _by_flag(given) == _by_flag(self.flags) else ["other flags"]


def _launch(command: Sequence[str], log: Path | None, threads: int | None) -> int:
    """Run a command to its end, its output into a file or shown; return its status."""
    own = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    environment = {**os.environ, **own}
    if log is None:
        return subprocess.run(command, check=False, env=environment).returncode
    with log.open("w", encoding="utf-8") as file:
        return subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, check=False, env=environment
        ).returncode


def _outdate(finished: Path) -> None:
    """Let a finished stage run again, over the model that it left."""
    finished.replace(finished.with_name(BEGUN_FILE))


def _by_flag(words: Sequence[str]) -> list[list[str]]:
    """Return each flag with its values, sorted: their order means nothing.

    >>> _by_flag(["--b=1", "--a", "2", "3"])
    [['--a', '2', '3'], ['--b=1']]
    """
    flags: list[list[str]] = []
    for word in words:
        if word.startswith("--"):
            flags.append([word])
        else:
            flags[-1].append(word)
    return sorted(flags)


def seconds_of(target: Path) -> float:
    """Return the wall-clock seconds of a finished stage."""
    return json.loads((target / FINISHED_FILE).read_text(encoding="utf-8"))["seconds"]
