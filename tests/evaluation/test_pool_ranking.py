"""Ranks in pools against a plain count, one query at a time."""

import numpy as np
import pytest

from twn_rl.evaluation.pool_ranking import rank_in_pools
from twn_rl.evaluation.retrieval_pools import Candidates
from twn_rl.metrics.ranking import TIE_TOLERANCE

NUM_TARGETS, WIDTH = 40, 6


def made_pools(rng: np.random.Generator) -> Candidates:
    """Return two shared pools and one record's own, with candidates that do not count."""
    shuffled = rng.permutation(NUM_TARGETS).tolist()
    pools = [shuffled[:17], shuffled[17:36], shuffled[34:38]]
    owners = [0, 1, 0, 1, 0, 2, 1, 0]
    positive = [pools[owner][(5 * row) % len(pools[owner])] for row, owner in enumerate(owners)]
    barred = [
        frozenset({pools[owner][(3 * row + 1) % len(pools[owner])], 39}) - {own}
        for row, (owner, own) in enumerate(zip(owners, positive, strict=True))
    ]
    keys = [f"key{row}" for row in range(NUM_TARGETS)]
    return Candidates([], keys, positive, [pools[owner] for owner in owners], barred)


@pytest.mark.parametrize("block_similarities", [1, 40, 1 << 20])
@pytest.mark.parametrize("num_nearest", [1, 5, 100])
def test_ranks_and_nearest_are_those_of_a_plain_sort(
    block_similarities: int, num_nearest: int
) -> None:
    rng = np.random.default_rng(0)
    candidates = made_pools(rng)
    # Whole numbers: many ties, and products that are exact in any order of summation.
    targets = rng.integers(-1, 2, (NUM_TARGETS, WIDTH)).astype(np.float32)
    rows = [0, 0, 1, 3, 4, 5, 7, 2, 6, 6]
    embeds = rng.integers(-1, 2, (len(rows), WIDTH)).astype(np.float32)
    ranks, nearest = rank_in_pools(
        candidates,
        targets,
        rows,
        embeds,
        num_nearest=num_nearest,
        block_similarities=block_similarities,
    )
    for row, embed, rank, found in zip(rows, embeds, ranks, nearest, strict=True):
        columns = candidates.competing(row)
        own = candidates.positive[row]
        scores = {column: float(targets[column] @ embed) for column in columns}
        rivals = [c for c in columns if c != own and scores[c] >= scores[own] - TIE_TOLERANCE]
        assert rank == 1 + len(rivals)
        expected = sorted(columns, key=lambda c: (-scores[c], c == own))[:num_nearest]
        assert found == expected
        assert (own in found) == (rank <= num_nearest)


def test_a_vector_that_is_not_finite_is_never_ranked() -> None:
    candidates = made_pools(np.random.default_rng(0))
    targets = np.ones((NUM_TARGETS, WIDTH), np.float32)
    embeds = np.full((1, WIDTH), np.nan, np.float32)
    with pytest.raises(ValueError, match="non-finite"):
        rank_in_pools(candidates, targets, [0], embeds, num_nearest=5)
