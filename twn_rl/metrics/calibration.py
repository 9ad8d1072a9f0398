"""How well probabilities tell two classes apart, and how true they are."""

import numpy as np

from twn_rl.metrics.arrays import Array, Numbers, finite


def roc_auc(scores: Numbers, labels: Numbers) -> float | None:
    """Return the area under the ROC curve in [0, 1], ties counting half; None without both classes.

    The chance that a positive scores above a negative (Hanley and McNeil 1982). scikit-learn's is
    the same up to rounding, and not installed where gates are fitted.

    >>> roc_auc([0.1, 0.4, 0.4, 0.8], [0, 0, 1, 1])
    0.875
    >>> roc_auc([0.1, 0.4], [1, 1]) is None
    True

    Args:
        scores: (N,), higher means positive.
        labels: (N,) of 0 and 1, or bool.

    Raises:
        ValueError: For non-finite scores, shapes that do not fit or other labels.
    """
    values, is_positive = _scores_and_labels(scores, labels, "scores")
    num_positive = int(is_positive.sum())
    num_negative = len(is_positive) - num_positive
    if not num_positive or not num_negative:
        return None
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean_rank = last - (counts - 1) / 2  # of each distinct score, from 1
    rank_sum = mean_rank[place[is_positive]].sum()
    return float((rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative))


def expected_calibration_error(
    probabilities: Numbers, labels: Numbers, *, num_bins: int = 15
) -> float:
    """Return the mean gap between stated and observed probability in [0, 1]; 0 is calibrated.

    ECE = sum over equally wide bins of n_b / N * |mean label - mean probability| (Guo et al. 2017,
    1706.04599, eq. 3).

    >>> round(expected_calibration_error([0.1, 0.1, 0.9, 0.9], [0, 0, 1, 0], num_bins=10), 3)
    0.25

    Args:
        probabilities: (N,) in [0, 1].
        labels: (N,) of 0 and 1, or bool.
        num_bins: Number of bins.

    Raises:
        ValueError: For no examples, numbers outside [0, 1] or other labels.
    """
    values, is_positive = _scores_and_labels(probabilities, labels, "probabilities")
    if not len(values) or values.min() < 0 or values.max() > 1 or num_bins < 1:
        raise ValueError(
            f"probabilities has {len(values)} values, num_bins = {num_bins}; expected at least "
            "one value, all in [0, 1], and at least one bin; correct the arguments"
        )
    bins = np.minimum((values * num_bins).astype(np.int64), num_bins - 1)
    gaps = np.bincount(bins, weights=is_positive - values, minlength=num_bins)
    return float(np.abs(gaps).sum() / len(values))


def _scores_and_labels(scores: Numbers, labels: Numbers, name: str) -> tuple[Array, Array]:
    values, marks = finite(scores, name).astype(np.float64), finite(labels, "labels")
    if values.ndim != 1 or marks.shape != values.shape or not np.isin(marks, (0, 1)).all():
        raise ValueError(
            f"{name} has shape {values.shape}, labels {marks.shape}; expected (N,) both, labels 0 "
            "or 1; correct the arguments"
        )
    return values, marks == 1
