"""All ranking metrics of one query with several, perhaps graded, positives. Knows no models.

The formulas are those of MMEB-V2's scorer (TIGER-AI-Lab/VLM2Vec), over positions in which ties
count against the model.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twn_rl.metrics.ranking import TIE_TOLERANCE, relevant_positions

KS = (1, 5, 10)


def query_metrics(
    similarities: ArrayLike,
    relevance: ArrayLike,
    *,
    ks: Sequence[int] = KS,
    tie_tolerance: float = TIE_TOLERANCE,
) -> dict[str, float]:
    """Return `hit, ndcg_linear, ndcg_exponential, precision, recall, f1, map, mrr` at each k.

    `map@k` is divided by min(relevant candidates, k); the gain of `ndcg_exponential` is 2^rel - 1.

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
    scores = np.asarray(similarities, dtype=np.float64)
    gains = np.asarray(relevance, dtype=np.float64)
    _check(scores, gains, ks)
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


def _at(k: int, positions: NDArray[np.int64], gains: NDArray[np.float64]) -> dict[str, float]:
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


def _ndcg(k: int, positions: NDArray[np.int64], gains: NDArray[np.float64]) -> float:
    discounts = np.where(positions <= k, 1.0 / np.log2(1.0 + positions), 0.0)
    best = np.sort(gains)[::-1][:k]
    return float(gains @ discounts / (best / np.log2(2.0 + np.arange(len(best)))).sum())


def _check(scores: NDArray[np.float64], gains: NDArray[np.float64], ks: Sequence[int]) -> None:
    is_fine = scores.ndim == 1 and scores.shape == gains.shape and len(scores) > 0
    if not is_fine or not np.isfinite(scores).all() or not np.isfinite(gains).all():
        raise ValueError(
            f"similarities {scores.shape} with {int((~np.isfinite(scores)).sum())} non-finite "
            f"numbers, relevance {gains.shape} with {int((~np.isfinite(gains)).sum())}; expected "
            "(M,) finite both; find the input that gives NaN or infinity, it is never ranked"
        )
    if (gains < 0).any() or not (gains > 0).any() or min(ks) < 1:
        raise ValueError(
            f"relevance reaches from {gains.min()} to {gains.max()}, ks = {tuple(ks)}; expected no "
            "negative number, one above 0 and every k at least 1; leave queries without relevant "
            "candidates out"
        )
