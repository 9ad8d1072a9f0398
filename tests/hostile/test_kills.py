"""Runs of every stage killed inside their saves, and what they are when they have gone on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from launching import farthest, launch_worker, skip_without_compiler

from hostile.table import Tally, Verdict
from twn_rl.training.whole_checkpoints import newest_whole

WORKER = Path(__file__).parents[1] / "kill_worker.py"
# Stage, process that is killed, and the point of its save; the second process writes little.
ZERO_KILLS = (("sft", 0, 23), ("grpo", 0, 4), ("adaptive", 1, 0), ("latent", 0, 41))
STAGES = ("sft", "grpo", "adaptive", "latent", "gate")
KILLED = -9


def kills(folder: Path, stages: tuple[str, ...], count: int, tally: Tally) -> None:
    """Kill and resume in a process of its own, and judge each."""
    flags = ["--stages", *stages, "--kills", str(count)]
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder / "kills"), *flags],
        cwd=WORKER.parent,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=3000,
        check=False,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for line in (folder / "kills" / "kills.jsonl").read_text().splitlines():
        said = json.loads(line)
        assert said["killed"] == KILLED, said  # it did happen
        verdict = Verdict.HANDLED
        if said["resumed"] != 0:
            verdict = Verdict.LOST
        elif not said["from"] or not said["same"]:
            verdict = Verdict.MIXED
        tally.add("kills inside a save", said["case"], verdict, done.stderr[-1500:])


@pytest.mark.slow
@pytest.mark.distributed
def test_a_warm_start_killed_inside_a_save_goes_on_to_the_same_weights(
    tally: Tally, tmp_path: Path
) -> None:
    kills(tmp_path, ("sft",), 1, tally)
    tally.check(at_least=1)


@pytest.mark.campaign
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_goes_on_after_kills_inside_its_saves(
    stage: str, tally: Tally, tmp_path: Path
) -> None:
    kills(tmp_path, (stage,), 4 if stage != "gate" else 3, tally)
    tally.check(at_least=3)


@pytest.mark.campaign
@pytest.mark.distributed
@pytest.mark.parametrize("config", ["zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_sharded_runs_go_on_after_kills_of_one_process_inside_its_saves(
    config: str, tally: Tally, tmp_path: Path
) -> None:
    skip_without_compiler(config)
    stages = [stage for stage, _, _ in ZERO_KILLS]
    launch_worker(tmp_path / "unbroken", config, "--stages", *stages)
    folder, before, resumed_from = tmp_path / "killed", "", "checkpoint-2"
    for stage, rank, point in (*ZERO_KILLS, ("", 0, 0)):
        # One launch goes on with the stage that was killed before, and kills the next one.
        words = [word for word in (before, stage) if word]
        flags = ["--stages", *words, "--resume", *words[: bool(before)]]
        flags += ["--kill", *([stage] if stage else [])]
        places = {"WORKER_KILL_POINT": str(point), "WORKER_KILL_RANK": str(rank)}
        places["WORKER_RESUMES_FROM"] = resumed_from
        launch_worker(folder, config, *flags, fails=bool(stage), environment=places)
        if before:
            same = farthest(folder / before, tmp_path / "unbroken" / before) == 0.0
            verdict = Verdict.HANDLED if same else Verdict.MIXED
            tally.add("kills inside a save", f"{config}, {before}, from {resumed_from}", verdict)
        if stage:
            assert not (folder / stage / "report.json").exists()
            found = newest_whole(folder / stage)
            assert found is not None
            resumed_from = found.name
        before = stage
    tally.check(at_least=len(ZERO_KILLS))
