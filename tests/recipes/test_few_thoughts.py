"""What the comparison with few thoughts runs."""

from pathlib import Path

import pytest
from comparison_runs import places, seed_in

from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import grpo_embed, sft_embed
from twn_rl.recipes.experiments import few_thoughts


def test_few_thoughts_teach_to_write_and_all_pairs_to_read(tmp_path: Path) -> None:
    script = few_thoughts.FewThoughtsArguments(shares=[0.1, 1.0], read_steps=7)
    stages = list(few_thoughts.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    each = [
        ("sft_embed", "taught"),
        ("sft_embed", "before_rl"),
        ("eval_embed", "before_rl/evaluation"),
    ]
    each += [("grpo_embed", "rl"), ("sft_embed", "after_rl"), ("eval_embed", "after_rl/evaluation")]
    expected = [(recipe, f"{n}_percent/{place}") for n in (10, 100) for recipe, place in each]
    assert places(stages, tmp_path) == expected
    for share, first in ((0.1, 0), (1.0, 6)):
        taught, before, _, rl, after, _ = stages[first : first + 6]
        chosen, _, few, training = parse_arguments(sft_embed.ARGUMENTS, arguments=taught.flags)
        assert (chosen.checkpoint, chosen.train_adapters) == (None, "reasoning")
        assert training.max_steps == 560
        known = few.load("train")
        assert all(record.query_cot for record in known)
        start, _, pairs, reading = parse_arguments(sft_embed.ARGUMENTS, arguments=before.flags)
        assert (start.checkpoint, start.train_adapters) == (str(taught.target), "embedding")
        assert (reading.self_written_from, reading.self_written_share) == (0, 1)
        assert reading.think_without_cot
        assert reading.max_steps == 7
        everything = pairs.load("train")
        assert len(known) == round(share * len(everything))
        assert not any(record.query_cot for record in everything)
        policy, _, _ = parse_arguments(grpo_embed.ARGUMENTS, arguments=rl.flags)
        assert policy.warm_start == str(before.target)
        refit, _, same, last = parse_arguments(sft_embed.ARGUMENTS, arguments=after.flags)
        assert (refit.checkpoint, refit.train_adapters) == (str(rl.target), "embedding")
        assert same == pairs
        assert last.think_without_cot
        assert last.max_steps == 240
    # The demo's folder is still its own: other settings write it anew.
    other = seed_in(tmp_path, demo_scale=0.03)
    few_thoughts.with_thoughts(few_thoughts.pairs_of(other), 0.5)
    assert len(list(other.data.load("test"))) == 30
    alone = few_thoughts.FewThoughtsArguments(shares=[0.1], rounds=0)
    assert len(list(few_thoughts.plan(alone, seed_in(tmp_path, demo_scale=0.02)))) == 3


def test_rl_and_the_refit_take_turns(tmp_path: Path) -> None:
    script = few_thoughts.FewThoughtsArguments(shares=[0.1], rounds=2)
    stages = list(few_thoughts.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    after, rl_2, after_2 = stages[4], stages[6], stages[7]
    assert rl_2.target.name == "rl_2"
    policy, _, _ = parse_arguments(grpo_embed.ARGUMENTS, arguments=rl_2.flags)
    assert policy.warm_start == str(after.target)
    assert after_2.target.name == "after_rl_2"
    refit, *_ = parse_arguments(sft_embed.ARGUMENTS, arguments=after_2.flags)
    assert refit.checkpoint == str(rl_2.target)
    assert stages[8].target == after_2.target / "evaluation"


def test_shares_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares = \[0, 0.5\].*read_steps = 0"):
        few_thoughts.FewThoughtsArguments(shares=[0, 0.5], read_steps=0)
