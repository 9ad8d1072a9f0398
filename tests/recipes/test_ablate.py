"""What an ablation runs: arms, budgets, gates and refits."""

from pathlib import Path

import pytest
from comparison_runs import places, seed_in

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import eval_embed, grpo_embed, sft_embed
from twn_rl.recipes.experiments import ablate
from twn_rl.training.grpo import EmbedGRPOConfig


def test_the_gate_of_an_ablation_is_told_its_model_its_data_and_its_seed(tmp_path: Path) -> None:
    seed = seed_in(tmp_path)
    for config in (None, "gate.yaml"):
        script = ablate.AblateArguments(gate=True, gate_config=config)
        gate, _ = ablate.measured(script, tmp_path / "grpo", seed)
        assert (gate.recipe, gate.target) == ("gate_embed", tmp_path / "grpo" / "gate")
        assert ("--config=gate.yaml" in gate.flags) == (config is not None)
        assert {f"--model={tmp_path / 'grpo'}", "--demo_seed=3", "--seed=3"} <= set(gate.flags)


@pytest.mark.parametrize("gate", [False, True])
def test_an_evaluation_of_an_ablation_asks_for_the_gate_only_if_there_is_one(
    tmp_path: Path, gate: bool
) -> None:
    *_, evaluation = ablate.measured(ablate.AblateArguments(gate=gate), tmp_path, seed_in(tmp_path))
    types = (eval_embed.EvalScriptArguments, DataArguments)
    parsed, data = parse_arguments(types, arguments=evaluation.flags)
    assert data.demo_seed == 3
    assert (set(ablate.GATE_MODES) <= set(parsed.modes)) == gate
    assert ("auto" in parsed.modes) == gate


def test_the_arms_of_an_ablation_start_from_one_warm_start_with_one_budget(tmp_path: Path) -> None:
    script = ablate.AblateArguments(arms=["sft_only", "grpo", "grpo:info_nce"])
    stages = list(ablate.plan(script, seed_in(tmp_path)))
    assert places(stages, tmp_path) == [
        ("sft_embed", "warm_start"),
        ("eval_embed", "warm_start/evaluation"),
        ("sft_embed", "sft_only"),
        ("eval_embed", "sft_only/evaluation"),
        ("grpo_embed", "grpo"),
        ("eval_embed", "grpo/evaluation"),
        ("grpo_embed", "grpo_info_nce"),
        ("eval_embed", "grpo_info_nce/evaluation"),
    ]
    sft, grpo, other = stages[2].flags, stages[4].flags, stages[6].flags
    warm = tmp_path / "warm_start"
    assert {f"--checkpoint={warm}", "--max_steps=100", "--split=rl"} <= set(sft)
    assert {f"--warm_start={warm}", "--evaluate=false"} <= set(grpo)
    assert {*other} - {*grpo} == {
        f"--output_dir={tmp_path / 'grpo_info_nce'}",
        *("--rewards", "info_nce", "--reward_weights", "1.0"),
    }


def test_an_arm_names_several_rewards_with_weights_and_takes_their_parameters(
    tmp_path: Path,
) -> None:
    script = ablate.AblateArguments(
        arms=["grpo:margin=1,format=0.5,length=0.25"],
        grpo_config="recipes/configs/demo_grpo_short.yaml",
    )
    *_, rl, _ = ablate.plan(script, seed_in(tmp_path))
    types = (grpo_embed.GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
    parsed, *_, training = parse_arguments(types, arguments=rl.flags)
    assert parsed.rewards == ["margin", "format", "length"]
    assert training.reward_weights == [1.0, 0.5, 0.25]
    window = {"max_think_tokens": 32, "soft_window_tokens": 32}
    assert parsed.reward_parameters == {"length": window}
    assert training.per_device_train_batch_size == 128  # from the file it rests on
    twice = ablate.reward_settings("margin=1,margin=2", "recipes/configs/demo_grpo.yaml")
    assert twice["rewards"] == ["margin", "margin"], "for load_rewards to refuse"
    script.arms = ["grpo:margin=much"]
    with pytest.raises(ValueError, match="weight 'much'; expected a number"):
        list(ablate.plan(script, seed_in(tmp_path)))


def test_a_refit_follows_every_arm_and_the_warm_start(tmp_path: Path) -> None:
    config = "recipes/configs/demo_refit.yaml"
    script = ablate.AblateArguments(arms=["grpo"], refit_config=config, gate=True)
    stages = list(ablate.plan(script, seed_in(tmp_path)))
    names = ("warm_start", "warm_start_refit", "grpo", "grpo_refit")
    trained = [stage for stage in stages if stage.target in {tmp_path / name for name in names}]
    assert [stage.target.name for stage in trained] == [*names]
    assert {tmp_path / name / "gate" for name in names} <= {stage.target for stage in stages}
    chosen, _, data, sft = parse_arguments(sft_embed.ARGUMENTS, arguments=trained[-1].flags)
    assert chosen.checkpoint == str(tmp_path / "grpo")
    assert (chosen.train_adapters, chosen.split) == ("embedding", "train")
    assert (sft.self_written_from, sft.self_written_share, data.demo_seed) == (0.0, 1.0, 3)


@pytest.mark.parametrize(
    ("arm", "problem"),
    [
        ("sft-only", r"arms = \['sft-only'\].*did you mean sft_only"),
        ("expert_iteration", r"arms = \['expert_iteration'\]"),
        ("grpo:magin", "reward = 'magin'.*margin"),
        ("grpo:margin=x", "weight 'x'"),
        ("grpo:margin,margin=2", "more than once"),
    ],
)
def test_an_arm_of_an_ablation_that_does_not_exist_is_refused_at_once(
    arm: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        ablate.AblateArguments(arms=[arm])
