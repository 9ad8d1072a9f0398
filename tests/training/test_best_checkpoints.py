"""Which checkpoint a run keeps: the best by reward or hit@1, and none of a run without a step."""

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from short_runs import SHORT_RUN, small_model, weights
from tiny_backbones import make_idefics3

from twn_rl.data.record_files import RecordSet
from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.validation import Validation
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.run_folder import train_and_save
from twn_rl.launch.validation import validation_of
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.adaptive import AdaptiveGRPOConfig
from twn_rl.training.grpo import (
    ROLLOUT_COLUMNS,
    EmbedGRPOConfig,
    EmbedGRPOTrainer,
    freeze_scorer,
)
from twn_rl.training.latent import LatentConfig
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.sft import SftConfig, SftTrainer
from twn_rl.training.similarity_columns import SCORING_COLUMNS

STEPS = 4
CHECKPOINTS = {"save_strategy": "steps", "save_steps": 1, "max_steps": STEPS}
KEEP_BEST = {**CHECKPOINTS, "load_best_model_at_end": True, "save_total_limit": 1}


class Scripted(Validation):
    """Says what it is told instead of measuring: step -> hit@1."""

    def __init__(self, said: Mapping[int, float]) -> None:
        """Take what to say, a value a measurement."""
        super().__init__(())
        object.__setattr__(self, "said", iter(said.values()))

    def measure(self, model: DualLoraModel) -> dict[str, float]:
        """Return the next value."""
        return {"hit@1": next(self.said)}  # pyright: ignore[reportAttributeAccessIssue]


def make_sft(folder: Path, records: RecordSet, validation: Any = None, **settings: Any) -> Any:
    settings = {**SHORT_RUN, "per_device_train_batch_size": 3, **CHECKPOINTS, **settings}
    args = SftConfig(output_dir=str(folder), **settings)
    return SftTrainer(small_model(), args, records, eval_dataset=validation)


def make_grpo(
    folder: Path, records: RecordSet, reward: Callable[..., list[float | None]], **settings: Any
) -> Any:
    settings = {
        **SHORT_RUN,
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 12,
        "bf16": False,
        "gradient_checkpointing": False,
        **CHECKPOINTS,
        **settings,
    }
    args, model = EmbedGRPOConfig(output_dir=str(folder), **settings), small_model()
    freeze_scorer(model)
    scorer = RolloutScorer(model, records, folder / "bank", num_negatives=3)
    columns = [*SCORING_COLUMNS, *ROLLOUT_COLUMNS]
    rewards = load_rewards(["mine"], {"mine": reward}, available_columns=columns)
    scenes = DataArguments(demo_dir=str(folder.parent / "scenes"), demo_scale=0.02)
    return EmbedGRPOTrainer(
        model, rewards, args, records, scorer, eval_dataset=validation_of(scenes, args)
    )


def best_at(step: int) -> Callable[..., list[float | None]]:
    """Return a reward that is highest at a step, and teaches to write little."""

    def reward(
        completions: list, *, think_tokens: list[int], trainer_state: Any, **kwargs: Any
    ) -> list[float | None]:
        distance = abs(trainer_state.global_step + 1 - step)
        return [-10.0 * distance - 0.01 * tokens for tokens in think_tokens]

    return reward


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return weights(DualLoraModel.from_pretrained(folder, backbone=make_idefics3()))


def same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_rl_keeps_the_checkpoint_of_the_best_reward(
    records: RecordSet, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    run, settings = tmp_path / "run", {"metric_for_best_model": "reward", **KEEP_BEST}
    settings["validation_records"] = 0
    trainer = make_grpo(run, records, best_at(2), **settings)
    train_and_save(trainer, run, {})
    assert trainer.state.global_step == STEPS
    assert trainer.state.best_global_step == 2
    # The last one stays beside the best: by it a finished run is known.
    assert sorted(path.name for path in run.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-4",
    ]
    assert same(stored(run), stored(run / "checkpoint-2"))
    assert not same(stored(run), stored(run / "checkpoint-4"))
    said = "The model is that of step 2 of 4, the best by reward: -0."
    assert said in caplog.text
    assert "; at the end it was -20." in caplog.text
    # Going on with the finished run reads the best back, and changes nothing.
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = make_grpo(run, records, best_at(2), resume_from_checkpoint="true", **settings)
    train_and_save(again, run, {})
    assert same(weights(again.dual_model), stored(run / "checkpoint-2"))
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_was_killed_still_knows_its_best_checkpoint(
    records: RecordSet, tmp_path: Path
) -> None:
    settings = {"metric_for_best_model": "hit@1", **KEEP_BEST}
    said = {1: 0.5, 2: 0.7, 3: 0.6, 4: 0.1}
    whole = make_sft(tmp_path / "whole", records, Scripted(said), **settings)
    train_and_save(whole, tmp_path / "whole", {})
    dying = Scripted({step: said[step] for step in (1, 2, 3)})
    with pytest.raises(StopIteration):  # before the last checkpoint
        make_sft(tmp_path / "run", records, dying, **settings).train()
    rest = Scripted({4: said[4]})
    second = make_sft(tmp_path / "run", records, rest, resume_from_checkpoint="true", **settings)
    train_and_save(second, tmp_path / "run", {})
    assert second.state.best_global_step == 2
    assert same(stored(tmp_path / "run"), stored(tmp_path / "whole"))
    assert same(stored(tmp_path / "run"), stored(tmp_path / "whole" / "checkpoint-2"))
    assert not same(stored(tmp_path / "run"), stored(tmp_path / "whole" / "checkpoint-4"))


def test_measuring_tells_what_evaluation_would_and_changes_no_weight(
    records: RecordSet, tmp_path: Path
) -> None:
    plain = make_sft(tmp_path / "plain", records, max_steps=2)
    plain.train()
    validation = Validation([records[i] for i in range(len(records))], batch_size=4)
    measured = make_sft(
        tmp_path / "run", records, validation, max_steps=2, metric_for_best_model="hit@1"
    )
    measured.train()
    assert same(weights(measured.dual_model), weights(plain.dual_model))
    rows = [row for row in measured.state.log_history if "eval_hit@1" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        path = tmp_path / "run" / f"checkpoint-{row['step']}"
        model = DualLoraModel.from_pretrained(path, backbone=make_idefics3())
        found = evaluate(model, records, EvaluationSettings(modes=("never", "always")))
        assert row["eval_hit@1"] == found.metrics["test/all/always/hit@1"]
        assert row["eval_no_think_hit@1"] == found.metrics["test/all/never/hit@1"]
        assert "loss_token" not in row, "what was gathered of training belongs to its own log"


def test_rl_measures_as_its_model_serves_and_goes_on_as_before(
    records: RecordSet, tmp_path: Path
) -> None:
    plain = make_grpo(tmp_path / "plain", records, best_at(2), max_steps=2, logging_steps=2)
    plain.train()
    settings = {"max_steps": 2, "logging_steps": 2, "metric_for_best_model": "hit@1"}
    trainer = make_grpo(tmp_path / "run", records, best_at(2), validation_records=5, **settings)
    assert len(trainer.eval_dataset) == 5
    trainer.train()
    assert same(weights(trainer.dual_model), weights(plain.dual_model))
    first, last = (row for row in trainer.state.log_history if "eval_hit@1" in row)
    assert 0 <= first["eval_hit@1"] <= 1
    assert "eval_reward" not in first, "no reward has been logged yet"
    rewards = [row["reward"] for row in trainer.state.log_history if "reward" in row]
    assert [last["eval_reward"]] == rewards
    assert rewards == [row["reward"] for row in plain.state.log_history if "reward" in row]


@pytest.mark.parametrize(
    ("kind", "settings", "said"),
    [
        (SftConfig, {"metric_for_best_model": "reward"}, "'reward', expected one of ('hit@1', "),
        (EmbedGRPOConfig, {"load_best_model_at_end": True}, "'loss', expected one of ('hit@1', "),
        (AdaptiveGRPOConfig, {"save_strategy": "best"}, "'no_think_hit@1', 'reward')"),
        (LatentConfig, {"metric_for_best_model": "hit@1", "save_strategy": "no"}, "'steps' or"),
        (
            SftConfig,
            {"metric_for_best_model": "hit@1", "validation_records": 0},
            "validation_records = 0 with",
        ),
    ],
)
def test_a_choice_that_cannot_be_made_is_refused(
    kind: Any, settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=r"change these fields$") as error:
        kind(output_dir=str(tmp_path), **{**SHORT_RUN, **CHECKPOINTS, **settings})
    assert said in str(error.value)


def test_checkpoints_are_measured_when_they_are_saved(tmp_path: Path) -> None:
    settings = {**SHORT_RUN, **KEEP_BEST, "metric_for_best_model": "hit@1"}
    groups = {"num_generations": 6, "per_device_train_batch_size": 6}
    args = EmbedGRPOConfig(output_dir=str(tmp_path), **groups, **settings)
    assert (args.eval_strategy, args.eval_steps, args.greater_is_better) == ("steps", 1, True)
    assert validation_of(DataArguments(), EmbedGRPOConfig(output_dir=str(tmp_path))) is None
    files = DataArguments(train_file=str(tmp_path / "train.jsonl"))
    with pytest.raises(ValueError, match="validation_file = None while other record files"):
        validation_of(files, args)
    args.metric_for_best_model = "reward"
    assert len(validation_of(files, args) or ()) == 0


def test_a_run_without_a_step_is_an_error_with_the_numbers(
    records: RecordSet, tmp_path: Path
) -> None:
    wide = {"per_device_train_batch_size": 16, "max_steps": 5}
    trainer = make_grpo(tmp_path / "grpo", records, best_at(1), **wide)
    with pytest.raises(ValueError, match=r"6 records, and a step takes 8 of 2 rollouts each; "):
        trainer.train()
    whole = {"per_device_train_batch_size": 8, "dataloader_drop_last": True}
    with pytest.raises(ValueError, match=r"6 records, and a step takes 8; expected at least"):
        make_sft(tmp_path / "sft", records, **whole).train()
    none = {"max_steps": -1, "num_train_epochs": 0}
    with pytest.raises(ValueError, match=r"num_train_epochs = 0; expected at least one step"):
        make_sft(tmp_path / "none", records, **none).train()
    assert not list(tmp_path.rglob("checkpoint-*"))
