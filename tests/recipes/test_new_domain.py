"""What the comparison on a new domain runs: one start, equal steps and samples."""

from dataclasses import replace
from pathlib import Path

import pytest
from comparison_runs import places, seed_in

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import (
    eval_embed,
    expert_iteration,
    grpo_embed,
    sft_embed,
)
from twn_rl.recipes.experiments import new_domain


def test_the_arms_of_a_new_domain_have_one_start_and_equal_steps_and_samples(
    tmp_path: Path,
) -> None:
    script = new_domain.NewDomainArguments(arms=["more_sft", "expert_iteration", "grpo:info_nce"])
    script.look = ["grey"]
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.002)))
    assert places(stages, tmp_path) == [
        ("sft_embed", "warm_start"),
        ("eval_embed", "warm_start/look_grey"),
        ("eval_embed", "warm_start/evaluation"),
        ("sft_embed", "more_sft"),
        ("eval_embed", "more_sft/evaluation"),
        ("expert_iteration", "expert_iteration"),
        ("eval_embed", "expert_iteration/evaluation"),
        ("grpo_embed", "grpo_info_nce"),
        ("eval_embed", "grpo_info_nce/evaluation"),
    ]
    warm, more, expert, grpo = (stages[place] for place in (0, 3, 5, 7))
    start, data = tmp_path / "warm_start", tmp_path / "data"
    *_, own, _ = parse_arguments(sft_embed.ARGUMENTS, arguments=warm.flags)
    assert own.is_demo()
    chosen, _, taught, sft = parse_arguments(sft_embed.ARGUMENTS, arguments=more.flags)
    assert (chosen.checkpoint, chosen.split, chosen.train_adapters) == (
        *(str(start), "train", "reasoning"),
    )
    assert all(record.query_cot for record in taught.load("train"))
    first, pairs, rounds = parse_arguments(expert_iteration.ARGUMENTS, arguments=expert.flags)
    second, same, rl = parse_arguments(grpo_embed.ARGUMENTS, arguments=grpo.flags)
    assert first.warm_start == second.warm_start == str(start)
    assert second.rewards == ["info_nce"]
    assert first.rewards == ["margin", "format"]
    assert rounds.reward_weights == [1.0, 0.5]
    assert rounds.num_negatives == rl.num_negatives
    assert pairs == same == replace(taught, train_file=pairs.train_file)
    assert pairs.rl_file == str(data / "new_domain_reworded_train.jsonl")
    assert all(record.query_cot is None for record in pairs.load("rl"))
    assert sft.max_steps == rounds.max_steps == rl.max_steps == 100
    assert sft.learning_rate == rounds.learning_rate == rl.learning_rate
    batches = [each.per_device_train_batch_size for each in (sft, rounds, rl)]
    assert batches == [128] * 3
    samples = rounds.num_rounds * rounds.prompts_per_round * rounds.num_generations
    assert samples == rl.max_steps * rl.per_device_train_batch_size
    for stage in (stages[2], stages[4], stages[8]):
        parsed, measured = parse_arguments(
            (eval_embed.EvalScriptArguments, DataArguments), arguments=stage.flags
        )
        assert (measured.test_file, measured.ood_file) == (pairs.test_file, pairs.ood_file)
        assert {"always", "sampled"} <= set(parsed.modes)


def test_an_arm_with_old_pairs_samples_them_too_and_keeps_its_budget(tmp_path: Path) -> None:
    script = new_domain.NewDomainArguments(arms=["grpo", "grpo+old"], old_share=0.5)
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    assert places(stages, tmp_path)[2::2] == [("grpo_embed", "grpo"), ("grpo_embed", "grpo_old")]
    _, alone, budget = parse_arguments(grpo_embed.ARGUMENTS, arguments=stages[2].flags)
    _, mixed, same = parse_arguments(grpo_embed.ARGUMENTS, arguments=stages[4].flags)
    assert (same.max_steps, same.seed) == (budget.max_steps, budget.seed)
    new, both, old = alone.load("rl"), mixed.load("rl"), alone.load("train")
    assert [record.id for record in both] == [
        record.id for record in [*new, *(old[place] for place in range(len(new)))]
    ]
    assert all(record.query_cot is None for record in both)
    assert all(record.query.images for record in both), "pictures are found from the new file"
    assert mixed.rl_file.endswith("new_domain_reworded_train_50_percent_old.jsonl")
    # What measures the arms is the same.
    assert stages[3].settings["test_file"] == stages[5].settings["test_file"]
    assert stages[3].settings["rl_file"] == stages[5].settings["rl_file"]


def test_more_old_pairs_than_there_are_are_refused(tmp_path: Path) -> None:
    script = new_domain.NewDomainArguments(arms=["grpo+old"], old_share=0.9)
    with pytest.raises(ValueError, match=r"a share of 0.9 needs .* old pairs.*lower old_share"):
        list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))


def test_arms_and_domains_that_do_not_exist_are_named_together() -> None:
    named = r"domain = 'moon'.*look = .*'magin'.*arms = .*'more_sft\+old'.*old_share = 1"
    arms = ["grpo:magin+old", "more_sft+old"]
    with pytest.raises(ValueError, match=named):
        new_domain.NewDomainArguments(domain="moon", look=["sun"], arms=arms, old_share=1.0)


def test_an_arm_of_a_new_domain_may_weigh_its_rewards(tmp_path: Path) -> None:
    arms = ["grpo:info_nce=0.02,format=0.5", "grpo:rank_gap+old"]
    script = new_domain.NewDomainArguments(arms=arms)
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    named = {stage.target.name: stage.settings for stage in stages if stage.recipe == "grpo_embed"}
    weighted, mixed = named["grpo_info_nce_0_02_format_0_5"], named["grpo_rank_gap_old"]
    assert (weighted["rewards"], weighted["reward_weights"]) == (
        ["info_nce", "format"],
        [0.02, 0.5],
    )
    assert (mixed["rewards"], mixed["reward_weights"]) == (["rank_gap"], [1.0])
    for wrong, problem in {
        "grpo:magin=1": "reward = 'magin'",
        "grpo:margin=1,lenght=2": "reward = 'lenght'",
        "more_sft=1": r"arms = \['more_sft=1'\]",
        "expert_iteration:margin=1": r"arms = \['expert_iteration:margin=1'\]",
    }.items():
        with pytest.raises(ValueError, match=problem):
            new_domain.NewDomainArguments(arms=[wrong])
