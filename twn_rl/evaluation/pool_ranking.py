"""Ranks of positives in the pools of their candidates: one matrix product a block of queries."""

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from twn_rl.evaluation.retrieval_pools import Candidates
from twn_rl.metrics.arrays import Array
from twn_rl.metrics.ranking import TIE_TOLERANCE, positive_ranks
from twn_rl.runtime.sharded_pass import shard_ranges

BLOCK_SIMILARITIES = 1 << 24  # 64 MiB of float32 at a time, however many candidates there are


def rank_in_pools(
    candidates: Candidates,
    targets: Array,
    rows: Sequence[int],
    embeds: Array,
    *,
    num_nearest: int,
    block_similarities: int = BLOCK_SIMILARITIES,
) -> tuple[NDArray[np.int64], list[list[int]]]:
    """Return the rank (n,) of each vector's positive in its pool, and the nearest candidates.

    Ties count against the model, see `positive_ranks`; among the nearest the positive comes behind
    its equals, so that the list agrees with the rank.

    Args:
        candidates: What competes for each record.
        targets: (M, D) vectors of all candidates.
        rows: The record of each vector; a record may have several vectors, or none.
        embeds: (n, D) vectors of queries.
        num_nearest: How many candidates to name at most.
        block_similarities: Similarities held at a time; at least one query's are.

    Raises:
        ValueError: For similarities that are not finite.
    """
    ranks, nearest = np.zeros(len(rows), np.int64), [list[int]() for _ in rows]
    for pool, positions in _by_pool(candidates, rows):
        column_of = {row: column for column, row in enumerate(pool)}
        pool_targets = targets[np.array(pool)]
        for part in shard_ranges(len(positions), max(1, block_similarities // len(pool))):
            block = [positions[place] for place in part]
            similarities = embeds[np.array(block)] @ pool_targets.T
            owners = [rows[position] for position in block]
            positive = np.array([column_of[candidates.positive[row]] for row in owners])
            barred = np.zeros(similarities.shape, bool)
            for line, row in enumerate(owners):
                columns = [column_of[other] for other in candidates.barred[row] & column_of.keys()]
                barred[line, columns] = True
            ranks[block] = positive_ranks(similarities, positive, mask=barred)
            similarities[np.arange(len(block)), positive] -= TIE_TOLERANCE
            similarities[barred] = -np.inf
            for position, columns in zip(
                block, _nearest(similarities, positive, num_nearest), strict=True
            ):
                nearest[position] = [pool[column] for column in columns]
    return ranks, nearest


def _by_pool(candidates: Candidates, rows: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Yield each pool with the positions of the vectors that are ranked in it."""
    positions: dict[int, list[int]] = {}
    for position, row in enumerate(rows):
        positions.setdefault(id(candidates.pools[row]), []).append(position)
    for own in positions.values():
        yield candidates.pools[rows[own[0]]], own


def _nearest(similarities: Array, positive: Array, count: int) -> Iterator[list[int]]:
    """Yield the columns of the highest similarities of each row, the first of equals first."""
    count = min(count, similarities.shape[1])
    least = np.partition(similarities, -count, axis=1)[:, -count]
    for row, own, last in zip(similarities, positive, least, strict=True):
        columns = np.flatnonzero((row >= last) & np.isfinite(row))
        order = np.lexsort((columns == own, -row[columns]))[:count]
        yield columns[order].tolist()
