"""Does it pay to select what is taught? SFT on all CoTs, on random ones, on selected ones.

Every seed has the same records with several drafted CoTs each, some of them wrong. Every arm is
one warm start on them: `all` meets all drafts in turn, `random` one drawn draft a record,
`selected` the one that pair-aware selection kept (MMEmb-R1, 2604.06156), or none. Steps, seed and
order of the records are equal: every arm's file holds each record `num_drafts` times. The model
that selects is arm `all` of the same seed.

    twn-rl compare-selection
    twn-rl compare-selection --seeds 0 --max_steps 200 --output_dir outputs/quick

Without arguments it reads recipes/configs/demo_selection.yaml. Writes summary.json ({arm: {metric
key: {mean, std, values}}}), tables, a plot and selection.json, which says how many wrong CoTs were
rejected. Finished runs are kept: the same command goes on where it was stopped. A seed costs three
warm starts, about 20 minutes on two CPU cores.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twn_rl.evaluation.seed_tables import describe
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import (
    ExperimentArguments,
    Seed,
    evaluation,
    report_arms,
    run_experiment,
)
from twn_rl.launch.program import start
from twn_rl.launch.stage import Stage
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.whole_files import write_json

logger = logging.getLogger(__name__)

DEFAULT_CONFIG = "recipes/configs/demo_selection.yaml"
# Arm -> rule of `select_thoughts`. The first one judges, so it is trained first.
RULES = {"all": "all", "random": "random", "selected": "best"}
JUDGE = "all"
MODES = ("never", "always", "sampled", "gold")


@dataclass
class SelectionArguments(ExperimentArguments):
    """Arms, and what is selected from.

    Attributes:
        output_dir: Where all runs go.
        num_drafts: Drafts a record, and copies of it in every arm.
        draft_files: JSON lines {id, cot}; default: the emoji scenes' noisy teachers.
        evaluator: margin or yes_no.
        threshold: Smallest worth of a CoT.
        min_match: Smallest match with the CoT; null: off.
        sft_config: YAML of the warm starts.
        max_steps: Steps of every warm start; default: the YAML's.
    """

    output_dir: str = "outputs/compare_selection"
    arms: list[str] = field(
        default_factory=lambda: list(RULES),
        metadata={"help": f"Some of {', '.join(RULES)}; selected needs all, which judges."},
    )
    num_drafts: int = 4
    draft_files: list[str] = field(default_factory=list)
    evaluator: str = "margin"
    threshold: float = -0.05
    min_match: float | None = None
    sft_config: str = "recipes/configs/demo_sft.yaml"
    max_steps: int | None = None

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems, arms = Problems(), set(self.arms)
        problems.unless(
            arms and arms <= set(RULES), f"arms = {self.arms}, expected some of {list(RULES)}"
        )
        problems.unless(
            "selected" not in arms or JUDGE in arms,
            f"arms = {self.arms}, expected {JUDGE!r} too: its model selects",
        )
        problems.expect(self, ">= 1", "num_drafts")
        problems.refuse("SelectionArguments")


def main(script: SelectionArguments, data: DataArguments) -> Path:
    """Select, train and evaluate every arm for every seed, then summarise."""
    seeds = run_experiment(script, data, lambda seed: plan(script, seed))
    output, arms = Path(script.output_dir), [arm for arm in RULES if arm in script.arms]
    report_arms(script, seeds, {arm: arm for arm in arms})
    if "selected" in arms:
        found = selection_summary([thoughts_folder(seed.root, "selected") for seed in seeds])
        write_json(output / "selection.json", found, indent=1)
        logger.log(NOTICE, "Selection: %s", json.dumps(found.get("all", found)))
    return output


def plan(script: SelectionArguments, seed: Seed) -> Iterator[Stage]:
    """Yield, arm by arm, what writes its records, trains on them and evaluates."""
    for arm in (arm for arm in RULES if arm in script.arms):
        thoughts, model = thoughts_folder(seed.root, arm), seed.root / arm
        settings = {**selection_settings(script, seed, arm), **seed.data_settings}
        yield Stage("select_thoughts", thoughts, settings, is_cheap=True, outdates=(model,))
        taught = {
            "config": script.sft_config,
            "output_dir": model,
            "train_file": thoughts / "selected.jsonl",
            "data_root": data_root(seed),
            "max_steps": script.max_steps,
            "seed": seed.number,
            "perturbation": seed.perturbation or None,
        }
        # Worth and vectors that an earlier judge gave are no longer true.
        judged = (thoughts_folder(seed.root, "selected"),) if arm == JUDGE else ()
        yield Stage("sft_embed", model, taught, removes=judged)
        yield evaluation(model, seed, MODES, num_thoughts=2)


def selection_settings(script: SelectionArguments, seed: Seed, arm: str) -> dict[str, Any]:
    """Return what `select_thoughts` is to do for one arm; drafts are the same for all."""
    settings = {
        "output_dir": thoughts_folder(seed.root, arm),
        "rule": RULES[arm],
        "copies": script.num_drafts,
        "seed": seed.number,
        "draft_files": script.draft_files,
        "demo_teachers": None if script.draft_files else script.num_drafts,
    }
    if arm == "selected":
        settings |= {
            "model": seed.root / JUDGE,
            "evaluator": script.evaluator,
            "threshold": script.threshold,
            "min_match": script.min_match,
        }
    return settings


def thoughts_folder(root: Path, arm: str) -> Path:
    """Return where an arm's records are."""
    return root / f"{arm}_thoughts"


def data_root(seed: Seed) -> str:
    """Return the folder that image paths of an arm's records are relative to."""
    if seed.data.is_demo():
        return seed.data.demo_dir
    return seed.data.data_root or str(Path(seed.data.train_file or "").parent)


def selection_summary(folders: Sequence[Path]) -> dict[str, Any]:
    """Return group -> measure -> mean, std and values of telling wrong CoTs from right ones."""
    reports = [json.loads((f / "report.json").read_text(encoding="utf-8")) for f in folders]
    if not all("noise" in report for report in reports):
        return {"fates": [report["fates"] for report in reports]}
    return {
        group: {
            name: describe([float(report["noise"][group][name]) for report in reports])
            for name, value in measures.items()
            if value is not None and all(r["noise"][group][name] is not None for r in reports)
        }
        for group, measures in reports[0]["noise"].items()
        if all(group in report["noise"] for report in reports)
    }


if __name__ == "__main__":
    start(
        main,
        (SelectionArguments, DataArguments),
        default_config=DEFAULT_CONFIG,
        description=__doc__,
    )
