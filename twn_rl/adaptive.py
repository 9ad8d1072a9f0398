"""MMEmb-R1's adaptive control: GRPO in which the first token decides between thought and answer.

The policy opens a thought or ends its turn at once; every group of rollouts holds both. Knows no
reward function: it hands them the utility gap of each rollout (arXiv 2604.06156, of which only
summaries were at hand: how groups are mixed and what the gap is taken on are our choice).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twn_rl.grpo import EmbedGRPOConfig, EmbedGRPOTrainer
from twn_rl.model import DualLoraModel
from twn_rl.records import Record
from twn_rl.rollouts import RolloutScorer
from twn_rl.scoring import SCORING_COLUMNS
from twn_rl.thoughts import is_direct, think_open_ids

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
    utility_negatives: int = field(
        default=8,
        metadata={
            "help": "K hardest negatives whose mean similarity is taken off in the utility gap. "
            "0: the gap of the positive similarities alone, as in the paper."
        },
    )

    def __post_init__(self) -> None:
        """Check the fields of mixing, then the others."""
        super().__post_init__()
        problems = []
        if not 0 <= self.pinned_generations < (self.num_generations or 1):
            problems.append(
                f"pinned_generations = {self.pinned_generations}, expected from 0 to below "
                f"num_generations = {self.num_generations}"
            )
        if self.utility_negatives < 0:
            problems.append(f"utility_negatives = {self.utility_negatives}, expected >= 0")
        if self.use_vllm:
            problems.append(
                "use_vllm = True, expected False: vLLM has no sampling log-probabilities of pinned "
                "rollouts"
            )
        if problems:
            raise ValueError("AdaptiveGRPOConfig: " + "; ".join(problems) + "; change these fields")
        if self.loss_type == "grpo":
            logger.warning(
                "loss_type = 'grpo' divides by each completion's length, so that a direct answer's "
                "one token weighs as much as a whole thought; 'dapo' weighs decisions alike"
            )


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
        One value per rollout in [-4, 4]; NaN where there are no negatives but K > 0.

    >>> utility_gaps({"positive_similarity": [0.75], "negative_similarities": [[0.25, 0.0]],
    ...               "no_think_positive_similarity": [0.5],
    ...               "no_think_negative_similarities": [[0.5, 0.0]]}, 1)
    [0.5]
    """

    def margins(prefix: str) -> list[float]:
        positives = columns[f"{prefix}positive_similarity"]
        if not num_negatives:
            return list(positives)
        hardest = [
            sorted(row, reverse=True)[:num_negatives]
            for row in columns[f"{prefix}negative_similarities"]
        ]
        return [
            positive - sum(row) / len(row) if row else math.nan
            for positive, row in zip(positives, hardest, strict=True)
        ]

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


class AdaptiveGRPOTrainer(EmbedGRPOTrainer):
    """`EmbedGRPOTrainer` whose policy learns by its first token when to think."""

    args: AdaptiveGRPOConfig

    def __init__(
        self,
        model: DualLoraModel,
        reward_funcs: Sequence[Callable[..., list[float | None]]],
        args: AdaptiveGRPOConfig,
        records: Sequence[Record],
        scorer: RolloutScorer,
        **kwargs: Any,
    ) -> None:
        """Let the policy of ``model`` decide from here on, also once it is saved; see the parent.

        Args:
            model: Warm-started model.
            reward_funcs: From `reward_loading.load_rewards`, with `ADAPTIVE_COLUMNS` available.
            args: Settings.
            records: What to roll out.
            scorer: Makes the similarity columns.
            **kwargs: For `GRPOTrainer`, such as callbacks.
        """
        super().__init__(model, reward_funcs, args, records, scorer, **kwargs)
        model.config.thinking_decision = "policy"

    def _generate(self, prompts: list[Any]) -> Any:
        """Keep the prompts for thoughts that have to be forced open, then let TRL generate."""
        self._prompts = prompts
        return super()._generate(prompts)

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        **kwargs: Any,
    ) -> tuple[list[list[int]], Any]:
        """Let TRL sample, then put rollouts of one-mode groups into the other mode.

        Everything TRL computes afterwards, masks and log-probabilities, is of what stands here.
        """
        completions, logprobs = super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, **kwargs
        )
        backbone, policy = self.dual_model.backbone, self.model
        direct = [is_direct(backbone, ids) for ids in completions]
        self._log_means({"rollouts/think_rate": [float(not ended) for ended in direct]})
        if not policy.training:  # pyright: ignore[reportOptionalMemberAccess]
            return completions, logprobs
        flags = self._everywhere(torch.tensor(direct))
        pins = pinned_modes(flags, num_generations, self.args.pinned_generations)
        self._log_means(
            {
                f"rollouts/pinned_{name}": (pins == mode).float().tolist()
                for name, mode in (("direct", DIRECT), ("think", THINK))
            }
        )
        own = self._local(pins, len(completions))
        for row, mode in enumerate(own.tolist()):
            if mode == DIRECT:
                completions[row] = [backbone.eos_token_id]
        if bool((pins == THINK).any()):  # of any process: ZeRO-3 needs the same forwards on all
            self._force_thoughts(completions, (own == THINK).nonzero()[:, 0].tolist())
        return completions, logprobs

    def _force_thoughts(self, completions: list[list[int]], rows: list[int]) -> None:
        """Open a thought in some rollouts and let the policy write on, in place."""
        opening = think_open_ids(self.dual_model.backbone, self.dual_model.renderer)
        prompts = [self._prompts[row] for row in rows or [0]]
        prompt_ids, images, fields = self._tokenize_prompts(prompts)
        # What has an entry per token must grow with the prompt; thoughts are text, type 0.
        fields = {
            key: [[*row, *([0] * len(opening))] for row in values]
            if isinstance(values, list) and values and isinstance(values[0], list)
            else values
            for key, values in fields.items()
        }
        written, _ = super()._generate_single_turn(
            [[*ids, *opening] for ids in prompt_ids], images, fields, 1
        )
        for row, ids in zip(rows, written, strict=False):
            completions[row] = [*opening, *ids][: self.max_completion_length]

    def _rollout_columns(
        self, indices: list[int], completion_ids: list[list[int]]
    ) -> dict[str, list[Any]]:
        """Add the utility gap to the columns."""
        columns = super()._rollout_columns(indices, completion_ids)
        policy: Any = self.model
        size = self.num_generations if policy.training else self.num_generations_eval
        gaps = torch.tensor(utility_gaps(columns, self.args.utility_negatives))
        direct = torch.tensor(columns["is_direct"])
        filled = with_group_mean(self._everywhere(gaps), self._everywhere(direct), size)
        own = self._local(filled, len(indices)).tolist()
        columns["utility_gap"] = [None if math.isnan(gap) else gap for gap in own]
        known = [gap for gap in own if not math.isnan(gap)]
        self._log_means({"rollouts/utility_gap": known or [0.0]})
        return columns

    def _everywhere(self, values: Tensor) -> Tensor:
        """Return values (N,) of every process's rollouts, in TRL's order of groups, on the CPU."""
        gathered: Any = self.accelerator.gather(values.to(self.accelerator.device))
        return gathered.cpu()

    def _local(self, values: Tensor, count: int) -> Tensor:
        """Return this process's part of gathered values; `count` rollouts a process."""
        return values.split(count)[self.accelerator.process_index]
