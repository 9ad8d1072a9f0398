"""Rewards that look at the rank of the positive; knows no temperature or token count."""

from typing import Any

from twn_rl.metrics.negatives import margin


def rank_gap(
    completions: list[Any],
    *,
    positive_similarity: list[float],
    negative_similarities: list[list[float]],
    target_rank: list[int],
    top_k: int = 8,
    **kwargs: Any,
) -> list[float | None]:
    """Return a rank term times the similarity gap: being clearly first pays most.

    UME-R1's embedding reward (arXiv 2511.00405, `R_emb = rank * gap`): with G rollouts of the
    target, its `rank` is the share of them among the top G of all targets, its `gap` the mean
    positive minus the mean negative similarity.

    Deviations, because our targets are embedded once into a bank and are not rolled out:

    - one target in place of G, so `rank` is the mean of hit@1, ..., hit@top_k: `max(0, top_k + 1 -
      target_rank) / top_k`; 1 for a first place, falling in equal steps to 0 below place `top_k`;
    - `gap` is `s+` minus the mean over the hardest negatives of the whole bank, and can therefore
      be negative. A negative gap is not multiplied: the product would pay a rollout for a *worse*
      rank. So `R = rank * max(gap, 0) + min(gap, 0)`.

    Args:
        completions: One completion per rollout; only their number matters here.
        positive_similarity: Cosine to the positive, in [-1, 1]. For an incomplete think, that of
            the no-think vector.
        negative_similarities: Cosines to the hardest negatives, per rollout.
        target_rank: Rank of the positive in its pool, 1 is best, ties against it.
        top_k: Places that earn a rank term; the paper's G = 8.
        **kwargs: Other columns, ignored.

    Returns:
        One value in [-2, 2] per rollout. `None` for a rollout without negatives.

    Raises:
        ValueError: If `top_k` is below 1.

    Example:
        >>> rank_gap(["a", "b"], positive_similarity=[0.75, 0.75],
        ...          negative_similarities=[[0.25], [0.25]], target_rank=[1, 5])
        [0.5, 0.25]
    """
    if top_k < 1:
        raise ValueError(
            f"top_k = {top_k}, expected at least 1: no place would earn a reward. "
            "Set it to the number of places that count, for example 8."
        )
    rewards: list[float | None] = []
    for positive, negatives, rank in zip(
        positive_similarity, negative_similarities, target_rank, strict=True
    ):
        gap = margin(positive, negatives)
        if gap is None:
            rewards.append(None)
            continue
        rank_term = max(0, top_k + 1 - rank) / top_k
        rewards.append(rank_term * max(gap, 0.0) + min(gap, 0.0))
    return rewards
