"""Queries times a bank, block by block and process by process; knows no records and no rewards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twn_rl.metrics.ranking import TIE_TOLERANCE
from twn_rl.runtime.processes import gather_rows
from twn_rl.training.target_bank import TargetBank


class Asked(NamedTuple):
    """What one query is compared with: bank rows, and the pool whose name it gave."""

    positive: int
    ignored: tuple[int, ...]  # the positive, too
    pool: str | None


@dataclass
class Standings:
    """How N queries stand among the targets that were multiplied so far.

    Attributes:
        positive: (N,) similarity to the positive.
        hardest: (N, K) highest similarities of others, -inf where there are fewer.
        rivals: (N,) int64 how many others reach the positive.
        log_sum: (N,) log of the sum of exp(similarity / temperature) of others.
    """

    positive: Tensor
    hardest: Tensor
    rivals: Tensor
    log_sum: Tensor

    def merged(self, counts: Sequence[int], process_index: int) -> Standings:
        """Return this process's queries among the targets of all processes; all must call this."""
        parts = self.hardest, self.log_sum[:, None], self.rivals[:, None]
        packed = torch.cat([part.double() for part in parts], dim=1)  # counts stay exact
        total = len(packed)
        everyone = gather_rows(packed, [total] * len(counts)).view(len(counts), total, -1)
        start = sum(counts[:process_index])
        own = everyone[:, start : start + counts[process_index]]  # (processes, n, K + 2)
        num_negatives = self.hardest.shape[1]
        candidates = own[:, :, :num_negatives].float().transpose(0, 1).flatten(1)
        return Standings(
            self.positive[start : start + counts[process_index]],
            candidates.topk(num_negatives, dim=1).values,
            own[:, :, -1].sum(0).long(),
            own[:, :, -2].float().logsumexp(0),
        )

    def columns(self, temperature: float | None) -> dict[str, list[Any]]:
        """Return the columns, one value per query."""
        columns: dict[str, list[Any]] = {
            "positive_similarity": self.positive.tolist(),
            "negative_similarities": [
                [value for value in row if value != -torch.inf] for row in self.hardest.tolist()
            ],
            "target_rank": (1 + self.rivals).tolist(),
        }
        if temperature is not None:
            # -log(e^p / (e^p + sum)) without the cancellation of log(e^p + sum) - p.
            gap = self.log_sum - self.positive / temperature
            columns["info_nce"] = F.softplus(gap).tolist()
        return columns


@dataclass
class BankProduct:
    """Multiplies queries with a bank, block by block, in float32 whatever the bank's type.

    A product in bfloat16 would round similarities to steps of 0.004, and ranks would be ties.
    """

    bank: TargetBank
    num_negatives: int
    block_rows: int
    temperature: float | None
    max_negative_similarity: float | None
    pools: Mapping[str, np.ndarray] | None = None  # None: the bank's own

    def nearest(self, queries: Tensor, asked: Sequence[Asked], own: range) -> tuple[Tensor, Tensor]:
        """Return similarities and rows (N, K) of the targets nearest to queries (N, D) in `own`.

        Nothing is left out but other pools; -inf and -1 where a pool has fewer.
        """
        count, device = self.num_negatives, queries.device
        values = queries.new_full((len(queries), count), -torch.inf)
        rows = torch.full((len(queries), count), -1, dtype=torch.int64, device=device)
        for members, pool in self._by_pool(asked):
            for numbers, targets in self._blocks(pool, own, device):
                best = (queries[members] @ targets.T).topk(min(count, len(numbers)), dim=1)
                found = torch.from_numpy(numbers).to(device)[best.indices]
                both = torch.cat([values[members], best.values], dim=1)
                kept = both.topk(count, dim=1)
                values[members] = kept.values
                rows[members] = torch.cat([rows[members], found], dim=1).gather(1, kept.indices)
        return values, rows

    def _by_pool(self, asked: Sequence[Asked]) -> Iterator[tuple[list[int], np.ndarray | None]]:
        """Yield the positions of the queries that share a pool, and its rows; None is the bank."""
        pools = self.bank.pools if self.pools is None else self.pools
        members: dict[str | None, list[int]] = {}
        for row, each in enumerate(asked):
            members.setdefault(each.pool, []).append(row)
        for name, rows in members.items():
            yield rows, None if name is None else pools[name]

    def standings(self, queries: Tensor, asked: Sequence[Asked], own: range) -> Standings:
        """Return how queries (N, D) stand among the rows `own` of the bank."""
        count, device = len(queries), queries.device
        positives = np.array([each.positive for each in asked], dtype=np.int64)
        found = Standings(
            queries.new_empty(count),
            queries.new_full((count, self.num_negatives), -torch.inf),
            torch.zeros(count, dtype=torch.int64, device=device),
            queries.new_full((count,), -torch.inf),
        )
        for members, pool in self._by_pool(asked):
            embeds = self.bank.rows(positives[members], device)
            found.positive[members] = (queries[members] * embeds).sum(dim=1)
            self._compare(queries, asked, members, (embeds, positives[members]), pool, own, found)
        return found

    def _compare(
        self,
        queries: Tensor,
        asked: Sequence[Asked],
        members: list[int],
        positives: tuple[Tensor, np.ndarray],
        pool: np.ndarray | None,
        own: range,
        found: Standings,
    ) -> None:
        """Add what the queries `members`, which share one pool, find among its rows in `own`."""
        device, chosen = queries.device, queries[members]
        # Rollouts of one query share their positive: it meets the bank once.
        _, first, place = np.unique(positives[1], return_index=True, return_inverse=True)
        anchors = positives[0][torch.from_numpy(first).to(device)]
        anchor_of = torch.from_numpy(place).to(device)
        owner = np.repeat(np.arange(len(members)), [len(asked[m].ignored) for m in members])
        ignored = np.array([row for m in members for row in asked[m].ignored], dtype=np.int64)
        least = found.positive[members][:, None] - TIE_TOLERANCE
        hardest, rivals = found.hardest[members], found.rivals[members]
        log_sum = found.log_sum[members]
        for rows, targets in self._blocks(pool, own, device):
            similarities = chosen @ targets.T  # (n, block)
            if self.max_negative_similarity is not None:
                is_unlabelled = anchors @ targets.T >= self.max_negative_similarity
                similarities.masked_fill_(is_unlabelled[anchor_of], -torch.inf)
            column = np.searchsorted(rows, ignored)
            is_here = rows[np.minimum(column, len(rows) - 1)] == ignored
            if is_here.any():
                place_in = (torch.from_numpy(each[is_here]).to(device) for each in (owner, column))
                similarities[tuple(place_in)] = -torch.inf
            rivals += (similarities >= least).sum(dim=1)
            if self.temperature is not None:
                log_sum = log_sum.logaddexp((similarities / self.temperature).logsumexp(dim=1))
            best = similarities.topk(min(self.num_negatives, len(rows)), dim=1).values
            hardest = torch.cat([hardest, best], dim=1).topk(self.num_negatives, dim=1).values
        found.hardest[members], found.rivals[members] = hardest, rivals
        found.log_sum[members] = log_sum

    def _blocks(
        self, pool: np.ndarray | None, own: range, device: torch.device
    ) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Yield the pool's sorted rows in each of our blocks, and their vectors."""
        for start in range(own.start, own.stop, self.block_rows):
            block = range(start, min(start + self.block_rows, own.stop))
            if pool is None:
                yield np.arange(block.start, block.stop), self.bank.block(block, device)
                continue
            first, last = np.searchsorted(pool, [block.start, block.stop])
            rows = pool[first:last]
            if not len(rows):
                continue
            if rows[-1] - rows[0] + 1 == len(rows):
                yield rows, self.bank.block(range(int(rows[0]), int(rows[-1]) + 1), device)
            else:
                yield rows, self.bank.rows(rows, device)
