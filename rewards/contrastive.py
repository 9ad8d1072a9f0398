"""Rewards that weigh negatives by a softmax over similarities."""

import math
from typing import Any


def info_nce(
    completions: list[Any],
    *,
    positive_similarity: list[float],
    negative_similarities: list[list[float]],
    temperature: float = 0.02,
    **kwargs: Any,
) -> list[float | None]:
    """Return the log-probability of the positive among itself and its hard negatives.

    `R = log(exp(s+ / t) / (exp(s+ / t) + sum_j exp(s-_j / t)))`: minus the InfoNCE loss (van den
    Oord et al., arXiv 1807.03748, eq. 4) with scaled cosines as scores, that is, the objective of
    the SFT stage seen as a reward. It differs from that loss in its negatives: the K hardest of the
    whole bank, not those of a batch. It saturates at 0 once the positive is safely first, so easy
    prompts stop pushing. t = `temperature`; 0.02 is what large backbones are trained with.

    Returns:
        One value in [-2 / temperature - log(1 + K), 0] per rollout. `None` for a rollout without
        negatives.

    Raises:
        ValueError: If `temperature` is not above 0.

    Example:
        >>> info_nce(["a", "b"], positive_similarity=[1.0, 0.0],
        ...          negative_similarities=[[0.0], [1.0]], temperature=0.01)
        [0.0, -100.0]
    """
    _require_temperature(temperature)
    rewards: list[float | None] = []
    for positive, negatives in zip(positive_similarity, negative_similarities, strict=True):
        # log-softmax of the positive = -log(1 + sum exp(difference)), shifted by the largest.
        differences = [0.0, *((negative - positive) / temperature for negative in negatives)]
        largest = max(differences)
        log_sum = largest + math.log(sum(math.exp(value - largest) for value in differences))
        rewards.append(0.0 - log_sum if negatives else None)
    return rewards


def softmax_margin(
    completions: list[Any],
    *,
    positive_similarity: list[float],
    negative_similarities: list[list[float]],
    temperature: float = 0.5,
    **kwargs: Any,
) -> list[float | None]:
    """Return the margin to the negatives, each weighted by how hard it is.

    `R = s+ - sum_j softmax_j(s-_j / t) * s-_j`, the margin of the outcome reward of Embed-RL (arXiv
    2602.13823) with its `temperature` t = 0.5. Deviations: one positive from the bank in place of
    the mean over G target rollouts, the K hardest negatives of the bank in place of the batch's,
    and the margin alone (that paper multiplies it by an accuracy; see `rank_gap` for a product). A
    low t approaches the single hardest negative, a high t the plain mean.

    Returns:
        One value in [-2, 2] per rollout. `None` for a rollout without negatives.

    Raises:
        ValueError: If `temperature` is not above 0.

    Example:
        >>> softmax_margin(["a"], positive_similarity=[0.75], negative_similarities=[[0.5, 0.5]])
        [0.25]
    """
    _require_temperature(temperature)
    rewards: list[float | None] = []
    for positive, negatives in zip(positive_similarity, negative_similarities, strict=True):
        if not negatives:
            rewards.append(None)
            continue
        hardest = max(negatives)
        weights = [math.exp((negative - hardest) / temperature) for negative in negatives]
        weighted_sum = sum(w * negative for w, negative in zip(weights, negatives, strict=True))
        rewards.append(positive - weighted_sum / sum(weights))
    return rewards


def _require_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(
            f"temperature = {temperature}, expected a number above 0. "
            "Set it to 0.02 (sharp, as in InfoNCE training) up to 1 (nearly a plain mean)."
        )
