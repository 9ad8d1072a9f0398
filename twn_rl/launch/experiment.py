"""Recipes as processes of their own, for each seed of a comparison; finished ones are kept.

Refuses to know what a recipe does, beyond the folders it writes and rests on.
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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from twn_rl.evaluation.seed_tables import save_arms
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import packaged, read_settings
from twn_rl.launch.run_folder import save_run, set_up_logging
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
EVALUATION_FOLDER = "evaluation"


@dataclass
class ExperimentArguments:
    """Seeds, folder and processes of a comparison.

    Attributes:
        output_dir: Where all runs go.
        seeds: Seeds; three or more.
        threads: Run every seed once for each of these numbers of threads. (One and two threads gave
            the demo bit-equal runs.) Default: once, as many as torch takes.
        perturbations: Run every seed once for each of these numbers. From each but 0 the warm
            start's initial weights are changed in their last bits, as sums differ on another
            processor: how far such runs of one seed end apart is what a stranger's machine may add
            to the spread over seeds.
        parallel: Runs trained side by side.
        launcher: Arguments of accelerate launch, such as --config_file
            recipes/accelerate/zero2.yaml.
    """

    output_dir: str = "outputs/experiment"
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    threads: list[int] | None = None
    perturbations: list[int] = field(default_factory=lambda: [0])
    parallel: int = 1
    launcher: list[str] = field(default_factory=lambda: ["--num_processes", "1"])


@dataclass(frozen=True)
class Seed:
    """One run of an experiment: a seed, on how many threads, from weights changed how.

    Attributes:
        number: The seed.
        root: Folder of its stages.
        data: Records, the same for every stage of the seed.
        threads: Threads of its stages; None leaves them to torch.
        perturbation: What the initial weights' last bits are drawn from; 0 leaves them.
    """

    number: int
    root: Path
    data: DataArguments
    threads: int | None = None
    perturbation: int = 0

    @property
    def data_settings(self) -> dict[str, Any]:
        """The records, as settings of a stage."""
        return asdict(self.data)

    @property
    def settings(self) -> dict[str, Any]:
        """Records and seed, as settings of a stage."""
        return {**self.data_settings, "seed": self.number}

    @property
    def initial_settings(self) -> dict[str, Any]:
        """The same, of the stage that makes the adapters."""
        return {**self.settings, "perturbation": self.perturbation or None}


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


def evaluation(model: Path, seed: Seed, modes: Sequence[str], **settings: Any) -> Stage:
    """Return the stage that measures a model in some modes, in a folder of the model's."""
    folder = model / EVALUATION_FOLDER
    own = {"model": model, "output_dir": folder, **seed.data_settings, "report": False}
    return Stage("eval_embed", folder, {**own, "modes": modes, **settings}, is_cheap=True)


def decider(
    recipe: str, model: Path, folder: str, seed: Seed, *, config: str | None = None
) -> Stage:
    """Return the stage that fits what decides when a model thinks, which outdates its figures."""
    settings = {"config": config, "model": model, **seed.settings}
    outdates = (model / EVALUATION_FOLDER,)
    return Stage(recipe, model / folder, settings, is_cheap=True, outdates=outdates)


def run_experiment(
    script: ExperimentArguments, data: DataArguments, plan: Callable[[Seed], Iterable[Stage]]
) -> list[Seed]:
    """Run the stages that `plan` names for each run, in order; return the runs.

    Raises:
        ValueError: If a number of threads is below 1.
    """
    set_up_logging()
    output = Path(script.output_dir)
    save_run(output, script, data)
    seeds = list(runs_of(script, data))

    def run(seed: Seed) -> None:
        for stage in plan(seed):
            stage.run(script.launcher, threads=seed.threads)

    with ThreadPoolExecutor(max_workers=script.parallel) as pool:
        list(pool.map(run, seeds))
    return seeds


def report_arms(
    script: ExperimentArguments, seeds: Sequence[Seed], models: Mapping[str, str]
) -> Path:
    """Write and log the tables of what was measured on each arm; return the folder.

    Runs of one seed are not independent: where a seed has several among others, their spread is in
    tables of their own (`runs_of_seed*`).

    Args:
        script: Where the tables go, and what the runs were.
        seeds: The runs.
        models: Arm -> its model's folder in that of a run.
    """
    output = Path(script.output_dir)

    def save(folder: Path, runs: Sequence[Seed]) -> str:
        places = {a: [r.root / m / EVALUATION_FOLDER for r in runs] for a, m in models.items()}
        return save_arms(folder, places)

    text = save(output, seeds)
    for number in script.seeds:
        own = [seed for seed in seeds if seed.number == number]
        if 1 < len(own) < len(seeds):
            save(output / f"runs_of_seed{number}", own)
    logger.log(NOTICE, "Mean and standard deviation over %s:\n%s", told_runs(script), text)
    return output


def told_runs(script: ExperimentArguments) -> str:
    """Return what the runs of a comparison are, in words.

    >>> told_runs(ExperimentArguments(seeds=[0, 1], threads=[1], perturbations=[0, 7]))
    'seeds [0, 1], each on [1] threads, each with last bits changed by [0, 7]'
    """
    text = f"seeds {script.seeds}"
    if script.threads:
        text += f", each on {script.threads} threads"
    if script.perturbations != [0]:
        text += f", each with last bits changed by {script.perturbations}"
    return text


def runs_of(script: ExperimentArguments, data: DataArguments) -> Iterator[Seed]:
    """Yield every run of every seed; those of one seed have equal records."""
    if any(threads < 1 for threads in script.threads or ()):
        raise ValueError(f"threads {script.threads}; expected numbers from 1; remove the others")
    runs = product(script.perturbations, script.threads or [None], script.seeds)
    for perturbation, threads, number in runs:
        name = f"seed{number}" if threads is None else f"seed{number}_threads{threads}"
        name += f"_perturbed{perturbation}" if perturbation else ""
        root = Path(script.output_dir) / name
        yield Seed(number, root, data.of_seed(root, number), threads, perturbation)


def seconds_of(target: Path) -> float:
    """Return the wall-clock seconds of a finished stage."""
    return json.loads((target / FINISHED_FILE).read_text(encoding="utf-8"))["seconds"]
