"""Query vectors against the target bank -> the columns that rewards read.

Targets are embedded once into a `TargetBank`; negatives of a query are then the whole bank, or the
query's pool of it, for the price of a matrix product.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twn_rl.runtime.processes import Processes, gather_objects, gather_rows
from twn_rl.training.bank_product import Asked, BankProduct
from twn_rl.training.bank_rows import BLOCK_ROWS, BankError, own_rows
from twn_rl.training.settings import limit_problems
from twn_rl.training.target_bank import TargetBank

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
    chunk_size: int = BLOCK_ROWS,
    temperature: float | None = None,
    processes: Processes | None = None,
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
        processes: Share the bank: every process calls this with its own queries, multiplies those
            of all with its own rows (`own_rows`), and merges. The result is that of one process
            with all queries, to the last bit but for `info_nce`. None multiplies with all rows.

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
    for problem in limit_problems(max_negative_similarity):
        raise BankError(f"{problem}; correct it, or leave it out")
    asked = what_is_asked(queries, positive_ids, bank, num_negatives, false_negative_ids, pools)
    is_shared = processes is not None and processes.num_processes > 1
    by_process = gather_objects(asked) if is_shared else [asked]
    counts = [len(part) for part in by_process]
    product = BankProduct(bank, num_negatives, chunk_size, temperature, max_negative_similarity)
    everyones = [each for part in by_process for each in part]
    standings = product.standings(
        gather_rows(queries, counts),
        everyones,
        own_rows(len(bank), processes if is_shared else None, chunk_size),
    )
    if is_shared:
        assert processes is not None
        standings = standings.merged(counts, processes.process_index)
    return standings.columns(temperature)


def what_is_asked(
    queries: Tensor,
    positive_ids: Sequence[str],
    bank: TargetBank,
    num_negatives: int,
    false_negative_ids: Sequence[Sequence[str]] | None = None,
    pools: Sequence[str] | None = None,
) -> list[Asked]:
    """Return what each of N queries is compared with; see `similarity_columns`.

    Raises:
        BankError: If the bank cannot answer that.
    """
    names = list(pools) if pools is not None else [None] * len(queries)
    false_negatives = list(false_negative_ids or [()] * len(queries))
    _check_queries(queries, positive_ids, names, false_negatives, bank, num_negatives)
    asked = [
        Asked(
            bank.row_of[positive],
            tuple(bank.row_of[i] for i in (positive, *ignored) if i in bank.row_of),
            name,
        )
        for positive, ignored, name in zip(positive_ids, false_negatives, names, strict=True)
    ]
    _check_pools(asked, positive_ids, bank)
    return asked


def _check_pools(asked: Sequence[Asked], positive_ids: Sequence[str], bank: TargetBank) -> None:
    """Refuse pools that are unknown or do not hold the positive."""
    for row, (each, positive_id) in enumerate(zip(asked, positive_ids, strict=True)):
        if each.pool is None:
            continue
        if each.pool not in bank.pools:
            raise BankError(
                f"pool = {each.pool!r} is not in the bank, expected one of "
                f"{sorted(bank.pools)[:10]}; name the pools when building the bank"
            )
        pool = bank.pools[each.pool]
        place = min(int(np.searchsorted(pool, each.positive)), len(pool) - 1)
        if pool[place] != each.positive:
            raise BankError(
                f"positive of row {row} = {positive_id} is not in pool {each.pool!r}, expected it "
                f"among the pool's {len(pool)} targets; correct pools"
            )


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
