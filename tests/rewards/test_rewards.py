"""Every built-in reward keeps one contract; each formula agrees with numbers worked by hand."""

import math
import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from twn_rl.metrics.negatives import margin as margin_over
from twn_rl.rewards import (
    REWARDS,
    adaptive,
    info_nce,
    length,
    margin,
    rank_gap,
    softmax_margin,
    think_gain,
)

SIMILARITY_REWARDS = ["margin", "info_nce", "rank_gap", "softmax_margin", "think_gain"]
PARAMETERS = {
    "margin": "num_negatives",
    "think_gain": "num_negatives",
    "info_nce": "temperature",
    "softmax_margin": "temperature",
    "rank_gap": "top_k",
    "length": "max_think_tokens",
    "adaptive": "max_think_tokens",
}


def make_columns(num_rollouts: int, *, num_negatives: int = 5, seed: int = 0) -> dict[str, Any]:
    generator = random.Random(seed)

    def similarity() -> float:
        return generator.uniform(-1, 1)

    def negatives() -> list[list[float]]:
        rows = [[similarity() for _ in range(num_negatives)] for _ in range(num_rollouts)]
        return [sorted(row, reverse=True) for row in rows]

    return {
        "prompts": ["p"] * num_rollouts,
        "completions": [f"<think> {i} </think>" for i in range(num_rollouts)],
        "completion_ids": [[1, 2, i] for i in range(num_rollouts)],
        "positive_similarity": [similarity() for _ in range(num_rollouts)],
        "negative_similarities": negatives(),
        "no_think_positive_similarity": [similarity() for _ in range(num_rollouts)],
        "no_think_negative_similarities": negatives(),
        "target_rank": [generator.randint(1, 12) for _ in range(num_rollouts)],
        "think_tokens": [generator.randint(1, 300) for _ in range(num_rollouts)],
        "utility_gap": [similarity() for _ in range(num_rollouts)],
        "is_direct": [generator.random() < 0.5 for _ in range(num_rollouts)],
        "is_think_complete": [generator.random() < 0.7 for _ in range(num_rollouts)],
    }


def paid(reward: Callable[..., list[float | None]], *values: Any, **columns: Any) -> float:
    """What the first rollout earns."""
    first = reward(*values, **columns)[0]
    assert first is not None
    return first


@pytest.mark.parametrize("name", REWARDS)
def test_the_registered_name_is_the_name_in_the_logs(name):
    assert REWARDS[name].__name__ == name


@pytest.mark.parametrize("name", REWARDS)
@pytest.mark.parametrize("num_rollouts", [0, 1, 7])
def test_there_is_one_finite_float_per_rollout(name, num_rollouts):
    rewards = REWARDS[name](**make_columns(num_rollouts))
    assert len(rewards) == num_rollouts
    assert all(isinstance(value, float) and math.isfinite(value) for value in rewards)


@pytest.mark.parametrize("name", REWARDS)
def test_unknown_columns_are_ignored_and_inputs_left_alone(name):
    columns = make_columns(4)
    before = pickle.dumps(columns)
    assert REWARDS[name](**columns, trainer_state=None, hops=[1] * 4) == REWARDS[name](**columns)
    assert pickle.dumps(columns) == before


@pytest.mark.parametrize("name", REWARDS)
def test_a_reward_survives_pickling(name):
    assert pickle.loads(pickle.dumps(REWARDS[name])) is REWARDS[name]


@pytest.mark.parametrize("name", REWARDS)
@given(order=st.permutations(range(6)))
def test_permuting_the_rollouts_permutes_the_rewards(name, order):
    columns = make_columns(6)
    permuted = {key: [column[i] for i in order] for key, column in columns.items()}
    rewards = REWARDS[name](**columns)
    assert REWARDS[name](**permuted) == [rewards[i] for i in order]


@pytest.mark.parametrize("name", REWARDS)
def test_the_documentation_states_source_range_and_example(name):
    documentation = REWARDS[name].__doc__ or ""
    for part in (
        "Returns:",
        "Example:",
        ">>>",
        "arXiv",
        " in [" if name != "format" else "0.0 or 1",
    ):
        assert part in documentation


@pytest.mark.parametrize("name", SIMILARITY_REWARDS)
@given(low=st.floats(-1, 1), raise_by=st.floats(0, 2), seed=st.integers(0, 20))
def test_a_closer_positive_never_pays_less(name, low, raise_by, seed):
    columns = make_columns(1, seed=seed)
    nearer = {**columns, "positive_similarity": [min(1.0, low + raise_by)]}
    columns["positive_similarity"] = [low]
    assert paid(REWARDS[name], **nearer) >= paid(REWARDS[name], **columns) - 1e-9


@pytest.mark.parametrize("name", ["margin", "info_nce", "rank_gap", "think_gain"])
@given(seed=st.integers(0, 20), which=st.integers(0, 4), raise_by=st.floats(0, 1))
def test_a_closer_negative_never_pays_more(name, seed, which, raise_by):
    # Not softmax_margin: raising an easy negative moves weight onto it, off the hardest one.
    columns = make_columns(1, seed=seed)
    negatives = list(columns["negative_similarities"][0])
    negatives[which] = min(1.0, negatives[which] + raise_by)
    nearer = {**columns, "negative_similarities": [sorted(negatives, reverse=True)]}
    assert paid(REWARDS[name], **nearer) <= paid(REWARDS[name], **columns) + 1e-9


@given(seed=st.integers(0, 50), rank=st.integers(1, 20), worse_by=st.integers(0, 20))
def test_a_worse_rank_never_pays_more_even_with_a_negative_gap(seed, rank, worse_by):
    columns = make_columns(1, seed=seed)
    better = paid(rank_gap, **{**columns, "target_rank": [rank]})
    assert paid(rank_gap, **{**columns, "target_rank": [rank + worse_by]}) <= better + 1e-9


@given(tokens=st.integers(0, 400), more=st.integers(0, 200))
def test_more_tokens_never_pay_more(tokens, more):
    longer = paid(length, ["c"], think_tokens=[tokens + more])
    assert longer <= paid(length, ["c"], think_tokens=[tokens])


@pytest.mark.parametrize("name", SIMILARITY_REWARDS)
@given(seed=st.integers(0, 30), shuffle=st.randoms(use_true_random=False))
def test_the_order_of_negatives_does_not_matter(name, seed, shuffle):
    columns = make_columns(1, num_negatives=12, seed=seed)
    shuffled = list(columns["negative_similarities"][0])
    shuffle.shuffle(shuffled)
    rewards = REWARDS[name](**{**columns, "negative_similarities": [shuffled]})
    assert rewards == pytest.approx(REWARDS[name](**columns))


@pytest.mark.parametrize("name", SIMILARITY_REWARDS)
def test_a_rollout_without_negatives_is_not_applicable(name):
    columns = make_columns(2)
    columns["negative_similarities"][1] = []
    rewards = REWARDS[name](**columns)
    assert rewards[0] is not None
    assert rewards[1] is None


@given(seed=st.integers(0, 1000), count=st.integers(1, 9))
def test_there_is_one_margin_for_rewards_and_decisions(seed, count):
    columns = make_columns(3, seed=seed)
    columns["negative_similarities"][1] = []
    columns["no_think_negative_similarities"][2] = []
    shared: dict[str, Any] = {"num_negatives": count}
    own = margin(**columns, **shared)
    without = margin(
        columns["completions"],
        positive_similarity=columns["no_think_positive_similarity"],
        negative_similarities=columns["no_think_negative_similarities"],
        **shared,
    )
    assert [value is None for value in (*own, *without)] == [False, True, False] + [False] * 2 + [
        True
    ]
    gains = think_gain(**columns, **shared)
    assert own[0] is not None
    assert without[0] is not None
    assert gains == [own[0] - without[0], None, None]
    pairs = zip(columns["positive_similarity"], columns["negative_similarities"], strict=True)
    assert [margin_over(*pair, count) for pair in pairs] == own


@pytest.mark.parametrize(("name", "parameter"), PARAMETERS.items())
def test_a_parameter_out_of_range_says_what_was_expected(name, parameter):
    with pytest.raises(ValueError, match=rf"{parameter} = 0.*expected"):
        REWARDS[name](**make_columns(1), **{parameter: 0})


def test_equal_similarities_give_minus_log_of_the_number_of_candidates():
    row = info_nce(["c"], positive_similarity=[0.3], negative_similarities=[[0.3] * 7])
    assert row == pytest.approx([-math.log(8)])


def test_info_nce_does_not_overflow_at_a_tiny_temperature():
    columns = {"positive_similarity": [-1.0], "negative_similarities": [[1.0, 1.0]]}
    assert info_nce(["c"], **columns, temperature=1e-3) == pytest.approx([-2000 - math.log(2)])


def test_softmax_margin_lies_between_the_mean_and_the_hardest_negative():
    columns = {"positive_similarity": [0.9], "negative_similarities": [[0.8, 0.1, -0.4]]}
    mean = paid(margin, ["c"], **columns)
    assert 0.9 - 0.8 < paid(softmax_margin, ["c"], **columns) < mean
    assert softmax_margin(["c"], **columns, temperature=1e6)[0] == pytest.approx(mean)
    assert softmax_margin(["c"], **columns, temperature=1e-3)[0] == pytest.approx(0.1)


def test_a_first_place_earns_exactly_the_gap():
    columns = make_columns(1)
    columns.update(positive_similarity=[0.9], negative_similarities=[[0.5, 0.1]], target_rank=[1])
    assert rank_gap(**columns) == pytest.approx([0.6])


def test_thinking_that_changes_nothing_gains_exactly_nothing():
    columns = make_columns(3)
    columns["no_think_positive_similarity"] = columns["positive_similarity"]
    columns["no_think_negative_similarities"] = columns["negative_similarities"]
    assert think_gain(**columns) == [0.0, 0.0, 0.0]


@pytest.mark.parametrize(("tokens", "expected"), [(80, 0.0), (90, -0.5), (100, -1.0), (101, -1.0)])
def test_length_follows_equation_13_of_dapo(tokens, expected):
    row = length(["c"], think_tokens=[tokens], max_think_tokens=100, soft_window_tokens=20)
    assert row == [expected]


def test_no_soft_window_is_a_cliff_at_the_budget():
    row = length(["c"] * 2, think_tokens=[100, 101], max_think_tokens=100, soft_window_tokens=0)
    assert row == [0.0, -1.0]


@pytest.mark.parametrize(
    ("gap", "direct", "verdict"),
    [(0.3, False, 1), (0.3, True, -1), (0.1, False, -1), (0.1, True, 1)],
)
def test_thinking_is_right_exactly_where_it_gains_more_than_the_dead_band(gap, direct, verdict):
    row = {"utility_gap": [gap], "is_direct": [direct], "think_tokens": [0]}
    assert adaptive(["c"], **row, min_gap=0.2) == [verdict]


def test_a_gap_on_the_edge_of_the_dead_band_is_not_worth_a_thought():
    rows = {"utility_gap": [0.25, 0.25], "is_direct": [False, True], "think_tokens": [0, 0]}
    assert adaptive(["c", "c"], **rows, min_gap=0.25) == [-1.0, 1.0]


def test_a_right_thought_of_the_whole_budget_pays_the_whole_cost_and_a_direct_answer_none():
    rows = {"utility_gap": [1.0, -1.0], "is_direct": [False, True], "think_tokens": [32, 0]}
    paid = adaptive(["c", "c"], **rows, length_cost=0.25, max_think_tokens=32)
    assert paid == [0.75, 1.0]


def test_without_a_gap_the_decision_is_not_judged():
    rows = {"utility_gap": [None], "is_direct": [True], "think_tokens": [0]}
    assert adaptive(["c"], **rows) == [None]
