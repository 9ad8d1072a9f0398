"""Banks too large to compare every rollout with: candidates of a query, found once, then exact.

A thought moves its query between where it stood without one and its positive, so the targets that
are nearest to both are the ones that become its hardest negatives. How often that is not so is
audited against the whole bank.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twn_rl.metrics.negatives import margin
from twn_rl.runtime.processes import Processes, gather_objects, gather_rows
from twn_rl.training.bank_product import Asked, BankProduct
from twn_rl.training.bank_rows import BLOCK_ROWS, own_rows
from twn_rl.training.target_bank import TargetBank

# Products of other shapes round differently; rewards that differ by less do not.
_SAME = 1e-5


class CandidatePools:
    """The candidates of each query that was met; every process finds those of its own.

    Attributes:
        rows: Query's number -> its candidates' rows, sorted, its positive among them.
    """

    def __init__(
        self, bank: TargetBank, num_candidates: int, processes: Processes | None = None
    ) -> None:
        """Find `num_candidates` nearest to each query, and as many to its positive.

        Args:
            bank: An open bank.
            num_candidates: Targets of either kind.
            processes: Who shares the bank; all must then call `find` together.
        """
        self.bank, self.processes = bank, processes
        self.num_candidates = min(num_candidates, len(bank))
        self.rows: dict[int, np.ndarray] = {}

    def find(self, numbers: Sequence[int], queries: Tensor, asked: Sequence[Asked]) -> None:
        """Find the candidates of queries that are met for the first time.

        Args:
            numbers: Names the queries; those that are known are passed over.
            queries: (B, D) their vectors without a thought.
            asked: Positive and pool of each.
        """
        new = [row for row, number in enumerate(numbers) if number not in self.rows]
        wanted = [asked[row] for row in new]
        positives = np.array([each.positive for each in wanted], dtype=np.int64)
        anchors = self.bank.rows(positives, queries.device).reshape(len(new), queries.shape[1])
        both = torch.stack([queries[new].float(), anchors], dim=1).flatten(0, 1)  # (2 B, D)
        found = self._nearest(both, [each for each in wanted for _ in range(2)])
        for place, row in enumerate(new):
            pair = found[2 * place : 2 * place + 2].flatten().cpu().numpy()
            rows = np.union1d(pair[pair >= 0], positives[place : place + 1])
            self.rows[numbers[row]] = rows

    def _nearest(self, queries: Tensor, asked: list[Asked]) -> Tensor:
        """Return (N, C) rows of the nearest targets in each query's pool, -1 where it has fewer."""
        count = self.num_candidates
        product = BankProduct(self.bank, count, BLOCK_ROWS, None, None)
        if self.processes is None or self.processes.num_processes == 1:
            return product.nearest(queries, asked, range(len(self.bank)))[1]
        by_process = gather_objects(asked)
        counts = [len(part) for part in by_process]
        everyone = gather_rows(queries, counts)
        flat = [each for part in by_process for each in part]
        values, rows = product.nearest(everyone, flat, own_rows(len(self.bank), self.processes))
        packed = torch.cat([values.double(), rows.double()], dim=1)  # rows stay exact
        parts = gather_rows(packed, [len(flat)] * len(counts)).view(len(counts), len(flat), -1)
        start = sum(counts[: self.processes.process_index])
        own = parts[:, start : start + len(asked)].transpose(0, 1)  # (n, processes, 2 C)
        best = own[..., :count].flatten(1).topk(count, dim=1).indices
        return own[..., count:].flatten(1).gather(1, best).long()

    def columns(
        self,
        numbers: Sequence[int],
        vectors: Tensor,
        asked: Sequence[Asked],
        num_negatives: int,
        max_negative_similarity: float | None,
    ) -> dict[str, list[Any]]:
        """Return the similarity columns of N vectors among their query's candidates.

        Args:
            numbers: The query of each vector; `find` must have seen it.
            vectors: (N, D).
            asked: What each is compared with; the pool's name is not looked at again.
            num_negatives: K hardest negatives.
            max_negative_similarity: See `similarity_columns`.
        """
        pools = {str(number): self.rows[number] for number in numbers}
        product = BankProduct(
            self.bank, num_negatives, len(self.bank), None, max_negative_similarity, pools
        )
        inside = [
            each._replace(pool=str(number)) for each, number in zip(asked, numbers, strict=True)
        ]
        return product.standings(vectors, inside, range(len(self.bank))).columns(None)


def audit(found: dict[str, list[Any]], whole: dict[str, list[Any]]) -> dict[str, list[bool]]:
    """Return for each vector whether candidates give it another margin, or rank, than the bank.

    Among candidates a rank can only be too low: the default reward does not look at it.

    >>> whole = {"positive_similarity": [0.5], "negative_similarities": [[0.4]], "target_rank": [1]}
    >>> audit({**whole, "negative_similarities": [[0.3]]}, whole)
    {'is_other_margin': [True], 'is_other_rank': [False]}
    """
    margins = [
        map(margin, columns["positive_similarity"], columns["negative_similarities"])
        for columns in (found, whole)
    ]
    return {
        "is_other_margin": [
            a != b if a is None or b is None else abs(a - b) > _SAME
            for a, b in zip(*margins, strict=True)
        ],
        "is_other_rank": [
            a != b for a, b in zip(found["target_rank"], whole["target_rank"], strict=True)
        ],
    }
