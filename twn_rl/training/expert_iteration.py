"""Expert iteration: the policy writes, RL's rewards choose, and what they chose is taught.

RAFT (Dong et al., arXiv 2304.06767, algorithm 1): of G samples for a prompt the one of the largest
reward is kept, and SFT on those kept makes the policy of the next round. Two deviations, both as in
STaR (2203.14465), where only what reaches the answer is taught: a best thought that gains nothing
over not thinking is left out and counted; and of equal thoughts one is judged. The trainer is the
warm start's, with its token loss alone.
"""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from twn_rl.data.record import Record
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.whole_files import digest
from twn_rl.training.grpo import rollout_dataset
from twn_rl.training.reward_loading import CheckedReward
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.settings import ScorerSettings, at_least
from twn_rl.training.sft import SftConfig
from twn_rl.training.thought_selection.choosing import Choice, SelectionRule, selection_report
from twn_rl.training.thought_selection.drafts import Row
from twn_rl.training.thought_selection.worth import Match, Pair

# What a thought changes by changing the vector; the other columns are about the thought itself.
VECTOR_COLUMNS = ("positive_similarity", "negative_similarities", "target_rank")


@dataclass
class ExpertIterationConfig(ScorerSettings, SftConfig):
    """Settings of the SFT of every round, plus what is sampled and what is kept."""

    num_rounds: int = field(
        default=4,
        metadata={"help": "Rounds of sampling and SFT; max_steps are shared out among them."},
    )
    prompts_per_round: int = field(
        default=400,
        metadata={
            "help": "Records a round, in one shuffled order through all of them. A run samples "
            "num_rounds * prompts_per_round * num_generations thoughts."
        },
    )
    num_generations: int = field(default=8, metadata={"help": "G thoughts sampled for a record."})
    sampling_temperature: float = field(
        default=1.0, metadata={"help": "Of the thoughts; `temperature` is InfoNCE's."}
    )
    reward_weights: list[float] | None = field(
        default=None, metadata={"help": "Weight of each reward; null is 1 for all."}
    )
    min_gain: float = field(
        default=0.0,
        metadata={
            "help": "Reward that a kept thought must have gained over its query's vector without "
            "one; exclusive."
        },
    )
    min_reward: float | None = field(
        default=None,
        metadata={"help": "Reward that a kept thought must have; exclusive; null is off."},
    )

    def problems(self) -> list[str]:
        """Return what is wrong with sampling, and with the fields of SFT."""
        names = ("num_rounds", "prompts_per_round", "num_generations")
        problems = [*super().problems(), *at_least(1, self, *names)]
        if self.sampling_temperature <= 0:
            problems.append(f"sampling_temperature = {self.sampling_temperature}, expected > 0")
        if self.max_steps < self.num_rounds:
            problems.append(
                f"max_steps = {self.max_steps}, expected at least one a round, so >= num_rounds = "
                f"{self.num_rounds}"
            )
        if not self.token_weight:
            problems.append("token_weight = 0, expected > 0: it is the only loss")
        return problems

    @property
    def rule(self) -> SelectionRule:
        """Which thought of a record is kept."""
        return SelectionRule("best", threshold=self.min_gain, min_match=self.min_reward)

    def steps_of(self, number: int) -> int:
        """Return the optimizer steps of a round; the first ones have one more if they must."""
        return self.max_steps // self.num_rounds + (number < self.max_steps % self.num_rounds)


def round_positions(count: int, args: ExpertIterationConfig) -> list[list[int]]:
    """Return the positions of the records of each round: every one before any a second time.

    Args:
        count: Number of records.
        args: Rounds, records of each, and the seed of the order.
    """
    size = min(args.prompts_per_round, count)
    rounds, left, epoch = [], list[int](), 0
    for _ in range(args.num_rounds):
        taken, left = left[:size], left[size:]
        if len(taken) < size:
            order = random.Random(f"{args.seed}/{epoch}").sample(range(count), count)
            epoch += 1
            order.sort(key=set(taken).__contains__)  # no record twice in a round
            rest = size - len(taken)
            taken, left = taken + order[:rest], order[rest:]
        rounds.append(taken)
    return rounds


def round_report(
    records: Sequence[Record], rows: Sequence[Row], choices: Sequence[Choice]
) -> dict[str, Any]:
    """Return what became of a round's samples, see `selection_report`, and what they were paid.

    Also `kept`, records with a thought that is taught, and mean rewards of the thoughts that were
    judged and of those kept.

    Args:
        records: What was thought about.
        rows: One a record with its judged `drafts`.
        choices: One a record.
    """
    report = selection_report(records, rows, choices)
    judged = [draft["with_cot"] for row in rows for draft in row["drafts"] if "worth" in draft]
    kept = [
        row["drafts"][number]["with_cot"]
        for row, choice in zip(rows, choices, strict=True)
        for number in choice.chosen
        if number is not None
    ]
    means = {"mean_reward": judged, "mean_reward_kept": kept}
    return {
        "kept": len(kept),
        "samples": report.pop("drafts"),
        **{name: sum(paid) / len(paid) if paid else None for name, paid in means.items()},
        **report,
    }


class RewardEvaluator:
    """Match = the weighted sum of RL's rewards, with a thought and without what it did.

    Without means the same thought, had it left the query's vector as it is without one: rewards of
    the thought itself (`format`, `length`) are paid on both sides, so `worth` is what the thought
    gained in retrieval. An evaluator of `thought_selection.worth.judge`.
    """

    def __init__(
        self,
        model: DualLoraModel,
        records: Sequence[Record],
        positions: Sequence[int],
        scorer: RolloutScorer,
        rewards: Sequence[CheckedReward],
        weights: Sequence[float] | None = None,
    ) -> None:
        """Hold what scores.

        Args:
            model: Policy and scorer.
            records: Those of `scorer`.
            positions: Which of them are judged: pair i is about record `positions[i]`.
            scorer: Makes the similarity columns, against the targets of all records.
            rewards: From `reward_loading.load_rewards`.
            weights: One a reward; 1 for all if None.

        Raises:
            ValueError: If there is not one weight a reward.
        """
        self.weights = [1.0] * len(rewards) if weights is None else list(weights)
        if len(self.weights) != len(rewards):
            raise ValueError(
                f"reward_weights = {self.weights} for {len(rewards)} rewards; expected one each; "
                "correct the list"
            )
        self.model, self.scorer, self.rewards = model, scorer, rewards
        self.positions = positions
        self.dataset = rollout_dataset(model, records)
        self.plan: dict[str, Any] = {
            "evaluator": "rewards",
            "rewards": [described_reward(reward) for reward in rewards],
            "weights": self.weights,
            "scorer": scorer.targets.fingerprint,
            "targets": digest(scorer.targets.ids),
            "num_negatives": scorer.num_negatives,
            "max_negative_similarity": scorer.max_negative_similarity,
        }

    def matches(self, pairs: Sequence[Pair]) -> list[Match | None]:
        """Return one match for each (record, CoT); None where no reward applies."""
        texts = [self.model.renderer.completion(cot) for _, cot in pairs]
        ids = [self.model.completion_ids(text, add_eos=True) for text in texts]
        positions = [self.positions[row] for row, _ in pairs]
        columns = {
            **self._of_dataset(positions),
            **self.scorer.columns(positions, ids),
            "completion_ids": ids,
        }
        completions = [[{"role": "assistant", "content": text}] for text in texts]
        unchanged = {name: columns[f"no_think_{name}"] for name in VECTOR_COLUMNS}
        both = (self._rewarded(completions, c) for c in (columns, {**columns, **unchanged}))
        return [
            None if reward is None or without is None else Match(reward, without)
            for reward, without in zip(*both, strict=True)
        ]

    def _of_dataset(self, positions: Sequence[int]) -> dict[str, list[Any]]:
        """Return the columns that TRL hands to rewards; each query is rendered once."""
        distinct = {position: row for row, position in enumerate(dict.fromkeys(positions))}
        rows: Any = self.dataset[list(distinct)]
        columns = {name: [rows[name][distinct[p]] for p in positions] for name in rows}
        return {"prompts": columns.pop("prompt"), **columns}

    def _rewarded(
        self, completions: Sequence[Any], columns: Mapping[str, Any]
    ) -> list[float | None]:
        """Return the weighted sum of the rewards that apply, as TRL takes it."""
        paid = [reward(completions, **columns) for reward in self.rewards]
        totals: list[float | None] = []
        for values in zip(*paid, strict=True):
            parts = [w * v for w, v in zip(self.weights, values, strict=True) if v is not None]
            totals.append(sum(parts) if parts else None)
        return totals


def described_reward(reward: CheckedReward) -> list[Any]:
    """Return name, parameters and text of a reward: scores of another text are not kept."""
    function: Any = reward.reward_func
    parameters: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        parameters, function = {**function.keywords, **parameters}, function.func
    try:
        text = inspect.getsource(function)
    except (OSError, TypeError):  # of a compiled module, or an object that is called
        text = ""
    return [reward.__name__, parameters, digest(text)]
