"""A second run into one output folder is refused before it reads anything: by whom, since when."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.run_folder import owned_run
from twn_rl.recipes import (
    adaptive_embed,
    eval_embed,
    gate_embed,
    grpo_embed,
    latent_embed,
    policy_threshold,
    sft_embed,
)
from twn_rl.training.adaptive import AdaptiveGRPOConfig
from twn_rl.training.grpo import EmbedGRPOConfig
from twn_rl.training.latent import LatentConfig
from twn_rl.training.sft import SftConfig

Run = Callable[[str, DataArguments], object]
TRAINING = {"report_to": [], "use_cpu": True}


def sft(output: str, data: DataArguments) -> object:
    training = SftConfig(output_dir=output, **TRAINING)
    return sft_embed.main(sft_embed.SftScriptArguments(), ModelArguments(), data, training)


def grpo(output: str, data: DataArguments) -> object:
    script = grpo_embed.GrpoScriptArguments(warm_start="absent")
    return grpo_embed.main(script, data, EmbedGRPOConfig(output_dir=output, **TRAINING))


def adaptive(output: str, data: DataArguments) -> object:
    script = adaptive_embed.AdaptiveScriptArguments(warm_start="absent")
    return adaptive_embed.main(script, data, AdaptiveGRPOConfig(output_dir=output, **TRAINING))


def latent(output: str, data: DataArguments) -> object:
    script, model = latent_embed.LatentScriptArguments(), ModelArguments(num_reason_tokens=2)
    return latent_embed.main(script, model, data, LatentConfig(output_dir=output, **TRAINING))


def gate(output: str, data: DataArguments) -> object:
    return gate_embed.main(gate_embed.GateScriptArguments(model=output), ThresholdRule(), data)


def policy(output: str, data: DataArguments) -> object:
    script = policy_threshold.PolicyScriptArguments(model=output)
    return policy_threshold.main(script, ThresholdRule(), data)


def evaluation(output: str, data: DataArguments) -> object:
    script = eval_embed.EvalScriptArguments(model="absent", output_dir=output)
    return eval_embed.main(script, data)


@pytest.mark.parametrize("run", [sft, grpo, adaptive, latent, gate, policy, evaluation])
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
    with pytest.raises((OSError, ValueError), match="absent"):
        run(str(output), absent)


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
