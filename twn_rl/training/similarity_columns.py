"""Query vectors against the target bank -> the columns that rewards read.

Targets are embedded once into a `TargetBank`; negatives of a query are then the whole bank, or the
query's pool of it, for the price of a matrix product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from twn_rl.metrics.ranking import TIE_TOLERANCE
from twn_rl.training.settings import limit_problems
from twn_rl.training.target_bank import BankError, TargetBank

SCORING_COLUMNS = (
    "positive_similarity",
    "negative_similarities",
    "no_think_positive_similarity",
    "no_think_negative_similarities",
    "target_rank",
    "think_tokens",
    "is_direct",
    "is_think_complete",
)


@torch.no_grad()
def similarity_columns(
    query_embeds: Tensor,
    positive_ids: Sequence[str],
    bank: TargetBank,
    *,
    num_negatives: int = 16,
    false_negative_ids: Sequence[Sequence[str]] | None = None,
    max_negative_similarity: float | None = None,
    pools: Sequence[str] | None = None,
    chunk_size: int = 16_384,
    temperature: float | None = None,
) -> dict[str, list[Any]]:
    """Return the similarity columns of N queries against the whole bank, one value per query.

    Args:
        query_embeds: (N, D) unit vectors on any device, local to this process; detached here.
        positive_ids: Id of each query's positive.
        bank: An open bank. Equal targets share one row there, so a duplicate of the positive can
            never be a negative.
        num_negatives: K, how many of the hardest negatives to return.
        false_negative_ids: Per query, ids that are neither negatives nor rivals, see
            `metrics.negatives`. Ids outside the bank are ignored.
        max_negative_similarity: Cosine to the positive target from which on a bank target is taken
            for an unlabelled positive: neither negative nor rival; in (-1, 1], None = off. Against
            the positive target's own vector, where Qwen3-Embedding (arXiv 2506.05176, eq. 2)
            compares with the query: what is left out must not depend on the rollout, or a CoT could
            hide hard negatives by moving away from its positive.
        pools: Per query, the pool whose targets it competes with; `None` means the whole bank.
        chunk_size: Bank rows per matrix product; bounds memory, does not change the result.
        temperature: If given, also return the loss `info_nce`; similarities are divided by it.

    Returns:
        `positive_similarity` (float in [-1, 1]), `negative_similarities` (at most K floats, hardest
        first; fewer in a small pool) and `target_rank` (int, 1 is best: 1 + number of rivals
        whose similarity reaches the positive's; ties count against it). With a temperature also
        `info_nce`, query -> target against all rivals, in nats (1807.03748, eq. 4).

    Raises:
        BankError: If a positive is not in the bank or not in the query's pool, the widths differ,
            lists have other lengths than N, or a query vector is not finite.
    """
    queries = query_embeds.detach().float()
    num_queries = len(queries)
    names = list(pools) if pools is not None else [None] * num_queries
    false_negatives = list(false_negative_ids or [()] * num_queries)
    _check_queries(queries, positive_ids, names, false_negatives, bank, num_negatives)
    for problem in limit_problems(max_negative_similarity):
        raise BankError(f"{problem}; correct it, or leave it out")
    kept = ["positive_similarity", "negative_similarities", "target_rank"]
    kept += [] if temperature is None else ["info_nce"]
    columns: dict[str, list[Any]] = {name: [None] * num_queries for name in kept}
    for name in dict.fromkeys(names):
        members = [row for row in range(num_queries) if names[row] == name]
        if name is not None and name not in bank.pools:
            raise BankError(
                f"pool = {name!r} is not in the bank, expected one of {sorted(bank.pools)[:10]}; "
                "name the pools when building the bank"
            )
        pool = np.arange(len(bank)) if name is None else bank.pools[name]
        positives = np.array([bank.row_of[positive_ids[row]] for row in members])
        outside = [row for row, ok in zip(members, np.isin(positives, pool), strict=True) if not ok]
        if outside:
            raise BankError(
                f"positive of row {outside[0]} = {positive_ids[outside[0]]} is not in pool "
                f"{name!r}, expected it among the pool's {len(pool)} targets; correct pools"
            )
        ignored = [
            [bank.row_of[i] for i in (positive_ids[row], *false_negatives[row]) if i in bank.row_of]
            for row in members
        ]
        scored = _score_pool(
            queries[members],
            positives,
            ignored,
            pool,
            bank,
            num_negatives,
            chunk_size,
            temperature,
            max_negative_similarity,
        )
        for column in kept:
            for row, value in zip(members, scored[column], strict=True):
                columns[column][row] = value
    return columns


def _score_pool(
    queries: Tensor,
    positives: np.ndarray,
    ignored: list[list[int]],
    pool: np.ndarray,
    bank: TargetBank,
    num_negatives: int,
    chunk_size: int,
    temperature: float | None,
    max_negative_similarity: float | None,
) -> dict[str, list[Any]]:
    """Score n queries that share one pool; `ignored` holds bank rows that are no rivals."""
    device = queries.device
    positive_embeds = bank.rows(positives, device)
    positive = (queries * positive_embeds).sum(dim=1)  # (n,)
    # Rollouts of one query share their positive: it meets the bank once.
    _, first, place = np.unique(positives, return_index=True, return_inverse=True)
    anchors, anchor_of = positive_embeds[torch.from_numpy(first)], torch.from_numpy(place)
    owner = np.repeat(np.arange(len(ignored)), [len(rows) for rows in ignored])
    ignored_rows = np.concatenate([np.array(rows, dtype=np.int64) for rows in ignored])
    hardest = queries.new_empty((len(queries), 0))
    rivals = torch.zeros(len(queries), dtype=torch.int64, device=device)
    log_sum = torch.full_like(positive, -torch.inf)  # of exp(similarity / temperature) of rivals
    for start in range(0, len(pool), chunk_size):
        rows = pool[start : start + chunk_size]
        targets = bank.rows(rows, device)
        similarities = queries @ targets.T  # (n, chunk)
        if max_negative_similarity is not None:
            is_unlabelled = anchors @ targets.T >= max_negative_similarity  # (distinct, chunk)
            similarities.masked_fill_(is_unlabelled[anchor_of], -torch.inf)
        column = np.searchsorted(rows, ignored_rows)
        is_here = rows[np.minimum(column, len(rows) - 1)] == ignored_rows
        similarities[owner[is_here], column[is_here]] = -torch.inf
        rivals += (similarities >= positive[:, None] - TIE_TOLERANCE).sum(dim=1)
        if temperature is not None:
            log_sum = log_sum.logaddexp((similarities / temperature).logsumexp(dim=1))
        merged = torch.cat([hardest, similarities], dim=1)
        hardest = merged.topk(min(num_negatives, merged.shape[1]), dim=1).values
    negatives = [[value for value in row if value != -torch.inf] for row in hardest.tolist()]
    scored: dict[str, list[Any]] = {
        "positive_similarity": positive.tolist(),
        "negative_similarities": negatives,
        "target_rank": (1 + rivals).tolist(),
    }
    if temperature is not None:
        # -log(e^p / (e^p + sum)) without the cancellation of log(e^p + sum) - p.
        scored["info_nce"] = F.softplus(log_sum - positive / temperature).tolist()
    return scored


def _check_queries(
    queries: Tensor,
    positive_ids: Sequence[str],
    names: Sequence[str | None],
    false_negatives: Sequence[Sequence[str]],
    bank: TargetBank,
    num_negatives: int,
) -> None:
    width = bank.embeddings.shape[1]
    lengths = [len(positive_ids), len(names), len(false_negatives)]
    if queries.ndim != 2 or queries.shape[1] != width or lengths != [len(queries)] * 3:
        raise BankError(
            f"query_embeds has shape {tuple(queries.shape)}; positive_ids, pools and "
            f"false_negative_ids have lengths {lengths}; expected (N, {width}) and N each; pass "
            "one entry per query, and vectors of the bank's scorer"
        )
    if num_negatives < 1:
        raise BankError(f"num_negatives = {num_negatives}, expected at least 1; raise it")
    bad = torch.nonzero(~torch.isfinite(queries).all(dim=1)).flatten().tolist()
    if bad:
        raise BankError(
            f"query_embeds rows {bad[:5]} hold NaN or infinity, expected finite numbers; check "
            "the scorer's precision and the padding of these rows"
        )
    unknown = [row for row, target_id in enumerate(positive_ids) if target_id not in bank.row_of]
    if unknown:
        raise BankError(
            f"positive of row {unknown[0]} = {positive_ids[unknown[0]]} is not in the bank "
            f"({len(unknown)} such rows), expected its content key among {len(bank)} targets; "
            "build the bank from the records that are trained on"
        )
