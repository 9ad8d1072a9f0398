"""A second run into one folder is refused before it reads anything, and so is one over a model."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.run_folder import owned_run
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.recipes import (
    adaptive_embed,
    eval_embed,
    expert_iteration,
    gate_embed,
    grpo_embed,
    latent_embed,
    policy_threshold,
    sft_embed,
)
from twn_rl.training.adaptive import AdaptiveGRPOConfig
from twn_rl.training.expert_iteration import ExpertIterationConfig
from twn_rl.training.grpo import EmbedGRPOConfig
from twn_rl.training.latent import LatentConfig
from twn_rl.training.sft import SftConfig

Run = Callable[[str, DataArguments], object]
TRAINING = {"report_to": [], "use_cpu": True}


def sft(output: str, data: DataArguments, **settings: Any) -> object:
    training = SftConfig(output_dir=output, **TRAINING, **settings)
    return sft_embed.main(sft_embed.SftScriptArguments(), ModelArguments(), data, training)


def grpo(output: str, data: DataArguments, **settings: Any) -> object:
    script = grpo_embed.GrpoScriptArguments(warm_start="absent")
    training = EmbedGRPOConfig(output_dir=output, **TRAINING, **settings)
    return grpo_embed.main(script, data, training)


def adaptive(output: str, data: DataArguments, **settings: Any) -> object:
    script = adaptive_embed.AdaptiveScriptArguments(warm_start="absent")
    training = AdaptiveGRPOConfig(output_dir=output, **TRAINING, **settings)
    return adaptive_embed.main(script, data, training)


def latent(output: str, data: DataArguments, **settings: Any) -> object:
    script, model = latent_embed.LatentScriptArguments(), ModelArguments(num_reason_tokens=2)
    training = LatentConfig(output_dir=output, **TRAINING, **settings)
    return latent_embed.main(script, model, data, training)


def expert(output: str, data: DataArguments, **settings: Any) -> object:
    script = grpo_embed.RewardedArguments(warm_start="absent")
    training = ExpertIterationConfig(output_dir=output, max_steps=4, **TRAINING, **settings)
    return expert_iteration.main(script, data, training)


def gate(output: str, data: DataArguments) -> object:
    return gate_embed.main(gate_embed.GateScriptArguments(model=output), ThresholdRule(), data)


def policy(output: str, data: DataArguments) -> object:
    script = policy_threshold.PolicyScriptArguments(model=output)
    return policy_threshold.main(script, ThresholdRule(), data)


def evaluation(output: str, data: DataArguments) -> object:
    script = eval_embed.EvalScriptArguments(model="absent", output_dir=output)
    return eval_embed.main(script, data)


TRAININGS = (sft, grpo, adaptive, latent, expert)


@pytest.mark.parametrize("run", [*TRAININGS, gate, policy, evaluation])
def test_a_second_run_is_told_who_has_the_folder(run: Run, tmp_path: Path) -> None:
    file = str(tmp_path / "absent.jsonl")
    absent = DataArguments(train_file=file, validation_file=file)
    output = tmp_path / "out"
    with owned_run(output), pytest.raises(ValueError, match="by another run") as error:
        run(str(output), absent)
    said = str(error.value)
    assert said.startswith(f"{output} is being written by another run (")
    assert f"process {os.getpid()} on " in said
    assert re.search(r"since \d{4}-\d\d-\d\d \d\d:\d\d:\d\d UTC\); expected one at a time", said)
    assert "\n" not in said
    # The lock has gone with the run: the next one gets as far as its data or its model.
    missing = f"{output / CONFIG_FILE} does not exist" if run in (gate, policy) else "absent"
    with pytest.raises((OSError, ValueError), match=missing):
        run(str(output), absent)


@pytest.mark.parametrize("run", [gate, policy, evaluation])
def test_an_absent_model_is_told_before_the_scenes_of_the_demo_are_written(
    run: Run, tmp_path: Path
) -> None:
    data = DataArguments(demo_dir=str(tmp_path / "data"))
    with pytest.raises(FileNotFoundError, match=f"{CONFIG_FILE} does not exist"):
        run(str(tmp_path / "out"), data)
    assert not (tmp_path / "data").exists()


@pytest.mark.parametrize("run", TRAININGS)
def test_a_trained_model_is_not_trained_over(run: Callable[..., object], tmp_path: Path) -> None:
    file = str(tmp_path / "absent.jsonl")
    absent = DataArguments(train_file=file, validation_file=file)
    output = tmp_path / "out"
    output.mkdir()
    (output / CONFIG_FILE).write_text("{}", encoding="utf-8")
    said = rf"output_dir = {output} holds a trained model; .*--overwrite_output_dir true"
    # There is nothing to resume from either.
    for settings in ({}, {"resume_from_checkpoint": "true"}):
        with pytest.raises(ValueError, match=said):
            run(str(output), absent, **settings)
    # Told to, or with a checkpoint to go on from, it gets as far as its data or its model.
    with pytest.raises((OSError, ValueError), match="absent"):
        run(str(output), absent, overwrite_output_dir=True)
    (output / "checkpoint-3").mkdir()
    with pytest.raises(ValueError, match=said):
        run(str(output), absent)
    with pytest.raises((OSError, ValueError), match="absent"):
        run(str(output), absent, resume_from_checkpoint="true")


def test_a_second_benchmark_is_told_the_same(tmp_path: Path) -> None:
    script = eval_embed.EvalScriptArguments(
        model="absent", output_dir=str(tmp_path), benchmark="EmojiScenes"
    )
    pytest.importorskip("mteb")
    with owned_run(tmp_path / "EmojiScenes"), pytest.raises(ValueError, match="by another run"):
        eval_embed.main(script, DataArguments(train_file="absent.jsonl"))


def test_an_output_that_cannot_be_made_is_named_before_anything_is_read(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    data = DataArguments(train_file=str(tmp_path / "absent.jsonl"))
    with pytest.raises(OSError, match=r"file/out cannot be written: File exists; expected a"):
        sft(str(tmp_path / "file" / "out"), data)
