"""What expert iteration samples, pays for and keeps; every expected number is by hand."""

from pathlib import Path
from typing import Any

import pytest

from twn_rl.data.record_files import RecordSet
from twn_rl.rewards import REWARDS
from twn_rl.training.expert_iteration import (
    ExpertIterationConfig,
    RewardEvaluator,
    round_positions,
    round_report,
)
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.thought_selection.choosing import choose


def settings(**own: Any) -> ExpertIterationConfig:
    own = {"max_steps": 10, "use_cpu": True, "report_to": [], **own}
    return ExpertIterationConfig(output_dir="unused", **own)


def test_every_record_has_its_turn_before_any_has_a_second_one() -> None:
    args = settings(num_rounds=5, prompts_per_round=4)
    rounds = round_positions(10, args)
    assert [len(positions) for positions in rounds] == [4] * 5
    order = [position for positions in rounds for position in positions]
    assert sorted(order[:10]) == sorted(order[10:]) == list(range(10))
    assert order[:10] != list(range(10))
    assert round_positions(10, args) == rounds
    assert round_positions(10, settings(num_rounds=5, prompts_per_round=4, seed=1)) != rounds


def test_fewer_records_than_a_round_asks_for_are_each_asked_once() -> None:
    rounds = round_positions(3, settings(num_rounds=2, prompts_per_round=400))
    assert [sorted(positions) for positions in rounds] == [[0, 1, 2]] * 2


def test_the_steps_of_all_rounds_are_those_of_the_run() -> None:
    args = settings(num_rounds=4, max_steps=10)
    assert [args.steps_of(number) for number in range(4)] == [3, 3, 2, 2]


def test_settings_that_cannot_work_are_named_together() -> None:
    wrong = (
        r"num_negatives = 0.*num_rounds = 0.*num_generations = 0.*sampling_temperature = 0.*"
        r"max_steps = -1.*token_weight = 0"
    )
    with pytest.raises(ValueError, match=wrong):
        settings(
            num_rounds=0,
            num_generations=0,
            num_negatives=0,
            sampling_temperature=0.0,
            max_steps=-1,
            token_weight=0.0,
        )


def rich(completions: list, *, think_tokens: list[int], **kwargs: Any) -> list[float | None]:
    """Pay for the thought alone; nothing for those of one word."""
    return [None if count < 4 else float(count) for count in think_tokens]


def test_a_thought_is_paid_as_in_rl_and_gains_what_it_did_to_the_vector(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model, shares = make_model(), [5, 3]
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    rewards = load_rewards(["margin", "format"], REWARDS)
    evaluator = RewardEvaluator(model, records, shares, scorer, rewards, [2.0, 0.5])
    cots = ["pizza below", "tree left of the camel", "pizza below"]
    matches = evaluator.matches([(0, cots[0]), (1, cots[1]), (1, cots[2])])
    for match, cot, position in zip(matches, cots, [5, 3, 3], strict=True):
        ids = model.completion_ids(model.renderer.completion(cot), add_eos=True)
        columns = scorer.columns([position], [ids])
        assert columns["is_think_complete"] == [True]
        [paid] = REWARDS["margin"]([cot], **columns)
        own = {name: columns[f"no_think_{name}"] for name in list(columns)[:2]}
        [without] = REWARDS["margin"]([cot], **{**columns, **own})
        assert match is not None
        assert paid is not None
        assert without is not None
        assert match.with_cot == pytest.approx(2 * paid + 0.5, abs=1e-5)
        assert match.worth == pytest.approx(2 * (paid - without), abs=1e-5)
        assert abs(match.worth) > 1e-4
    assert matches[1] != matches[2]


def test_what_is_paid_for_the_thought_itself_is_no_gain(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model = make_model()
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    rewards = load_rewards(["rich"], {"rich": rich})
    evaluator = RewardEvaluator(model, records, [0, 1], scorer, rewards)
    long, short = evaluator.matches([(0, "pizza below the tree"), (1, "pizza")])
    assert long is not None
    assert (long.with_cot, long.worth) == (6.0, 0.0)  # four words and two marks
    assert short is None, "no reward applies"


def test_rewards_see_the_columns_that_rl_hands_them(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    seen: dict[str, Any] = {}

    def look(completions: list, **columns: Any) -> list[float | None]:
        seen.update(columns, completions=completions)
        return [0.0] * len(completions)

    model = make_model()
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    evaluator = RewardEvaluator(model, records, [4, 2], scorer, load_rewards(["l"], {"l": look}))
    evaluator.matches([(1, "pizza"), (0, "tree"), (1, "camel")])
    assert seen["record_id"] == [records[2].id, records[4].id, records[2].id]
    assert [row[0]["content"] for row in seen["completions"]] == [
        model.renderer.completion(cot) for cot in ("pizza", "tree", "camel")
    ]
    assert {len(seen[name]) for name in ("prompts", "completion_ids", "target_rank")} == {3}


def test_one_weight_a_reward_is_expected(make_model, records: RecordSet, tmp_path: Path) -> None:
    model = make_model()
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    rewards = load_rewards(["margin", "format"], REWARDS)
    with pytest.raises(ValueError, match=r"reward_weights = \[1.0\] for 2 rewards"):
        RewardEvaluator(model, records, [0], scorer, rewards, [1.0])


def test_scores_of_another_text_of_a_reward_are_not_kept(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model = make_model()
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    plans = []
    for number, body in enumerate(("1.0", "2.0", "1.0")):
        file = tmp_path / f"{number}" / "mine.py"
        file.parent.mkdir()
        file.write_text(f"def pay(completions, **kw):\n    return [{body}] * len(completions)\n")
        rewards = load_rewards([f"{file}:pay"], REWARDS)
        plans.append(RewardEvaluator(model, records, [0], scorer, rewards).plan)
    assert plans[0] == plans[2] != plans[1]


def test_the_report_counts_what_was_sampled_and_kept_and_what_it_was_paid(
    records: RecordSet,
) -> None:
    def drafts(*paid: float | str) -> list[dict[str, Any]]:
        return [
            {"cot": f"c{n}", "source": "policy@1", "problem": p if isinstance(p, str) else None}
            | ({} if isinstance(p, str) else {"worth": p - 0.5, "with_cot": p, "without": 0.5})
            for n, p in enumerate(paid)
        ]

    rows = [
        {"id": "r0", "drafts": drafts(0.25, 1.0, "truncated")},
        {"id": "r1", "drafts": drafts(0.5, 0.25, "no_open")},
    ]
    rule = settings(min_gain=0.0).rule
    choices = [choose(row["id"], row["drafts"], rule) for row in rows]
    report = round_report(records[:2], rows, choices)
    assert (report["records"], report["samples"], report["kept"]) == (2, 6, 1)
    assert report["fates"] == {
        "selected": 1,
        "below_threshold": 3,
        "truncated": 1,
        "malformed": 1,
    }
    assert (report["mean_reward"], report["mean_reward_kept"]) == (0.5, 1.0)
