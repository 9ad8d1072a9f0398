"""MMEmb-R1's adaptive control: GRPO in which the first token decides between thought and answer.

The policy opens a thought or ends its turn at once; every group of rollouts holds both. Knows no
reward function: it hands them the utility gap of each rollout (arXiv 2604.06156, of which only
summaries were at hand: how groups are mixed and what the gap is taken on are our choice).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from twn_rl.data.record import Record
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.thoughts import is_direct, think_open_ids
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.settings import at_least
from twn_rl.training.similarity_columns import SCORING_COLUMNS
from twn_rl.training.think_decisions import (
    DIRECT,
    KEEP,
    THINK,
    pinned_modes,
    primer_loss,
    tapered,
    utility_gaps,
    with_group_mean,
)

logger = logging.getLogger(__name__)

ADAPTIVE_COLUMNS = (*SCORING_COLUMNS, "utility_gap")


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
        if self.use_vllm:
            problems.append(
                "use_vllm = True, expected False: vLLM has no sampling log-probabilities of pinned "
                "rollouts"
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
        self._is_tapered: Tensor | None = None
        model.config.thinking_decision = "policy"
        # One that was chosen before (recipes/policy_threshold.py) is of another policy.
        model.config.policy_threshold = TwnConfig.policy_threshold

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
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], Any]:
        """Let TRL sample, then put rollouts of one-mode groups into the other mode.

        A first token that is neither decision counts as thinking, and its thought is opened anew,
        as it is in serving.

        Everything TRL computes afterwards, masks and log-probabilities, is of what stands here.
        """
        completions, logprobs = super()._generate_single_turn(
            prompt_ids, images, multimodal_fields, num_generations, has_tool_images
        )
        backbone, policy = self.dual_model.backbone, self.model
        direct = [is_direct(backbone, ids) for ids in completions]
        self._log_means({"rollouts/think_rate": [float(not ended) for ended in direct]})
        self._is_pinned = torch.zeros(len(completions), dtype=torch.bool)
        if not policy.training:  # pyright: ignore[reportOptionalMemberAccess]
            return completions, logprobs
        opening = think_open_ids(backbone, self.dual_model.renderer)[0]
        is_open = [ids[0] == opening for ids in completions]
        flags = self._everywhere(torch.tensor([direct, is_open]).T.contiguous())
        pins = pinned_modes(flags[:, 0], num_generations, self.args.pinned_generations)
        is_undecided = ~flags.any(1)
        means = {
            "pinned_direct": pins == DIRECT,
            "pinned_think": pins == THINK,
            "undecided": is_undecided,
        }
        self._log_means({f"rollouts/{key}": means[key].float().tolist() for key in means})
        pins = pins.masked_fill(is_undecided & (pins == KEEP), THINK)
        own = self._local(pins, len(completions))
        self._is_pinned = own != KEEP
        for row, mode in enumerate(own.tolist()):
            if mode == DIRECT:
                completions[row] = [backbone.eos_token_id]
        if bool((pins == THINK).any()):  # of any process: ZeRO-3 needs the same forwards on all
            self._force_thoughts(completions, (own == THINK).nonzero()[:, 0].tolist())
        return completions, logprobs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Let TRL generate and score, and mark the pinned rollouts."""
        output: Any = super()._generate_and_score_completions(inputs)
        return {**output, "is_pinned": self._is_pinned.to(output["completion_ids"].device)}

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        """Taper lost pinned decisions in TRL's loss, and add the primer while it lasts."""
        self._is_tapered = inputs["is_pinned"] & (inputs["advantages"] < 0)
        loss: Any = super()._compute_loss(model, inputs)
        weight = 1.0 - self.state.global_step / max(1, self.args.primer_steps)
        if weight > 0 and self.args.primer_steps and model.training:
            direct = inputs["completion_ids"][:, 0] == self.dual_model.backbone.eos_token_id
            primer = primer_loss(self._first_logps, direct)
            self._log_means({"primer_loss": [primer.item()]})
            loss = loss + weight * primer / self.current_gradient_accumulation_steps
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL computes, tapered; remember the decisions' log-probabilities."""
        logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if torch.is_grad_enabled() and self._is_tapered is not None:
            self._first_logps = logps[:, 0]
            logps = tapered(logps, self._is_tapered)
        return (logps, *rest)

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
        assert size is not None
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
