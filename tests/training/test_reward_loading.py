"""A reward that cannot work is refused before training; one that breaks names its row."""

import math
import pickle

import pytest
import torch
from trl.trainer.utils import get_callable_name, is_async_callable

from twn_rl.rewards import REWARDS, margin
from twn_rl.training.reward_loading import (
    CheckedReward,
    RewardError,
    RewardLoadingError,
    load_rewards,
)

COLUMNS = {"positive_similarity": [0.75, 0.5], "negative_similarities": [[0.25], [0.5]]}

NOT_A_FUNCTION = 3
MODULE_REWARD = torch.nn.Linear(1, 1)


def nearby(completions, *, target_rank, top_k=1, **kwargs):
    return [1.0 if rank <= top_k else 0.0 for rank in target_rank]


def inverse_rank(completions, *, target_rank, **kwargs):
    return [1 / rank for rank in target_rank]


def infinite_on_second(completions, **kwargs):
    return [0.0, math.inf, None]


def one_too_few(completions, **kwargs):
    return [0.0] * (len(completions) - 1)


def a_word(completions, **kwargs):
    return ["good"] * len(completions)


def one_number(completions, **kwargs):
    return 1.0


def batch_only(completions, **kwargs):
    if len(completions) > 1:
        raise RuntimeError("rows disagree")
    return [0.0]


async def asynchronous(completions, **kwargs):
    return [0.0]


def without_kwargs(completions):
    return [0.0]


def test_built_in_rewards_load_in_order_under_their_own_names():
    rewards = load_rewards(["margin", "format"], REWARDS)
    assert [reward.__name__ for reward in rewards] == ["margin", "format"]
    assert rewards[0](["a", "b"], **COLUMNS) == [0.5, 0.0]


def test_trl_logs_a_bound_and_checked_reward_under_its_function_name():
    (reward,) = load_rewards(["margin"], REWARDS, {"margin": {"num_negatives": 1}})
    assert get_callable_name(reward) == "margin"
    assert not is_async_callable(reward)
    assert not isinstance(reward, torch.nn.Module)


def test_parameters_are_bound():
    columns = {"positive_similarity": [0.5], "negative_similarities": [[0.5, -0.5]]}
    (one,) = load_rewards(["margin"], REWARDS, {"margin": {"num_negatives": 1}})
    (two,) = load_rewards(["margin"], REWARDS, {"margin": {"num_negatives": 2}})
    assert one(["a"], **columns) == [0.0]
    assert two(["a"], **columns) == [0.5]


def test_a_loaded_reward_survives_pickling_with_its_parameters():
    (reward,) = load_rewards(["margin"], REWARDS, {"margin": {"num_negatives": 1}})
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == "margin"
    assert copy(["a", "b"], **COLUMNS) == reward(["a", "b"], **COLUMNS)


def test_a_reward_is_found_by_module_and_by_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def fixed(completions, *, value=2.0, **kwargs):\n    return [value]\n")
    by_file, by_module = load_rewards(
        [f"{path}:fixed", "twn_rl.rewards.margins:margin"], {}, {f"{path}:fixed": {"value": 3.0}}
    )
    assert by_file(["a"]) == [3.0]
    assert by_module.reward_func is margin


def test_a_file_is_imported_once(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def a(completions, **kwargs): ...\ndef b(completions, **kwargs): ...\n")
    first, second = load_rewards([f"{path}:a", f"{path}:b"], {})
    assert first.reward_func.__globals__ is second.reward_func.__globals__


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("margn", r"'margn' is unknown, expected one of \[.*did you mean 'margin'"),
        ("nowhere.rewards:f", "no module 'nowhere'"),
        ("twn_rl.rewards.nowhere:f", r"no module 'twn_rl\.rewards\.nowhere'"),
        ("not a module:f", "is no module path"),
        ("missing/file.py:f", "no Python file at"),
        (
            "twn_rl.rewards.margins:margn",
            r"has no 'margn', expected one of its functions \['margin'",
        ),
        (f"{__name__}:NOT_A_FUNCTION", "is int 3, expected a function"),
        (f"{__name__}:MODULE_REWARD", "is an nn.Module, expected a plain function"),
        ("torch.nn:Linear", "is an nn.Module"),
        (f"{__name__}:asynchronous", "is async"),
        (f"{__name__}:without_kwargs", r"has no \*\*kwargs"),
    ],
)
def test_each_way_to_misname_a_reward_has_its_own_message(name, message):
    with pytest.raises(RewardLoadingError, match=message):
        load_rewards([name], REWARDS)


@pytest.mark.parametrize(
    ("body", "cause"),
    [("1 / 0", ZeroDivisionError), ("import nowhere_at_all", ModuleNotFoundError)],
)
def test_a_file_that_fails_to_import_chains_its_cause(tmp_path, body, cause):
    path = tmp_path / "broken.py"
    path.write_text(body)
    with pytest.raises(RewardLoadingError, match=r"importing .* raised") as caught:
        load_rewards([f"{path}:f"], {})
    assert isinstance(caught.value.__cause__, cause)


def test_a_module_whose_own_import_is_missing_is_not_called_missing(tmp_path, monkeypatch):
    (tmp_path / "has_a_bad_import.py").write_text("import nowhere_at_all")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(RewardLoadingError, match="importing has_a_bad_import raised"):
        load_rewards(["has_a_bad_import:f"], {})


def test_an_unknown_parameter_lists_those_accepted():
    with pytest.raises(RewardLoadingError, match=r"\['negatives'\], expected some of \[.*'num_neg"):
        load_rewards(["margin"], REWARDS, {"margin": {"negatives": 3}})


def test_a_column_cannot_be_set_as_a_parameter():
    parameters = {"margin": {"positive_similarity": [1.0]}}
    with pytest.raises(RewardLoadingError, match=r"\['positive_similarity'\], expected some of"):
        load_rewards(["margin"], REWARDS, parameters, available_columns=list(COLUMNS))


def test_parameters_of_an_unlisted_reward_are_refused():
    with pytest.raises(RewardLoadingError, match=r"parameters for \['length'\]"):
        load_rewards(["margin"], REWARDS, {"length": {"max_think_tokens": 9}})


def test_no_reward_at_all_is_refused():
    with pytest.raises(RewardLoadingError, match="at least one"):
        load_rewards([], REWARDS)


def test_two_rewards_of_one_name_are_refused_because_their_curves_would_mix():
    with pytest.raises(RewardLoadingError, match=r"\['margin'\] more than once"):
        load_rewards(["margin", "twn_rl.rewards.margins:margin"], REWARDS)


def test_a_missing_column_is_found_before_training():
    load_rewards(["margin"], REWARDS, available_columns=list(COLUMNS))
    with pytest.raises(RewardLoadingError, match=r"'rank_gap' needs columns \['target_rank'\]"):
        load_rewards(["rank_gap"], REWARDS, available_columns=list(COLUMNS))


def test_a_raising_reward_names_itself_and_the_row():
    reward = CheckedReward(inverse_rank)
    with pytest.raises(RewardError, match=r"'inverse_rank' raised Zero.*row 1.*target_rank = 0"):
        reward(["a", "b", "c"], target_rank=[1, 0, 2], trainer_state=None, prompts=["p"] * 3)


def test_a_reward_that_fails_only_on_the_batch_says_so():
    with pytest.raises(RewardError, match=r"rows disagree.*No single row raises"):
        CheckedReward(batch_only)(["a", "b"])


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (infinite_on_second, "'infinite_on_second' gave inf for row 1"),
        (one_too_few, "returned 2 values for 3 completions"),
        (a_word, "gave 'good' for row 0"),
        (one_number, "returned float, expected a list of 3 values"),
    ],
)
def test_a_wrong_return_value_is_an_error_and_not_a_zero(function, message):
    with pytest.raises(RewardError, match=message):
        CheckedReward(function)(["a", "b", "c"])


def test_none_passes_and_tensors_become_floats():
    def some(completions, **kwargs):
        return [None, torch.tensor(0.5)]

    assert CheckedReward(some)(["a", "b"]) == [None, 0.5]


def test_an_empty_batch_gives_no_rewards():
    assert CheckedReward(nearby)([], target_rank=[]) == []


def test_what_a_reward_does_to_its_columns_stays_with_it():
    def greedy(completions, *, positive_similarity, negative_similarities, **kwargs):
        positive_similarity.clear()
        for negatives in negative_similarities:
            negatives.append(9.0)
        return [0.0] * len(completions)

    columns = {"positive_similarity": [0.75], "negative_similarities": [[0.25]]}
    assert CheckedReward(greedy)(["a"], **columns) == [0.0]
    assert columns == {"positive_similarity": [0.75], "negative_similarities": [[0.25]]}


def test_a_reward_that_ends_the_process_is_an_error_and_not_the_end_of_the_run():
    def leaves(completions, **kwargs):
        raise SystemExit(0)

    with pytest.raises(RewardError, match="'leaves' raised SystemExit"):
        CheckedReward(leaves)(["a"])


def test_a_value_whose_sum_overflows_is_an_error():
    def huge(completions, **kwargs):
        return [1e308 for _ in completions]

    with pytest.raises(RewardError, match=r"1e\+308 for row 0, expected a finite number of at"):
        CheckedReward(huge)(["a", "b"])
