"""Rewards that are plain differences of similarities; knows no temperature, rank or token count."""

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

    `R = s+ - mean(s-_1, ..., s-_K)` over the K hardest negatives. This is the gap of UME-R1 (arXiv
    2511.00405, the "gap" factor of its embedding reward) with one difference: that paper averages
    over all negatives of the batch, we average over the K hardest of the whole target bank, because
    the easy ones only add a constant.

    Args:
        completions: One completion per rollout; only their number matters here.
        positive_similarity: Cosine to the positive, in [-1, 1]. For an incomplete think, that of
            the no-think vector.
        negative_similarities: Cosines to the hardest negatives, per rollout, in any order.
        num_negatives: K, how many of the hardest negatives to average; a shorter list is used
            whole.
        **kwargs: Other columns, ignored.

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

    `R = margin(think) - margin(no think)`, each over its own K hardest negatives. It is the utility
    gap of MMEmb-R1 (arXiv 2604.06156: `delta = s^r - s^d`) taken on margins instead of on the
    positive similarity alone, because a CoT can raise the positive and a hard negative together
    (SURE, arXiv 2609.29560). Within one group of rollouts it differs from `margin` by a constant,
    so group-normalised advantages are the same; it is what to use where values of different prompts
    are compared (no group normalisation, thresholds, plots).

    Args:
        completions: One completion per rollout; only their number matters here.
        positive_similarity: Cosine of the think vector to the positive, in [-1, 1].
        negative_similarities: Cosines of the think vector to its hardest negatives.
        no_think_positive_similarity: Cosine of the no-think vector to the positive, in [-1, 1].
        no_think_negative_similarities: Cosines of the no-think vector to its hardest negatives.
        num_negatives: K, how many of the hardest negatives to average; a shorter list is used
            whole.
        **kwargs: Other columns, ignored.

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


def _require_negatives(num_negatives: int) -> None:
    if num_negatives < 1:
        raise ValueError(
            f"num_negatives = {num_negatives}, expected at least 1: a margin needs a negative. "
            "Set it to the number of hard negatives to average, for example 8."
        )
