"""Ranking metrics, their uncertainty, and signs of collapse. Knows no models, files or trainers.

Ties count against the model and non-finite numbers are refused: a model that gives every input the
same vector scores 0, not the 100 % that sorting by similarity would give it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from twn_rl.metrics.arrays import Array, Numbers, as_array, bool_matrix, finite, finite_matrix

# Matrix products give equal vectors similarities that differ in the last float32 bits.
TIE_TOLERANCE = 1e-6
COLLAPSE_SAMPLE = 2000  # a singular value decomposition of more rows takes minutes on a CPU


def positive_ranks(
    similarities: Numbers,
    positive_index: Numbers,
    *,
    mask: Numbers | None = None,
    tie_tolerance: float = TIE_TOLERANCE,
) -> Array:
    """Return the rank of each query's positive, (N,) int64, 1 = best, ties against the model.

    rank = 1 + number of other candidates whose similarity >= positive - tie_tolerance.

    >>> positive_ranks([[0.9, 0.2, 0.5], [0.1, 0.1, 0.1]], [0, 2])
    array([1, 3])

    Args:
        similarities: (N, M), higher is nearer.
        positive_index: (N,) column of the positive.
        mask: (N, M) bool, True = no rival: further positives, or candidates of another pool.
        tie_tolerance: Similarities this close are equal; 0 = exact comparison only.

    Raises:
        ValueError: For non-finite similarities, shapes that do not fit, indices out of range.
    """
    scores = finite_matrix(similarities, "similarities")
    n, m = scores.shape
    positives = as_array(positive_index)
    if not n:
        return np.zeros(0, dtype=np.int64)
    if (
        positives.shape != (n,)
        or not np.issubdtype(positives.dtype, np.integer)
        or positives.min() < 0
        or positives.max() >= m
    ):
        raise ValueError(
            f"positive_index is {positives.dtype} {positives.shape}; expected ({n},) integer "
            f"columns from 0 to {m - 1}; pass one column per query"
        )
    positive = np.take_along_axis(scores, positives[:, None], axis=1)
    is_rival = np.ones((n, m), dtype=bool) if mask is None else ~bool_matrix(mask, (n, m))
    np.put_along_axis(is_rival, positives[:, None], False, axis=1)
    return 1 + ((scores >= positive - tie_tolerance) & is_rival).sum(axis=1)


def hit_at_k(ranks: Numbers, k: int) -> Array:
    """Return 1.0 for each query whose positive is among the first k, else 0.0; (N,).

    >>> float(hit_at_k([1, 3, 2], k=2).mean().round(2))
    0.67

    Raises:
        ValueError: For ranks below 1 or k below 1.
    """
    return (_checked_ranks(ranks) <= _checked_k(k)).astype(np.float64)


def reciprocal_ranks(ranks: Numbers) -> Array:
    """Return 1 / rank of each query, (N,) in (0, 1]; the mean is the MRR.

    >>> reciprocal_ranks([1, 4]).tolist()
    [1.0, 0.25]

    Raises:
        ValueError: For ranks below 1.
    """
    return 1.0 / _checked_ranks(ranks)


def ndcg_at_k(
    similarities: Numbers, relevance: Numbers, k: int, *, tie_tolerance: float = TIE_TOLERANCE
) -> Array:
    """Return nDCG@k with linear gains for each query, (N,) in [0, 1], ties against the model.

    DCG = sum of relevance / log2(1 + position) over the first k positions (Jarvelin and Kekalainen
    2002), divided by the DCG of the best order. Among tied candidates the less relevant come first.

    >>> ndcg_at_k([[0.9, 0.2, 0.5]], [[0, 0, 1]], k=3).round(3).tolist()
    [0.631]
    >>> ndcg_at_k([[0.5, 0.5]], [[1, 0]], k=1).tolist()
    [0.0]

    Args:
        similarities: (N, M), higher is nearer.
        relevance: (N, M), at least 0; a query needs one candidate above 0.
        k: Number of positions that count.
        tie_tolerance: Similarities this close are equal; 0 = exact comparison only.

    Raises:
        ValueError: For non-finite or negative numbers, or a query without a relevant candidate.
    """
    scores = finite_matrix(similarities, "similarities")
    gains = finite_matrix(relevance, "relevance")
    is_bad = (gains < 0).any(axis=1) | (gains.max(axis=1, initial=0.0) <= 0)
    if gains.shape != scores.shape or is_bad.any():
        raise ValueError(
            f"relevance has shape {gains.shape} and unusable rows {np.flatnonzero(is_bad)[:5]}; "
            f"expected {scores.shape}, no negative number and one positive number a row; "
            "leave queries without relevant candidates out"
        )
    _checked_k(k)
    return np.array(
        [_ndcg(s, g, k, tie_tolerance) for s, g in zip(scores, gains, strict=True)], dtype=float
    )


def _ndcg(scores: Array, gains: Array, k: int, tie_tolerance: float) -> float:
    positions = relevant_positions(scores, gains, tie_tolerance=tie_tolerance)
    relevant = gains[gains > 0]
    discounts = np.where(positions <= k, 1.0 / np.log2(1.0 + positions), 0.0)
    best = np.sort(relevant)[::-1][:k]
    return float(relevant @ discounts / (best / np.log2(2.0 + np.arange(len(best)))).sum())


def relevant_positions(
    scores: Array, gains: Array, *, tie_tolerance: float = TIE_TOLERANCE
) -> Array:
    """Return the positions, 1 = best, of one query's relevant candidates in order of their columns.

    Among tied candidates the less relevant come first, and of equally relevant ones the first.

    >>> relevant_positions(np.array([0.9, 0.2, 0.5, 0.5]), np.array([0, 0, 1, 0])).tolist()
    [3]

    Args:
        scores: (M,) finite, higher is nearer.
        gains: (M,) at least 0; above 0 = relevant.
        tie_tolerance: Similarities this close are equal; 0 = exact comparison only.
    """
    relevant = np.flatnonzero(gains)
    gap = scores[None, :] - scores[relevant, None]  # (relevant, candidates)
    is_tied = np.abs(gap) <= tie_tolerance
    more_gain = gains[relevant, None] - gains[None, :]
    is_earlier = np.arange(len(gains))[None, :] < relevant[:, None]
    is_before = (gap > tie_tolerance) | (
        is_tied & ((more_gain > 0) | ((more_gain == 0) & is_earlier))
    )
    return 1 + is_before.sum(axis=1)


def retrieval_metrics(
    similarities: Numbers,
    positive_index: Numbers,
    *,
    mask: Numbers | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, float]:
    """Return the means of hit@k and MRR over queries with one positive each.

    >>> retrieval_metrics([[0.9, 0.2], [0.3, 0.1]], [0, 1], ks=(1,))
    {'hit@1': 0.5, 'mrr': 0.75}

    Raises:
        ValueError: As `positive_ranks`, and when there is no query.
    """
    ranks = positive_ranks(similarities, positive_index, mask=mask)
    if not len(ranks):
        raise ValueError("similarities has 0 rows; expected at least one query; check the data")
    hits = {f"hit@{k}": float(hit_at_k(ranks, k).mean()) for k in ks}
    return {**hits, "mrr": float(reciprocal_ranks(ranks).mean())}


@dataclass(frozen=True)
class Interval:
    """A mean with the bounds of its bootstrap interval."""

    mean: float
    low: float
    high: float


def bootstrap_interval(
    values: Numbers, *, confidence: float = 0.95, num_resamples: int = 1000, seed: int = 0
) -> Interval:
    """Return the mean of per-query values with its percentile bootstrap interval.

    For the difference of two systems on the same queries pass the differences: pairing removes the
    spread that the queries have in common.

    >>> bootstrap_interval([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0)

    Args:
        values: (N,) one number a query, such as `hit_at_k(ranks, 1)`.
        confidence: Probability mass of the interval, in (0, 1).
        num_resamples: How many times N values are drawn with replacement.
        seed: Seed of the draws; equal seeds give equal intervals.

    Raises:
        ValueError: For no or non-finite values, or a confidence outside (0, 1).
    """
    sample = finite(values, "values").astype(np.float64)
    if sample.ndim != 1 or not len(sample) or not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"values has shape {sample.shape}, confidence = {confidence}, num_resamples = "
            f"{num_resamples}; expected (N,) with N > 0, a confidence in (0, 1) and at least one "
            "resample; correct the arguments"
        )
    rng = np.random.default_rng(seed)
    draws = (rng.integers(len(sample), size=len(sample)) for _ in range(num_resamples))
    means = [sample[draw].mean() for draw in draws]
    tail = (1 - confidence) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return Interval(mean=float(sample.mean()), low=float(low), high=float(high))


def collapse_report(embeds: Numbers) -> dict[str, float]:
    """Return how spread out embeddings are; rows are scaled to unit length first.

    `mean_pairwise_cosine` in [-1, 1]: near 0 when spread, 1 when all vectors are one.
    `effective_rank` in [1, min(N, D)]: exp of the entropy of the singular values (RankMe, arXiv
    2210.02885, eq. 2); 1 when all vectors are one. `scaled_std` in [0, 1]: mean over dimensions of
    the standard deviation times sqrt(D) (SimSiam, arXiv 2011.10566, section 4.1); 0 when all
    vectors are one. `zero_vector_ratio`: share of rows without a direction.

    >>> report = collapse_report([[1.0, 0.0], [1.0, 0.0]])
    >>> report["mean_pairwise_cosine"], report["effective_rank"], report["scaled_std"]
    (1.0, 1.0, 0.0)

    Raises:
        ValueError: For fewer than two rows or non-finite numbers.
    """
    rows = finite_matrix(embeds, "embeds").astype(np.float64)
    n, width = rows.shape
    if n < 2:
        raise ValueError(f"embeds has {n} rows; expected at least 2 to compare; pass more inputs")
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    unit = np.divide(rows, norms, out=np.zeros_like(rows), where=norms > 0)
    squares = (unit**2).sum()  # N, less the rows without a direction
    singular = np.linalg.svd(unit, compute_uv=False)
    shares = singular / singular.sum() if singular.sum() > 0 else np.eye(1, len(singular))[0]
    shares = shares[shares > 0]
    return {
        "mean_pairwise_cosine": float(((unit.sum(axis=0) ** 2).sum() - squares) / (n * (n - 1))),
        "effective_rank": float(np.exp(-(shares * np.log(shares)).sum())),
        "scaled_std": float(unit.std(axis=0).mean() * np.sqrt(width)),
        "zero_vector_ratio": float((norms == 0).mean()),
    }


def sampled_collapse(embeds: Array) -> dict[str, float]:
    """Return the collapse report of up to `COLLAPSE_SAMPLE` rows (N, D); {} for fewer than two.

    >>> sampled_collapse(np.ones((1, 2)))
    {}
    """
    if len(embeds) < 2:
        return {}
    return collapse_report(embeds[:: -(-len(embeds) // COLLAPSE_SAMPLE)])


def _checked_ranks(ranks: Numbers) -> Array:
    array = as_array(ranks)
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer) or (array < 1).any():
        raise ValueError(f"ranks is {array.dtype} {array.shape}; expected (N,) integers from 1 up")
    return array


def _checked_k(k: int) -> int:
    if k < 1:
        raise ValueError(f"k = {k}; expected at least 1; raise it")
    return k
