"""Rewards that are plain differences of similarities, one of them weighed by the rank."""

from typing import Any

from twn_rl.metrics.negatives import margin as margin_over
from twn_rl.metrics.negatives import margin_gains


def margin(
    completions: list[Any],
    *,
    positive_similarity: list[float],
    negative_similarities: list[list[float]],
    num_negatives: int = 8,
    **kwargs: Any,
) -> list[float | None]:
    """Return how much closer the think vector is to its positive than to its hardest negatives.

    `R = s+ - mean(s-_1, ..., s-_K)` over the K = `num_negatives` hardest negatives, or all of a
    shorter list. This is the gap of UME-R1 (arXiv 2511.00405, the "gap" factor of its embedding
    reward) with one difference: that paper averages over all negatives of the batch, we average
    over the K hardest of the whole target bank, because the easy ones only add a constant.

    Returns:
        One value in [-2, 2] per rollout; above 0 the positive beats the average hard negative.
        `None` for a rollout without negatives.

    Raises:
        ValueError: If `num_negatives` is below 1.

    Example:
        >>> margin(["a", "b"], positive_similarity=[0.75, 0.5], num_negatives=2,
        ...        negative_similarities=[[0.5, 0.25, -1.0], []])
        [0.375, None]
    """
    _require_negatives(num_negatives)
    rows = zip(positive_similarity, negative_similarities, strict=True)
    return [margin_over(positive, negatives, num_negatives) for positive, negatives in rows]


def think_gain(
    completions: list[Any],
    *,
    positive_similarity: list[float],
    negative_similarities: list[list[float]],
    no_think_positive_similarity: list[float],
    no_think_negative_similarities: list[list[float]],
    num_negatives: int = 8,
    **kwargs: Any,
) -> list[float | None]:
    """Return how much the CoT widened the margin over embedding the same query without any CoT.

    `R = margin(think) - margin(no think)`, each over its own `num_negatives` hardest. It is the
    utility gap of MMEmb-R1 (arXiv 2604.06156: `delta = s^r - s^d`) taken on margins instead of on
    the positive similarity alone, because a CoT can raise the positive and a hard negative together
    (SURE, arXiv 2609.29560). Within one group of rollouts it differs from `margin` by a constant,
    so group-normalised advantages are the same; it is what to use where values of different prompts
    are compared (no group normalisation, thresholds, plots).

    Returns:
        One value in [-4, 4] per rollout; above 0 thinking helped. Exactly 0 for an incomplete
        think, whose columns are the no-think ones. `None` where either side has no negatives.

    Raises:
        ValueError: If `num_negatives` is below 1.

    Example:
        >>> think_gain(["a"], positive_similarity=[0.75], negative_similarities=[[0.25]],
        ...            no_think_positive_similarity=[0.5], no_think_negative_similarities=[[0.5]])
        [0.5]
    """
    _require_negatives(num_negatives)
    return margin_gains(
        positive_similarity,
        negative_similarities,
        no_think_positive_similarity,
        no_think_negative_similarities,
        num_negatives=num_negatives,
    )


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
      target_rank) / top_k`; 1 for a first place, falling in equal steps to 0 below place `top_k`
      (the paper's G = 8);
    - `gap` is `s+` minus the mean over the hardest negatives of the whole bank, and can therefore
      be negative. A negative gap is not multiplied: the product would pay a rollout for a *worse*
      rank. So `R = rank * max(gap, 0) + min(gap, 0)`.

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
        gap = margin_over(positive, negatives)
        if gap is None:
            rewards.append(None)
            continue
        rank_term = max(0, top_k + 1 - rank) / top_k
        rewards.append(rank_term * max(gap, 0.0) + min(gap, 0.0))
    return rewards


def _require_negatives(num_negatives: int) -> None:
    if num_negatives < 1:
        raise ValueError(
            f"num_negatives = {num_negatives}, expected at least 1: a margin needs a negative. "
            "Set it to the number of hard negatives to average, for example 8."
        )
