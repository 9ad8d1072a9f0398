"""What a run shows: stages, one line per interval, a summary that ends with the report's path."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from twn_rl.launch import progress
from twn_rl.launch.progress import STAGE_VARIABLE, ProgressLines, Stages
from twn_rl.launch.run_folder import set_up_logging
from twn_rl.launch.trackers import check_trackers, track_metrics
from twn_rl.runtime.log_levels import NOTICE

ROOT = Path(__file__).parents[2]
LOGS = {"reward": 0.5, "rollouts/hit@1": 0.25, "loss": 1.0, "grad_norm": 2.0}


def lines_of(
    steps: dict[int, float], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> list[str]:
    """Return the lines of a run of 100 steps that logs at (step: seconds)."""
    caplog.set_level("INFO")
    now = {"seconds": 0.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now["seconds"])
    watch: Any = ProgressLines("GRPO")
    state = SimpleNamespace(global_step=0, max_steps=100, is_world_process_zero=True)
    watch.on_train_begin(None, state, None)
    for step, seconds in steps.items():
        state.global_step, now["seconds"] = step, seconds
        watch.on_log(None, state, None, logs=dict(LOGS))
        watch.on_log(None, state, None, logs={"train_runtime": 3.0})
    return caplog.messages


def test_a_line_has_stage_time_left_and_three_figures(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(STAGE_VARIABLE, "2 of 4, RL")
    (line,) = lines_of({20: 20.0}, monkeypatch, caplog)
    assert line == "2 of 4, RL, 1:20 left: step 20 of 100: reward 0.5, hit@1 0.25, loss 1"


def test_there_is_one_line_per_interval_and_always_the_last(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv(STAGE_VARIABLE, "")
    steps = {step: float(step) for step in range(1, 101)}
    shown = [
        int(line.split("step ")[1].split()[0]) for line in lines_of(steps, monkeypatch, caplog)
    ]
    assert shown == [*range(1, 100, 10), 100]
    caplog.clear()  # a hundred times as long: a line every fortieth of it
    slow = {step: 100.0 * step for step in range(1, 101)}
    assert 30 < len(lines_of(slow, monkeypatch, caplog)) <= 41


def test_stages_are_counted_by_the_outermost_program(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    monkeypatch.setenv(STAGE_VARIABLE, "")
    stages = Stages(("warm start", True), ("RL", True), ("evaluation", False))
    stages.begin("RL")
    assert caplog.messages == ["Stage 2 of 2, RL"]
    assert ProgressLines("GRPO").name == "2 of 2, RL"
    monkeypatch.setenv(STAGE_VARIABLE, "2 of 4, RL")
    stages.begin("RL")
    assert len(caplog.messages) == 1
    monkeypatch.setenv(STAGE_VARIABLE, "")
    Stages()
    assert ProgressLines("GRPO").name == "GRPO"


@pytest.mark.slow
@pytest.mark.distributed
def test_a_run_is_quiet_reaches_trackers_and_ends_with_the_report(tmp_path: Path) -> None:
    flags = ["--demo_scale", "0.01", "--demo_dir", "data", "--max_steps", "2"]
    flags += ["--warm_start", "sft", "--output_dir", "grpo", "--per_device_train_batch_size", "4"]
    flags += ["--num_generations", "2", "--max_completion_length", "4", "--use_cpu", "true"]
    flags += ["--report_to", "tensorboard"]
    code = "import sys; from twn_rl.cli import main; sys.exit(main())"

    def run(*words: str) -> list[str]:
        done = subprocess.run(
            [sys.executable, "-c", code, *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        return (done.stdout + done.stderr).strip().splitlines()

    run("sft", *flags[:6], "--output_dir", "sft", "--save_strategy", "no", "--use_cpu", "true")
    shown = run("grpo", *flags)
    rest = [line for line in shown if "warning: " not in line]  # ours, about a model of two steps
    assert [line.split(",")[0] for line in rest[:3]] == ["Stage 1 of 2", "1 of 2", "1 of 2"]
    assert rest[-1] == f"Report: {Path('grpo') / 'evaluation' / 'report.html'}"
    assert rest[-2].startswith("Metrics: ")
    assert "hit@1, no thinking" in rest[-3]
    assert "queries whose right target comes first" in rest[-4]
    assert len(rest) < 12, rest
    assert not any("Warning" in line or "%|" in line for line in shown)
    assert tags(tmp_path / "grpo" / "runs") >= {"train/reward", "train/loss"}
    assert "evaluation/test/all/never/hit@1" in tags(tmp_path / "grpo" / "evaluation")


def test_verbose_shows_all_logs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for switch, count in (("1", 2), ("", 1)):
        monkeypatch.setenv("TWN_RL_VERBOSE", switch)
        set_up_logging()
        logging.getLogger("twn_rl.test").info("for those who want all")
        logging.getLogger("twn_rl.test").log(NOTICE, "for everybody")
        assert capsys.readouterr().err.count("for ") == count


def tags(folder: Path) -> set[str]:
    """Return the scalars that TensorBoard would show of a folder."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found: set[str] = set()
    for file in folder.rglob("events.out.*"):
        reader = events.EventAccumulator(str(file))
        reader.Reload()
        found |= set(reader.Tags()["scalars"])
    return found


def test_metrics_of_an_evaluation_reach_tensorboard(tmp_path: Path) -> None:
    track_metrics(["none", "tensorboard"], tmp_path, {"test/all/auto/hit@1": 0.75})
    assert tags(tmp_path) == {"evaluation/test/all/auto/hit@1"}
    assert check_trackers(["none"]) == []
    with pytest.raises(ValueError, match=r"'tensorbord'.*did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])
