"""Ranking metrics: closed forms, naive loops, ties against the model, nothing non-finite."""

import math

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given, settings

from twn_rl.metrics.ranking import (
    bootstrap_interval,
    collapse_report,
    mean_metrics,
    ndcg_at_k,
    positive_ranks,
    query_metrics,
)


def _naive_rank(row: np.ndarray, positive: int, mask: np.ndarray) -> int:
    better = 0
    for j in range(len(row)):
        if j != positive and not mask[j] and row[j] >= row[positive]:
            better += 1
    return 1 + better


def _naive_ndcg(row: np.ndarray, gains: np.ndarray, k: int) -> float:
    order = sorted(range(len(row)), key=lambda j: (-row[j], gains[j]))
    dcg = sum(gains[j] / math.log2(2 + place) for place, j in enumerate(order[:k]))
    best = sorted(gains, reverse=True)[:k]
    return dcg / sum(gain / math.log2(2 + place) for place, gain in enumerate(best))


@given(seed=st.integers(0, 10_000), m=st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_ranks_equal_a_naive_loop_with_many_ties(seed: int, m: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, size=(5, m)) / 4
    positives = rng.integers(m, size=5)
    mask = rng.random((5, m)) < 0.3
    expected = [_naive_rank(s, p, x) for s, p, x in zip(scores, positives, mask, strict=True)]
    assert positive_ranks(scores, positives, mask=mask).tolist() == expected


@given(seed=st.integers(0, 10_000), m=st.integers(1, 9), k=st.integers(1, 10))
@settings(max_examples=50, deadline=None)
def test_ndcg_equals_a_naive_loop_with_many_ties(seed: int, m: int, k: int) -> None:
    rng = np.random.default_rng(seed)
    scores, gains = rng.integers(0, 4, size=(5, m)) / 4, rng.integers(0, 3, size=(5, m))
    gains[:, 0] += 1
    expected = [_naive_ndcg(s, g, k) for s, g in zip(scores, gains, strict=True)]
    assert ndcg_at_k(scores, gains, k).tolist() == pytest.approx(expected)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=30, deadline=None)
def test_permuting_candidates_changes_no_metric(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores, positives = rng.integers(0, 4, size=(4, 7)) / 4, rng.integers(7, size=4)
    order = rng.permutation(7)
    moved = np.argsort(order)[positives]
    assert (positive_ranks(scores, positives) == positive_ranks(scores[:, order], moved)).all()
    gains = rng.integers(1, 3, size=(4, 7))
    plain, permuted = ndcg_at_k(scores, gains, 3), ndcg_at_k(scores[:, order], gains[:, order], 3)
    assert permuted == pytest.approx(plain)


@pytest.mark.parametrize("width", [3, 64, 777])
@pytest.mark.parametrize("candidates", [2, 16, 1000])
def test_a_constant_model_scores_zero_where_sorting_gives_it_everything(
    width: int, candidates: int
) -> None:
    vector = np.random.default_rng(0).normal(size=width).astype(np.float32)
    vector /= np.linalg.norm(vector)
    queries, targets = np.tile(vector, (5, 1)), np.tile(vector, (candidates, 1))
    scores = queries @ targets.T
    if candidates == 16:
        first = np.argsort(-np.round(scores, 5), axis=1, kind="stable")[:, 0]
        assert (first == 0).mean() == 1.0  # the usual code, with the answer listed first
    assert positive_ranks(scores, np.zeros(5, dtype=int)).tolist() == [candidates] * 5
    gains = np.zeros((5, candidates))
    gains[:, 0] = 1
    assert ndcg_at_k(scores, gains, 1).max() == 0.0


def test_a_perfect_model_scores_one() -> None:
    assert positive_ranks(np.eye(4), np.arange(4)).tolist() == [1] * 4
    assert ndcg_at_k(np.eye(4), np.eye(4), 5).tolist() == [1.0] * 4


def test_torch_tensors_of_any_float_type_are_accepted() -> None:
    scores = torch.eye(3, dtype=torch.bfloat16, requires_grad=True)
    assert positive_ranks(scores, torch.arange(3)).tolist() == [1, 1, 1]
    assert positive_ranks(scores, torch.arange(3), mask=~torch.eye(3).bool()).tolist() == [1, 1, 1]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_numbers_are_refused_everywhere(bad: float) -> None:
    scores = np.eye(3)
    scores[1, 2] = bad
    calls = (
        lambda: positive_ranks(scores, [0, 1, 2]),
        lambda: ndcg_at_k(scores, np.eye(3), 1),
        lambda: ndcg_at_k(np.eye(3), scores, 1),
        lambda: collapse_report(scores),
        lambda: bootstrap_interval(scores[1]),
    )
    for call in calls:
        with pytest.raises(ValueError, match="1 non-finite numbers"):
            call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: positive_ranks(np.eye(2), [0, 2]), "columns from 0 to 1"),
        (lambda: positive_ranks(np.eye(2), [0, -1]), "columns from 0 to 1"),
        (lambda: positive_ranks(np.eye(2), [0]), r"expected \(2,\)"),
        (lambda: positive_ranks(np.eye(2), [0, 1], mask=np.eye(2)), "expected bool"),
        (lambda: positive_ranks(np.ones(2), [0]), "2 dimensions"),
        (lambda: ndcg_at_k(np.eye(2), np.eye(2), 0), "at least 1"),
        (lambda: query_metrics([0.5], [1], ks=(0,)), "at least 1"),
        (lambda: query_metrics([0.5], [1, 0]), r"expected \(1, 1\)"),
        (lambda: query_metrics([], []), "2 dimensions"),
        (lambda: ndcg_at_k(np.eye(2), np.zeros((2, 2)), 1), "without relevant"),
        (lambda: mean_metrics([]), "at least one"),
        (lambda: bootstrap_interval([]), "N > 0"),
        (lambda: collapse_report([[1.0, 0.0]]), "at least 2"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_bootstrap_interval_is_seeded_and_covers_the_mean() -> None:
    values = np.random.default_rng(0).integers(2, size=200).astype(float)
    interval = bootstrap_interval(values, seed=1)
    assert interval == bootstrap_interval(values, seed=1)
    assert interval.low < interval.mean < interval.high
    standard_error = values.std() / math.sqrt(200)
    assert interval.high - interval.low == pytest.approx(2 * 1.96 * standard_error, rel=0.15)


def test_collapse_report_knows_spread_and_collapsed_vectors() -> None:
    spread = collapse_report(np.eye(8))
    assert spread["mean_pairwise_cosine"] == pytest.approx(0.0)
    assert spread["effective_rank"] == pytest.approx(8.0)
    collapsed = collapse_report(np.tile([[0.6, 0.8]], (5, 1)) * np.arange(1, 6)[:, None])
    assert collapsed["mean_pairwise_cosine"] == pytest.approx(1.0)
    assert collapsed["effective_rank"] == pytest.approx(1.0)
    assert collapsed["scaled_std"] == pytest.approx(0.0, abs=1e-6)
    assert collapse_report(np.zeros((2, 3)))["zero_vector_ratio"] == 1.0


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_collapse_report_matches_pairwise_loops_and_ignores_rotation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    rows = rng.normal(size=(6, 4))
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    pairs = [unit[i] @ unit[j] for i in range(6) for j in range(6) if i != j]
    report = collapse_report(rows)
    assert report["mean_pairwise_cosine"] == pytest.approx(np.mean(pairs))
    rotation = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    rotated = collapse_report(rows @ rotation)
    for key in ("mean_pairwise_cosine", "effective_rank"):
        assert rotated[key] == pytest.approx(report[key])
