"""Ranking metrics, their uncertainty, and signs of collapse.

Ties count against the model and non-finite numbers are refused: a model that gives every input the
same vector scores 0, not the 100 % that sorting by similarity would give it.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from twn_rl.metrics.arrays import Array, Numbers, as_array, finite, finite_matrix

# Matrix products give equal vectors similarities that differ in the last float32 bits.
TIE_TOLERANCE = 1e-6
COLLAPSE_SAMPLE = 2000  # a singular value decomposition of more rows takes minutes on a CPU
KS = (1, 5, 10)


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
    is_other = np.zeros((n, m), dtype=bool) if mask is None else as_array(mask)
    if is_other.dtype != bool or is_other.shape != (n, m):
        raise ValueError(
            f"mask is {is_other.dtype} {is_other.shape}; expected bool {(n, m)}; convert it"
        )
    is_rival = ~is_other
    np.put_along_axis(is_rival, positives[:, None], False, axis=1)
    return 1 + ((scores >= positive - tie_tolerance) & is_rival).sum(axis=1)


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
    gains = _checked_gains(finite_matrix(relevance, "relevance"), scores.shape, [k])

    def one(row: Array, gain: Array) -> float:
        return _ndcg(k, relevant_positions(row, gain, tie_tolerance=tie_tolerance), gain[gain > 0])

    return np.array([one(*pair) for pair in zip(scores, gains, strict=True)], dtype=float)


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


def query_metrics(
    similarities: Numbers,
    relevance: Numbers,
    *,
    ks: Sequence[int] = KS,
    tie_tolerance: float = TIE_TOLERANCE,
) -> dict[str, float]:
    """Return all metrics at each k of one query with several, perhaps graded, positives.

    They are `hit, ndcg_linear, ndcg_exponential, precision, recall, f1, map, mrr` by the formulas
    of MMEB-V2's scorer (TIGER-AI-Lab/VLM2Vec), with ties against the model. `map@k` is divided by
    min(relevant candidates, k); the gain of `ndcg_exponential` is 2^rel - 1.

    >>> query_metrics([0.9, 0.2, 0.5], [0, 1, 1], ks=(2,))["hit@2"]
    1.0
    >>> round(query_metrics([0.9, 0.2, 0.5], [0, 1, 1], ks=(2,))["map@2"], 2)
    0.25
    >>> query_metrics([0.5, 0.5], [1, 0], ks=(1,))["hit@1"]
    0.0

    Args:
        similarities: (M,) to each candidate, higher is nearer.
        relevance: (M,) at least 0; above 0 = relevant.
        ks: Numbers of positions that count.
        tie_tolerance: Similarities this close are equal; 0 = exact comparison only.

    Raises:
        ValueError: For numbers that are not finite or negative, or no relevant candidate.
    """
    scores = finite_matrix(as_array(similarities)[None], "similarities")[0].astype(np.float64)
    relevant = finite_matrix(as_array(relevance)[None], "relevance")
    gains = _checked_gains(relevant, (1, len(scores)), ks)[0].astype(np.float64)
    positions = relevant_positions(scores, gains, tie_tolerance=tie_tolerance)
    order = np.argsort(positions)
    positions, found = positions[order], gains[gains > 0][order]
    metrics: dict[str, float] = {}
    for k in ks:
        metrics |= _at(k, positions, found)
    return metrics


def mean_metrics(rows: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of every metric over queries, in the order of the names.

    >>> mean_metrics([{"hit@1": 1.0}, {"hit@1": 0.0}])
    {'hit@1': 0.5}

    Raises:
        ValueError: If there is no query.
    """
    queries = list(rows)
    if not queries:
        raise ValueError("queries = 0; expected at least one; check the data")
    return {name: float(np.mean([row[name] for row in queries])) for name in queries[0]}


def _at(k: int, positions: Array, gains: Array) -> dict[str, float]:
    """Return metrics at k of relevant candidates with rising positions."""
    inside = positions <= k
    found, relevant = int(inside.sum()), len(positions)
    precision, recall = found / k, found / relevant
    hits = np.arange(1, found + 1) / positions[inside]
    return {
        f"hit@{k}": float(found > 0),
        f"ndcg_linear@{k}": _ndcg(k, positions, gains),
        f"ndcg_exponential@{k}": _ndcg(k, positions, 2.0**gains - 1.0),
        f"precision@{k}": precision,
        f"recall@{k}": recall,
        f"f1@{k}": 2 * precision * recall / (precision + recall) if found else 0.0,
        f"map@{k}": float(hits.sum()) / min(relevant, k),
        f"mrr@{k}": 1.0 / float(positions[0]) if found else 0.0,
    }


def _ndcg(k: int, positions: Array, gains: Array) -> float:
    discounts = np.where(positions <= k, 1.0 / np.log2(1.0 + positions), 0.0)
    best = np.sort(gains)[::-1][:k]
    return float(gains @ discounts / (best / np.log2(2.0 + np.arange(len(best)))).sum())


def _checked_gains(gains: Array, shape: tuple[int, ...], ks: Sequence[int]) -> Array:
    bad = np.flatnonzero((gains < 0).any(axis=1) | (gains.max(axis=1, initial=0.0) <= 0))
    if gains.shape != shape or len(bad):
        raise ValueError(
            f"relevance has shape {gains.shape} and unusable rows {bad[:5]}; "
            f"expected {shape}, no negative number and one positive number a row; "
            "leave queries without relevant candidates out"
        )
    if min(ks) < 1:
        raise ValueError(f"k = {min(ks)}; expected at least 1; raise it")
    return gains


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
