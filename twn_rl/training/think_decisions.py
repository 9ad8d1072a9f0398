"""The arithmetic of learning when to think: mixed groups, gaps, gradients. Knows no models.

MMEmb-R1 (arXiv 2604.06156) is known from summaries only: how groups are mixed, tapered and primed
is our choice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from twn_rl.metrics.negatives import margin

# What `pinned_modes` asks of a rollout.
KEEP, DIRECT, THINK = 0, 1, 2


def pinned_modes(is_direct: Tensor, num_generations: int, count: int) -> Tensor:
    """Return which rollouts must change their mode so that every group holds both.

    Rollouts of a group are exchangeable, so it is the last ones that change.

    Args:
        is_direct: (B * G,) bool, of all processes.
        num_generations: G.
        count: Rollouts to change in a group of one mode.

    Returns:
        (B * G,) of `KEEP`, `DIRECT` or `THINK`.

    >>> pinned_modes(torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 0]).bool(), 3, 1).tolist()
    [0, 0, 1, 0, 0, 2, 0, 0, 0]
    """
    groups = is_direct.view(-1, num_generations)
    changed = torch.full_like(groups, KEEP, dtype=torch.long)
    changed[~groups.any(1), num_generations - count :] = DIRECT
    changed[groups.all(1), num_generations - count :] = THINK
    return changed.view(-1)


def utility_gaps(columns: Mapping[str, Sequence[Any]], num_negatives: int) -> list[float]:
    """Return margin with the rollout's own vector minus the no-think margin; 0 if it is direct.

    delta = s^r - s^d of MMEmb-R1 on margins (positive minus the mean of the K hardest negatives),
    because a CoT can raise the positive and a hard negative together (SURE, arXiv 2609.29560).

    Args:
        columns: Those of `RolloutScorer.columns`.
        num_negatives: K; 0 takes the positive similarity alone.

    Returns:
        One value per rollout in [-4, 4]. NaN where `margin` is None: gaps become a tensor and are
        gathered before `AdaptiveGRPOTrainer` turns NaN into None again.

    >>> utility_gaps({"positive_similarity": [0.75], "negative_similarities": [[0.25, 0.0]],
    ...               "no_think_positive_similarity": [0.5],
    ...               "no_think_negative_similarities": [[0.5, 0.0]]}, 1)
    [0.5]
    """

    def margins(prefix: str) -> list[float]:
        rows = zip(
            columns[f"{prefix}positive_similarity"],
            columns[f"{prefix}negative_similarities"],
            strict=True,
        )
        found = [margin(positive, negatives, num_negatives) for positive, negatives in rows]
        return [math.nan if value is None else value for value in found]

    return [a - b for a, b in zip(margins(""), margins("no_think_"), strict=True)]


def with_group_mean(gaps: Tensor, is_direct: Tensor, num_generations: int) -> Tensor:
    """Return the gaps (B * G,), those of direct rollouts replaced by their group's thinking mean.

    NaN where no rollout of the group thinks. Malformed thoughts count with their gap of 0.

    >>> with_group_mean(torch.tensor([0.2, 0.4, 0.0]), torch.tensor([0, 0, 1]).bool(), 3).tolist()
    [0.20000000298023224, 0.4000000059604645, 0.30000001192092896]
    """
    gaps, direct = gaps.view(-1, num_generations), is_direct.view(-1, num_generations)
    thinking = (~direct).sum(1, keepdim=True)
    mean = gaps.masked_fill(direct, 0.0).sum(1, keepdim=True) / thinking
    return torch.where(direct, mean.expand_as(gaps), gaps).view(-1)


def tapered(logps: Tensor, is_tapered: Tensor) -> Tensor:
    """Return the same log-probabilities, with less gradient through some first tokens.

    A pinned decision is off-policy. Where it lost, pushing an unlikely token further down goes on
    without end and spoils the thoughts; its gradient is weighed by its own probability instead, and
    is full where it won: tapered off-policy REINFORCE (TOPR, arXiv 2503.14286), on one token.

    Args:
        logps: (N, T) of completion tokens, with gradient.
        is_tapered: (N,) rollouts that were pinned and have a negative advantage.
    """
    first = logps[:, :1]
    weight = first.detach().exp()
    lessened = weight * first + (1.0 - weight) * first.detach()
    return torch.cat([torch.where(is_tapered[:, None], lessened, first), logps[:, 1:]], 1)


def primer_loss(first_logps: Tensor, is_direct: Tensor) -> Tensor:
    """Return the mean NLL of the first tokens, both decisions weighing alike; least at even odds.

    Args:
        first_logps: (N,) of what each rollout decided, with gradient.
        is_direct: (N,) what it was.

    >>> even = torch.tensor([0.5, 0.5, 0.5]).log()
    >>> round(primer_loss(even, torch.tensor([True, False, False])).item(), 4)
    0.6931
    """
    parts = [-first_logps[rows].mean() for rows in (is_direct, ~is_direct) if rows.any()]
    return torch.stack(parts).mean()
