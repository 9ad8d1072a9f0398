"""Kills runs of every stage inside their saves, resumes them, and says how they ended.

A process of its own, which trains nothing itself: every run is a fork of it, so that libraries are
loaded once. Started by tests/hostile/test_kills.py; writes one line of JSON a kill.
"""

import argparse
import json
import os
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from save_kills import KillPoints
from zero_worker import STAGES, write_data

from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.run_folder import checkpoint_to_resume, train_and_save
from twn_rl.recipes import gate_embed
from twn_rl.runtime.whole_files import file_digest
from twn_rl.training.whole_checkpoints import damage_of

GATE = "gate"


def in_fork(body: Callable[[], None]) -> int:
    """Run the body in a fork and return how it ended: 0, or the number of a signal below 0."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def train(stage: str, folder: Path, data: Any, resume: bool) -> None:
    """Train one stage, or go on with it, and save it."""
    torch.manual_seed(0)
    trainer: Any = STAGES[stage](folder, data, use_cpu=True, resume_from_checkpoint=str(resume))
    train_and_save(trainer, folder)


def fit_gate(folder: Path, root: Path) -> None:
    """Fit the gate of the model in a folder by its recipe."""
    script = gate_embed.GateScriptArguments(model=str(folder), max_examples=24, batch_size=8)
    data = DataArguments(demo_dir=str(root / "demo"), demo_scale=0.01)
    gate_embed.main(script, ThresholdRule(), data)


def weights_of(folder: Path) -> dict[str, str]:
    """Return what a finished run left, by its digests."""
    found = {str(f.relative_to(folder)): f for f in folder.glob("*/adapter_model.safetensors")}
    found |= {f.name: f for f in folder.glob("gate.safetensors")}
    settings = json.loads((folder / "twn_config.json").read_text())
    threshold = {"threshold": str(settings["gate_threshold"])}
    return {name: file_digest(file) for name, file in found.items()} | threshold


def newest(folder: Path) -> str | None:
    """Return the checkpoint that should be gone on from, found without the code under test."""
    whole = [n for n in (2, 4) if damage_of(folder / f"checkpoint-{n}") is None]
    return str(folder / f"checkpoint-{whole[-1]}") if whole else None


def kill_and_resume(stage: str, root: Path, data: Any, seed: int, points: int) -> dict[str, Any]:
    """End one run at a drawn point of its saves, go on, and compare with the unbroken run."""
    rng = Random(f"{stage} {seed}")
    point, is_torn = rng.randrange(points), bool(rng.randrange(2))
    folder = root / f"{stage}-{seed}"
    run = runner(stage, folder, root, data)

    def broken() -> None:
        KillPoints(folder, begin_of(stage), point=point, is_torn=is_torn)
        run(False)

    killed = in_fork(broken)
    expected = None if stage == GATE else newest(folder)
    found = None if stage == GATE else checkpoint_to_resume(folder, "true")
    resumed = in_fork(lambda: run(True))
    same = resumed == 0 and weights_of(folder) == weights_of(root / stage)
    return {
        "case": f"{stage}, point {point} of {points}{', torn' if is_torn else ''}",
        "killed": killed,
        "resumed": resumed,
        "from": found == expected,
        "same": same,
    }


def begin_of(stage: str) -> str:
    """Return the path from which on points are counted: the last checkpoint, then the model."""
    return "" if stage == GATE else "checkpoint-4"


def runner(stage: str, folder: Path, root: Path, data: Any) -> Callable[[bool], None]:
    """Return what runs a stage in a folder, from the start or going on."""
    folder.mkdir(parents=True, exist_ok=True)
    if stage != GATE:
        return lambda resume: train(stage, folder, data, resume)
    if not (folder / "twn_config.json").exists():
        settings = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6)
        in_fork(lambda: settings.build(0).save_pretrained(folder))
    return lambda resume: fit_gate(folder, root)


def main() -> None:
    """Run all stages that were asked for."""
    parser = argparse.ArgumentParser()
    parser.add_argument("root", type=Path)
    parser.add_argument("--stages", nargs="+", default=[*STAGES, GATE])
    parser.add_argument("--kills", type=int, default=3)
    options = parser.parse_args()
    root: Path = options.root
    (root / "data").mkdir(parents=True)
    data = write_data(root / "data")
    for stage in options.stages:
        run = runner(stage, root / stage, root, data)
        count = root / f"{stage}.points"

        def unbroken(
            run: Any = run, stage: str = stage, folder: Path = root / stage, count: Path = count
        ) -> None:
            points = KillPoints(folder, begin_of(stage), point=None)
            run(False)
            count.write_text(str(points.seen))

        assert in_fork(unbroken) == 0, stage
        for seed in range(options.kills):
            said = kill_and_resume(stage, root, data, seed, int(count.read_text()))
            with (root / "kills.jsonl").open("a") as file:
                file.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    main()
