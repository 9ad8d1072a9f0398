"""The stages of every run of a comparison, and the tables over its runs; finished ones are kept."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

from twn_rl.evaluation.seed_tables import save_arms
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.launch.stage import Stage
from twn_rl.runtime.log_levels import NOTICE

logger = logging.getLogger(__name__)

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
