"""Seeds and stages of comparisons, for tests."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import Seed
from twn_rl.launch.stage import Stage

Launched = Callable[[], list[list[str]]]


def seed_in(folder: Path, number: int = 3, **data: object) -> Seed:
    """Return a seed whose runs and records lie in a folder."""
    own = replace(DataArguments(), **data).of_seed(folder, number)  # pyright: ignore[reportArgumentType]
    return Seed(number, folder, own)


def places(stages: list[Stage], root: Path) -> list[tuple[str, str]]:
    """Return the recipe and the folder of every stage."""
    return [(stage.recipe, str(stage.target.relative_to(root))) for stage in stages]


def run_stages(stages: list[Stage]) -> None:
    """Run stages one after the other."""
    for stage in stages:
        stage.run(["--quiet"])
