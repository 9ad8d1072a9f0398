"""MMEmb-R1's adaptive control: GRPO in which the first token decides between thought and answer.

The policy opens a thought or ends its turn at once; every group of rollouts holds both, and rewards
read the utility gap of each rollout. Of the paper (arXiv 2604.06156) only summaries were at hand:
how groups are mixed, tapered and primed and what the gap is taken on are our choice.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twn_rl.metrics.negatives import margin_gains
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer
from twn_rl.training.settings import at_least
from twn_rl.training.similarity_columns import SCORING_COLUMNS

logger = logging.getLogger(__name__)

ADAPTIVE_COLUMNS = (*SCORING_COLUMNS, "utility_gap")
# What `pinned_modes` asks of a rollout.
KEEP, DIRECT, THINK = 0, 1, 2


@dataclass
class AdaptiveGRPOConfig(EmbedGRPOConfig):
    """`EmbedGRPOConfig` plus how groups are mixed and what thinking is worth."""

    pinned_generations: int = field(
        default=1,
        metadata={
            "help": "Rollouts of a group in one mode (all think, or none) that are put into the "
            "other one. 0: off; such groups then teach nothing about the decision."
        },
    )
    primer_steps: int = field(
        default=20,
        metadata={
            "help": "Optimiser steps in which the policy is also drawn to both decisions alike, "
            "less and less: after SFT on thoughts it never ends its turn at once. 0: off."
        },
    )
    utility_negatives: int = field(
        default=8,
        metadata={
            "help": "K hardest negatives whose mean similarity is taken off in the utility gap. "
            "0: the gap of the positive similarities alone, as in the paper."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the scorer's fields and those of mixing."""
        problems = super().problems()
        if not 0 <= self.pinned_generations < (self.num_generations or 1):
            problems.append(
                f"pinned_generations = {self.pinned_generations}, expected from 0 to below "
                f"num_generations = {self.num_generations}"
            )
        problems += at_least(0, self, "utility_negatives", "primer_steps")
        if self.use_liger_kernel:
            problems.append(
                "use_liger_kernel = True, expected False: its loss hides the decision's "
                "log-probability"
            )
        return problems

    def __post_init__(self) -> None:
        """Say what a loss type does to decisions."""
        super().__post_init__()
        if self.loss_type == "grpo":
            logger.warning(
                "loss_type = 'grpo' divides by each completion's length, so that a direct answer's "
                "one token weighs as much as a whole thought; 'dapo' weighs decisions alike"
            )


class AdaptiveGRPOTrainer(EmbedGRPOTrainer):
    """`EmbedGRPOTrainer` whose policy learns by its first token when to think."""

    args: AdaptiveGRPOConfig

    def __init__(self, model: DualLoraModel, *args: Any, **kwargs: Any) -> None:
        """Let the policy of the model decide from here on, also once it is saved."""
        super().__init__(model, *args, **kwargs)
        model.config.thinking_decision = "policy"
        # One that was chosen before (recipes/policy_threshold.py) is of another policy.
        model.config.policy_threshold = TwnConfig.policy_threshold

    def edit_completions(
        self, prompt_ids: list[list[int]], completions: list[list[int]], num_generations: int
    ) -> Mapping[str, Tensor]:
        """Put rollouts of one-mode groups into the other mode; return `is_pinned`.

        A first token that is neither decision counts as thinking, and its thought is opened anew,
        as it is in serving.
        """
        backbone, policy = self.dual_model.backbone, self.model
        direct = [self.dual_model.is_direct(ids) for ids in completions]
        self.log_means({"rollouts/think_rate": [float(not ended) for ended in direct]})
        if not policy.training:  # pyright: ignore[reportOptionalMemberAccess]
            return {"is_pinned": torch.zeros(len(completions), dtype=torch.bool)}
        opening = self.dual_model.think_open_ids
        is_open = [ids[0] == opening[0] for ids in completions]
        flags = self.everywhere(torch.tensor([direct, is_open]).T.contiguous())
        pins = pinned_modes(flags[:, 0], num_generations, self.args.pinned_generations)
        is_undecided = ~flags.any(1)
        means = {
            "pinned_direct": pins == DIRECT,
            "pinned_think": pins == THINK,
            "undecided": is_undecided,
        }
        self.log_means({f"rollouts/{key}": means[key].float().tolist() for key in means})
        pins = pins.masked_fill(is_undecided & (pins == KEEP), THINK)
        own = self.own(pins, len(completions))
        for row in (own == DIRECT).nonzero()[:, 0].tolist():
            completions[row] = [backbone.eos_token_id]
        if bool((pins == THINK).any()):  # of any process: ZeRO-3 needs the same forwards on all
            rows = (own == THINK).nonzero()[:, 0].tolist()
            for row, thought in zip(rows, self.write_on(rows, opening), strict=True):
                completions[row] = thought
        return {"is_pinned": own != KEEP}

    def rollout_columns(
        self, indices: list[int], completion_ids: list[list[int]]
    ) -> dict[str, list[Any]]:
        """Add the utility gap to the columns: what thinking gained, on margins.

        delta = s^r - s^d of MMEmb-R1 on margins, because a CoT can raise the positive and a hard
        negative together (SURE, arXiv 2609.29560). None where it is unknown.
        """
        columns = super().rollout_columns(indices, completion_ids)
        policy: Any = self.model
        size = self.num_generations if policy.training else self.num_generations_eval
        assert size is not None
        names = ("positive_similarity", "negative_similarities")
        sides = [columns[f"{prefix}{name}"] for prefix in ("", "no_think_") for name in names]
        gains = margin_gains(*sides, num_negatives=self.args.utility_negatives)
        gaps = torch.tensor([math.nan if gain is None else gain for gain in gains])
        direct = torch.tensor(columns["is_direct"])
        filled = with_group_mean(self.everywhere(gaps), self.everywhere(direct), size)
        own = self.own(filled, len(indices)).tolist()
        columns["utility_gap"] = [None if math.isnan(gap) else gap for gap in own]
        known = [gap for gap in own if not math.isnan(gap)]
        self.log_means({"rollouts/utility_gap": known or [0.0]})
        return columns

    def shape_loss(self, logps: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Taper lost pinned decisions, and add the primer while it lasts."""
        is_tapered = inputs["is_pinned"] & (inputs["advantages"] < 0)
        weight = 1.0 - self.state.global_step / max(1, self.args.primer_steps)
        policy: Any = self.model
        if weight <= 0 or not self.args.primer_steps or not policy.training:
            return tapered(logps, is_tapered), None
        direct = inputs["completion_ids"][:, 0] == self.dual_model.backbone.eos_token_id
        primer = primer_loss(logps[:, 0], direct)
        self.log_means({"primer_loss": [primer.item()]})
        return tapered(logps, is_tapered), weight * primer


def pinned_modes(is_direct: Tensor, num_generations: int, count: int) -> Tensor:
    """Return which rollouts must change their mode so that every group of G holds both.

    Rollouts of a group are exchangeable, so it is the last `count` of a group of one mode that
    change. Takes (B * G,) bool, of all processes; returns (B * G,) of `KEEP`, `DIRECT` or `THINK`.

    >>> pinned_modes(torch.tensor([0, 0, 0, 1, 1, 1, 0, 1, 0]).bool(), 3, 1).tolist()
    [0, 0, 1, 0, 0, 2, 0, 0, 0]
    """
    groups = is_direct.view(-1, num_generations)
    changed = torch.full_like(groups, KEEP, dtype=torch.long)
    changed[~groups.any(1), num_generations - count :] = DIRECT
    changed[groups.all(1), num_generations - count :] = THINK
    return changed.view(-1)


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
    """Return the same log-probabilities (N, T), with less gradient through some first tokens.

    A pinned decision is off-policy. Where it lost, pushing an unlikely token further down goes on
    without end and spoils the thoughts; its gradient is weighed by its own probability instead, and
    is full where it won: tapered off-policy REINFORCE (TOPR, arXiv 2503.14286), on one token.
    `is_tapered` (N,) are the rollouts that were pinned and have a negative advantage.
    """
    first = logps[:, :1]
    weight = first.detach().exp()
    lessened = weight * first + (1.0 - weight) * first.detach()
    return torch.cat([torch.where(is_tapered[:, None], lessened, first), logps[:, 1:]], 1)


def primer_loss(first_logps: Tensor, is_direct: Tensor) -> Tensor:
    """Return the mean NLL of the first tokens (N,), both decisions weighing alike.

    It is least at even odds; gradient flows into `first_logps`.

    >>> even = torch.tensor([0.5, 0.5, 0.5]).log()
    >>> round(primer_loss(even, torch.tensor([True, False, False])).item(), 4)
    0.6931
    """
    parts = [-first_logps[rows].mean() for rows in (is_direct, ~is_direct) if rows.any()]
    return torch.stack(parts).mean()
