"""How well probabilities tell two classes apart, against loops over pairs and bins."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twn_rl.metrics.calibration import expected_calibration_error, roc_auc


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=2, max_size=30))
def test_roc_auc_is_the_share_of_pairs_in_the_right_order(examples: list[tuple[int, bool]]) -> None:
    scores = [score / 10 for score, _ in examples]
    labels = [label for _, label in examples]
    positive = [s for s, label in zip(scores, labels, strict=True) if label]
    negative = [s for s, label in zip(scores, labels, strict=True) if not label]
    if not positive or not negative:
        assert roc_auc(scores, labels) is None
        return
    wins = [(p > n) + 0.5 * (p == n) for p in positive for n in negative]
    assert roc_auc(scores, labels) == pytest.approx(np.mean(wins))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=30))
def test_calibration_error_is_the_weighted_gap_of_each_bin(
    examples: list[tuple[float, bool]],
) -> None:
    bins: dict[int, list[tuple[float, bool]]] = {}
    for probability, label in examples:
        bins.setdefault(min(int(probability * 5), 4), []).append((probability, label))
    gaps = [
        len(members)
        / len(examples)
        * abs(np.mean([label for _, label in members]) - np.mean([p for p, _ in members]))
        for members in bins.values()
    ]
    probabilities, labels = zip(*examples, strict=True)
    error = expected_calibration_error(probabilities, labels, num_bins=5)
    assert error == pytest.approx(sum(gaps), abs=1e-9)


def test_roc_auc_is_that_of_scikit_learn_with_ties() -> None:
    reference = pytest.importorskip("sklearn.metrics", reason="needs scikit-learn")
    rng = np.random.default_rng(0)
    scores, labels = rng.integers(0, 20, 500) / 20, rng.integers(2, size=500)
    assert roc_auc(scores, labels) == pytest.approx(reference.roc_auc_score(labels, scores))
