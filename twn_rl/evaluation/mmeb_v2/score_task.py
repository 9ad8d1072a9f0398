"""Vectors of a task -> all its metrics; ties count against the model.

The official scorer sorts by `argsort(-cosine)`, which gives 100 % to a model whose vectors are all
the same, as the answer comes first; here such a model has 0, and a warning with figures.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.metrics.ranking import collapse_report, mean_metrics, query_metrics

_BLOCK_ROWS = 64
_SPREAD_ROWS = 1000
# Vectors this alike do not tell their inputs apart; healthy models stay below 0.9 and above 0.3.
MAX_MEAN_COSINE = 0.99
MIN_SCALED_STD = 0.05
_EQUAL_COSINE = 1.0 - 1e-6
_TOP = 10


@dataclass(frozen=True)
class TaskScores:
    """What a task's vectors are worth.

    Attributes:
        metrics: Means over queries, by the names of `graded_metrics`.
        queries: One row a query: `id`, `prediction` (the best targets), `label`, `rel_scores` and
            the task's main metric under its name.
        spread: `query` and `document`: how spread out the vectors are.
        warnings: Signs of collapse, with figures.
    """

    metrics: dict[str, float]
    queries: list[dict[str, Any]]
    spread: dict[str, dict[str, float]]
    warnings: list[str] = field(default_factory=list)


def score_task(
    data: TaskData, queries: NDArray[np.float32], targets: NDArray[np.float32], *, metric: str
) -> TaskScores:
    """Return the scores of a task.

    Args:
        data: Who is whose candidate.
        queries: (N, D) unit vectors.
        targets: (M, D) unit vectors.
        metric: The task's main metric.

    Raises:
        ValueError: For vectors that are not finite, or as many as queries and targets.
    """
    _check(queries, len(data.queries), "queries")
    _check(targets, len(data.targets.keys), "targets")
    rows, lines = [], []
    for number, numbers, similarities in _similarities(data, queries, targets):
        query = data.queries[number]
        gains = np.array([query.relevant.get(int(n), 0.0) for n in numbers])
        values = query_metrics(similarities, gains)
        rows.append(values)
        # Shown best first with the relevant ones after what they are tied with.
        best = numbers[np.lexsort((gains, -similarities))[:_TOP]]
        lines.append(
            {
                "id": query.id,
                "prediction": [data.targets.keys[n] for n in best],
                "label": [data.targets.keys[n] for n in query.relevant],
                "rel_scores": list(query.relevant.values()),
                metric: values[metric],
            }
        )
    spread = {"query": _spread(queries), "document": _spread(targets)}
    warnings = [_collapse(side, report) for side, report in spread.items() if report]
    return TaskScores(mean_metrics(rows), lines, spread, [w for w in warnings if w])


def _similarities(
    data: TaskData, queries: NDArray[np.float32], targets: NDArray[np.float32]
) -> Iterator[tuple[int, NDArray[np.int64], NDArray[np.float32]]]:
    """Yield the number of each query, those of its candidates, and its similarity to each."""
    everything = np.arange(len(targets))
    for start in range(0, len(queries), _BLOCK_ROWS):
        block = data.queries[start : start + _BLOCK_ROWS]
        if all(query.candidates is None for query in block):
            products = queries[start : start + _BLOCK_ROWS] @ targets.T
            for offset, similarities in enumerate(products):
                yield start + offset, everything, similarities
            continue
        for offset, query in enumerate(block):
            numbers = everything if query.candidates is None else query.candidates
            yield start + offset, numbers, targets[numbers] @ queries[start + offset]


def _spread(vectors: NDArray[np.float32]) -> dict[str, float]:
    """Return the collapse report of evenly chosen rows; nothing for a single one."""
    step = max(1, len(vectors) // _SPREAD_ROWS)
    return collapse_report(vectors[::step]) if len(vectors[::step]) > 1 else {}


def _collapse(side: str, report: Mapping[str, float]) -> str | None:
    """Return the sign of collapse that a report shows, None if there is none."""
    cosine, std = report["mean_pairwise_cosine"], report["scaled_std"]
    figures = (
        f"mean pairwise cosine {cosine:.6f}, scaled standard deviation {std:.4f}, effective rank "
        f"{report['effective_rank']:.2f}"
    )
    if cosine >= _EQUAL_COSINE:
        return f"all {side} vectors are equal ({figures}): the score says nothing of the model"
    if cosine > MAX_MEAN_COSINE or std < MIN_SCALED_STD:
        return f"the {side} vectors have nearly collapsed ({figures})"
    return None


def _check(vectors: NDArray[np.float32], count: int, name: str) -> None:
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=-1))
    if vectors.ndim != 2 or len(vectors) != count or len(bad):
        raise ValueError(
            f"{name} has shape {vectors.shape} with non-finite rows {bad[:5].tolist()}; expected "
            f"({count}, D) finite vectors; find the input that gives NaN, it is never ranked"
        )
