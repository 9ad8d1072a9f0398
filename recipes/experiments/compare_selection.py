"""Does it pay to select what is taught? SFT on all CoTs, on random ones, on selected ones.

Every seed has the same records with several candidate CoTs each, some of them wrong. Every arm is
one warm start on them: `all` meets all candidates in turn, `random` one drawn candidate a record,
`selected` the one that pair-aware selection kept (MMEmb-R1, 2604.06156), or none. Steps, seed and
order of the records are equal: every arm's file holds each record `num_candidates` times. The model
that selects is arm `all` of the same seed.

    python recipes/experiments/compare_selection.py
    python recipes/experiments/compare_selection.py --seeds 0 --max_steps 200 --output_dir outputs/q

Without arguments it reads recipes/configs/demo_selection.yaml. Writes summary.json ({arm: {metric
key: {mean, std, values}}}), tables, a plot and selection.json, which says how many wrong CoTs were
rejected. Finished runs are kept: the same command goes on where it was stopped. A seed costs three
warm starts, about 20 minutes on two CPU cores.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twn_rl.evaluation.seed_tables import describe, plot_summary, summarize_runs, tables
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.launch.stages import Stages, forget
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1]
DEFAULT_CONFIG = RECIPES / "configs" / "demo_selection.yaml"
ARMS = ("all", "random", "selected")
RULES = {"all": "all", "random": "random", "selected": "best"}
JUDGE = "all"
EVALUATION_FOLDER = "evaluation"
EVALUATION_MODES = ("never", "always", "sampled", "gold")


@dataclass
class CompareArguments:
    """Arms, seeds and what is selected from."""

    output_dir: str = field(
        default="outputs/compare_selection", metadata={"help": "Where all runs go."}
    )
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; three or more."}
    )
    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={"help": f"Some of {', '.join(ARMS)}; selected needs all, which judges."},
    )
    num_candidates: int = field(
        default=4, metadata={"help": "Candidates a record, and copies of it in every arm."}
    )
    candidate_files: list[str] = field(
        default_factory=list,
        metadata={"help": "JSON lines {id, cot}; default: the emoji scenes' noisy teachers."},
    )
    evaluator: str = field(default="margin", metadata={"help": "margin or yes_no."})
    threshold: float = field(default=-0.05, metadata={"help": "Smallest worth of a CoT."})
    min_match: float | None = field(
        default=None, metadata={"help": "Smallest match with the CoT; null: off."}
    )
    sft_config: str = field(
        default=str(RECIPES / "configs" / "demo_sft.yaml"),
        metadata={"help": "YAML of the warm starts."},
    )
    max_steps: int | None = field(
        default=None, metadata={"help": "Steps of every warm start; default: the YAML's."}
    )
    parallel: int = field(default=1, metadata={"help": "Seeds trained side by side."})
    launcher: list[str] = field(
        default_factory=lambda: ["--num_processes", "1"],
        metadata={"help": "Arguments of accelerate launch."},
    )

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = []
        if not self.arms or not set(self.arms) <= set(ARMS):
            problems.append(f"arms = {self.arms}, expected some of {list(ARMS)}")
        if "selected" in self.arms and JUDGE not in self.arms:
            problems.append(f"arms = {self.arms}, expected {JUDGE!r} too: its model selects")
        if self.num_candidates < 1:
            problems.append(f"num_candidates = {self.num_candidates}, expected >= 1")
        if problems:
            raise ValueError("CompareArguments: " + "; ".join(problems) + "; change these fields")


def main(script: CompareArguments, data: DataArguments) -> Path:
    """Select, train and evaluate every arm for every seed, then summarise."""
    set_up_logging()
    output = Path(script.output_dir)
    save_run(output, script, data)
    with ThreadPoolExecutor(max_workers=script.parallel) as pool:
        list(pool.map(lambda seed: run_seed(script, data, seed), script.seeds))
    arms = [arm for arm in ARMS if arm in script.arms]
    roots = [output / f"seed{seed}" for seed in script.seeds]
    summary = summarize_runs({arm: [r / arm / EVALUATION_FOLDER for r in roots] for arm in arms})
    write_text(output / "summary.json", json.dumps(summary, indent=1))
    plot_summary(summary, output / "summary.png")
    text = tables(summary)
    write_text(output / "summary.md", text)
    logger.info("Mean and standard deviation over seeds %s:\n%s", script.seeds, text)
    if "selected" in arms:
        found = selection_summary([thoughts_folder(root, "selected") for root in roots])
        write_text(output / "selection.json", json.dumps(found, indent=1))
        logger.info("Selection: %s", json.dumps(found.get("all", found)))
    return output


def run_seed(script: CompareArguments, data: DataArguments, seed: int) -> None:
    """Write each arm's records, train on them, evaluate; `all` comes first, since it judges."""
    root = Path(script.output_dir) / f"seed{seed}"
    shared, stages = data.flags_of_seed(root, seed), Stages(RECIPES, script.launcher)
    for arm in (arm for arm in ARMS if arm in script.arms):
        thoughts, model = thoughts_folder(root, arm), root / arm
        flags = [*selection_flags(script, root, arm, seed), *shared]
        if stages.run("select_thoughts.py", flags, thoughts, is_cheap=True):
            forget(model)  # it learned from other thoughts
        taught = {
            "config": script.sft_config,
            "output_dir": str(model),
            "train_file": str(thoughts / "selected.jsonl"),
            "data_root": data_root(data, root),
            "max_steps": script.max_steps,
            "seed": seed,
        }
        is_new = stages.run("sft_embed.py", flags_of(taught), model)
        if is_new and arm == JUDGE:  # worth and vectors of an earlier judge
            shutil.rmtree(thoughts_folder(root, "selected"), ignore_errors=True)
        measured = model / EVALUATION_FOLDER
        flags = [f"--model={model}", f"--output_dir={measured}", *shared, "--report=false"]
        flags += ["--modes", *EVALUATION_MODES, "--num_thoughts=2"]
        stages.run("eval_embed.py", flags, measured, is_cheap=True)


def selection_flags(script: CompareArguments, root: Path, arm: str, seed: int) -> list[str]:
    """Return what `select_thoughts.py` is to do for one arm; candidates are the same for all."""
    flags = flags_of(
        {
            "output_dir": str(thoughts_folder(root, arm)),
            "rule": RULES[arm],
            "copies": script.num_candidates,
            "seed": seed,
        }
    )
    if script.candidate_files:
        flags += ["--candidate_files", *script.candidate_files]
    else:
        flags += [f"--demo_teachers={script.num_candidates}"]
    if arm == "selected":
        judging = {
            "model": str(root / JUDGE),
            "evaluator": script.evaluator,
            "threshold": script.threshold,
            "min_match": script.min_match,
        }
        flags += flags_of(judging)
    return flags


def flags_of(settings: dict[str, Any]) -> list[str]:
    """Return settings as flags, None left out.

    >>> flags_of({"seed": 0, "max_steps": None})
    ['--seed=0']
    """
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def thoughts_folder(root: Path, arm: str) -> Path:
    """Return where an arm's records are."""
    return root / f"{arm}_thoughts"


def data_root(data: DataArguments, root: Path) -> str:
    """Return the folder that image paths of an arm's records are relative to."""
    if data.is_demo():
        return str(root / "data")
    return data.data_root or str(Path(data.train_file or "").parent)


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
    main(
        *parse_arguments(
            (CompareArguments, DataArguments),
            default_config=DEFAULT_CONFIG,
            description=__doc__,
        )
    )
