"""A collapse is reported with its step and value; the metrics file has every step once."""

import json
import logging
import math

import numpy as np
import pytest
import torch
from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from twn_rl.training.monitor import CollapseThresholds, CollapseWatch, MetricsWriter

BAD_LOGS = {
    "frac_reward_zero_std": 1.0,
    "reward_std": 0.0,
    "completions/mean_length": 1.0,
    "completions/clipped_ratio": 0.9,
    "kl": 50.0,
    "embedding_variance": 1e-5,
}
GOOD_LOGS = {
    "frac_reward_zero_std": 0.1,
    "reward_std": 0.2,
    "completions/mean_length": 40.0,
    "completions/clipped_ratio": 0.0,
    "kl": 0.1,
    "embedding_variance": 0.7,
}


@pytest.fixture
def arguments(tmp_path) -> TrainingArguments:
    return TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[])


def feed(watch, arguments, rows, *, start=1) -> TrainerControl:
    control = TrainerControl()
    for step, logs in enumerate(rows, start=start):
        state = TrainerState(global_step=step, is_world_process_zero=True)
        watch.on_log(arguments, state, control, logs=logs)
    return control


@pytest.mark.parametrize("metric", BAD_LOGS)
def test_each_metric_warns_with_its_step_and_value_after_patience(metric, arguments, caplog):
    watch = CollapseWatch(CollapseThresholds(patience=2))
    with caplog.at_level(logging.WARNING):
        feed(watch, arguments, [dict(GOOD_LOGS, **{metric: BAD_LOGS[metric]}) for _ in range(2)])
    assert watch.counts == {metric: 1}
    assert f"step 2: {metric} = {BAD_LOGS[metric]:.6g} for 2 logs" in caplog.text


def test_a_healthy_run_is_left_alone(arguments, caplog):
    watch = CollapseWatch(CollapseThresholds(patience=1), stop_on_collapse=True)
    control = feed(watch, arguments, [dict(GOOD_LOGS) for _ in range(5)])
    assert not watch.counts
    assert not control.should_training_stop
    assert not caplog.records


def test_one_good_log_starts_the_patience_again(arguments):
    watch = CollapseWatch(CollapseThresholds(patience=2))
    feed(watch, arguments, [{"reward_std": value} for value in (0.0, 0.3, 0.0, 0.3)])
    assert not watch.counts


def test_logs_without_the_metric_do_not_break_a_streak(arguments):
    watch = CollapseWatch(CollapseThresholds(patience=2))
    feed(watch, arguments, [{"reward_std": 0.0}, {"eval_loss": 1.0}, {"reward_std": 0.0}])
    assert watch.counts == {"reward_std": 1}


def test_a_long_collapse_is_repeated_every_patience_logs(arguments):
    watch = CollapseWatch(CollapseThresholds(patience=3))
    feed(watch, arguments, [{"reward_std": 0.0} for _ in range(7)])
    assert watch.counts == {"reward_std": 2}


def test_a_limit_that_is_none_is_off(arguments):
    watch = CollapseWatch(CollapseThresholds(patience=1, min_reward_std=None))
    feed(watch, arguments, [{"reward_std": 0.0}])
    assert not watch.counts


def test_a_metric_that_trl_could_not_average_is_skipped(arguments):
    watch = CollapseWatch(CollapseThresholds(patience=1))
    feed(watch, arguments, [{"reward_std": None}])
    assert not watch.counts


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("metric", ["loss", "grad_norm", "kl"])
def test_a_value_that_is_not_finite_counts_at_once(metric, value, arguments):
    watch = CollapseWatch(CollapseThresholds(patience=9), stop_on_collapse=True)
    control = feed(watch, arguments, [{metric: value}])
    assert watch.counts == {metric: 1}
    assert control.should_training_stop


def test_a_collapse_stops_the_run_only_if_asked_to(arguments):
    thresholds = CollapseThresholds(patience=1)
    assert not feed(CollapseWatch(thresholds), arguments, [BAD_LOGS.copy()]).should_training_stop
    watch = CollapseWatch(thresholds, stop_on_collapse=True)
    assert feed(watch, arguments, [BAD_LOGS.copy()]).should_training_stop
    assert watch.stop_reason is not None
    assert watch.stop_reason.startswith("step 1: ")


def test_warnings_are_counted_in_the_logs_and_in_the_history(arguments):
    state = TrainerState(global_step=4, is_world_process_zero=True)
    state.log_history.append({"step": 4})
    logs = {"reward_std": 0.0}
    watch = CollapseWatch(CollapseThresholds(patience=1))
    watch.on_log(arguments, state, TrainerControl(), logs=logs)
    assert logs["collapse_warnings"] == 1
    assert state.log_history[-1]["collapse_warnings"] == 1


def rewards(*means: float) -> list[dict[str, float]]:
    """Twenty logs around every mean, with a standard deviation of 0.03."""
    noise = np.random.default_rng(0).normal(0, 0.03, (len(means), 20))
    return [{"reward": mean + n} for mean, row in zip(means, noise, strict=True) for n in row]


def test_a_reward_that_falls_warns_with_both_means_and_is_repeated_every_window(arguments, caplog):
    watch = CollapseWatch()
    feed(watch, arguments, rewards(0.6, 0.7, 0.7, 0.6, 0.6, 0.6))
    assert watch.counts == {"reward": 3}
    first = caplog.records[0].message
    assert 61 <= int(first.split()[1].strip(":")) <= 80
    assert "in the mean of 20 logs, after 0.70" in first
    assert "Lower the learning rate" in first


@pytest.mark.parametrize("means", [(0.6,) * 50, (0.3, 0.4, 0.5, 0.6, 0.7), (0.7, 0.68, 0.7, 0.69)])
def test_a_reward_that_rises_or_wavers_is_left_alone(means, arguments):
    watch = CollapseWatch()
    feed(watch, arguments, rewards(*means))
    assert not watch.counts


def test_a_fall_is_seen_across_a_resumed_run_and_is_off_if_asked(arguments):
    before, after = rewards(0.7, 0.7), rewards(0.6, 0.6)
    watch = CollapseWatch()
    feed(watch, arguments, after, start=41)
    assert not watch.counts
    resumed = TrainerState(global_step=40, log_history=before)
    watch.on_train_begin(arguments, resumed, TrainerControl())
    feed(watch, arguments, after, start=41)
    assert watch.counts["reward"] > 0
    off = CollapseWatch(CollapseThresholds(reward_fall_p_value=None))
    feed(off, arguments, before + after)
    assert not off.counts


def test_thresholds_report_every_problem_at_once():
    with pytest.raises(ValueError, match=r"max_kl = nan.*reward_fall_p_value = 1.*patience = 0"):
        CollapseThresholds(max_kl=math.nan, reward_fall_p_value=1.0, patience=0)


def read_rows(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def begin(writer, arguments, step) -> None:
    state = TrainerState(global_step=step, is_world_process_zero=True)
    writer.on_train_begin(arguments, state, TrainerControl())


def test_every_log_is_one_line_of_strict_json(tmp_path, arguments):
    path = tmp_path / "run" / "metrics.jsonl"
    values = {"loss": 0.5, "kl": math.nan, "n": np.float32(2.0), "t": torch.tensor(3.0), "x": None}
    feed(MetricsWriter(path), arguments, [values])
    expected = {"step": 1, "loss": 0.5, "kl": "nan", "n": 2.0, "t": 3.0, "x": None}
    assert read_rows(path) == [expected]


def test_resuming_drops_later_lines_and_a_line_cut_by_the_crash(tmp_path, arguments):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    feed(writer, arguments, [{"loss": float(step)} for step in range(1, 6)])
    with path.open("a") as file:
        file.write('{"step": 6, "lo')
    begin(writer, arguments, 3)
    feed(writer, arguments, [{"loss": -4.0}, {"loss": -5.0}], start=4)
    assert [(row["step"], row["loss"]) for row in read_rows(path)] == [
        (1, 1.0),
        (2, 2.0),
        (3, 3.0),
        (4, -4.0),
        (5, -5.0),
    ]


def test_a_new_run_keeps_the_old_curve_aside(tmp_path, arguments):
    path = tmp_path / "metrics.jsonl"
    writer = MetricsWriter(path)
    feed(writer, arguments, [{"loss": 1.0}])
    begin(writer, arguments, 0)
    feed(writer, arguments, [{"loss": 2.0}])
    assert [row["loss"] for row in read_rows(path)] == [2.0]
    assert [row["loss"] for row in read_rows(tmp_path / "metrics.jsonl.previous")] == [1.0]


def test_only_the_main_process_writes(tmp_path, arguments):
    path = tmp_path / "metrics.jsonl"
    state = TrainerState(global_step=1, is_world_process_zero=False)
    MetricsWriter(path).on_log(arguments, state, TrainerControl(), logs={"loss": 1.0})
    assert not path.exists()


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, labels=None):
        return {"loss": ((self.weight * x - labels) ** 2).mean()}


def test_a_resumed_trainer_leaves_each_step_once_with_its_warnings(tmp_path):
    def train(max_steps: int, resume: bool) -> None:
        arguments = TrainingArguments(
            output_dir=str(tmp_path / "run"),
            max_steps=max_steps,
            save_steps=2,
            logging_steps=1,
            per_device_train_batch_size=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            dataloader_pin_memory=False,
        )
        rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 8
        trainer = Trainer(
            model=Line(),
            args=arguments,
            train_dataset=rows,  # pyright: ignore[reportArgumentType]
            callbacks=[CollapseWatch(), MetricsWriter(tmp_path / "metrics.jsonl")],
        )
        trainer.train(resume_from_checkpoint=resume)

    train(3, resume=False)
    # The crash came after step 3 was logged and before it was saved.
    checkpoint = tmp_path / "run" / "checkpoint-3"
    checkpoint.rename(tmp_path / "lost")
    train(5, resume=True)
    rows = [row for row in read_rows(tmp_path / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert all(row["collapse_warnings"] == 0 for row in rows)
