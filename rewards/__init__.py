"""The built-in rewards by name. Refuses to know models, trainers, files and tensors.

A reward is a plain function ``def name(completions, *, <columns>, **kwargs) -> list[float |
None]``: one value per rollout, higher is better, `None` where the reward does not apply to that
rollout. It reads columns that the trainer computed once for the whole generation batch, so it needs
no model and can be tried on six numbers by hand:

- `positive_similarity`: cosine of the think vector to its positive, one float per rollout;
- `negative_similarities`: cosines to the K hardest negatives of the whole target bank, hardest
  first, with false negatives masked; one list per rollout, shorter than K where the pool is small,
  empty where it holds no negative (then a margin is `None`, see `twn_rl.metrics.negatives.margin`);
- `no_think_positive_similarity`, `no_think_negative_similarities`: the same for the vector made
  without any CoT;
- `target_rank`: rank of the positive among the pool, 1 is best, ties count against it;
- `think_tokens`: tokens of the CoT; `is_think_complete`: whether it is one well-formed, closed
  think, or no think at all where the policy decides (`is_direct`: it ended its turn at once);
- `utility_gap`, of `AdaptiveGRPOTrainer` only: margin with the CoT minus margin without; for a
  direct rollout the mean over the thinking rollouts of its group;
- `prompts`, `completions`, `completion_ids` and every other column of the dataset.

**Incomplete thinks.** A truncated or malformed CoT is never embedded. Its similarity columns hold
the values of the no-think vector, so every similarity reward pays it exactly what not thinking
would have earned (`think_gain` pays 0). Add `format` to the list of rewards to make it cost
something.

How to add one: write the function, with its formula, its range and an example that runs, in a file
of this folder; import it below; add one line to `REWARDS`. `tests/rewards/test_rewards.py` then
checks its contract. A reward that lives in your own code needs none of this: name it
`package.module:function` or `path/to/file.py:function`. Keyword arguments that have a default value
are parameters and can be set from YAML; those without one are columns. Never catch an exception
inside a reward: `None` means "not applicable", an exception means "a bug".
"""

from collections.abc import Callable

from twn_rl.rewards.adaptive import adaptive
from twn_rl.rewards.completion import format, length
from twn_rl.rewards.contrastive import info_nce, softmax_margin
from twn_rl.rewards.margins import margin, rank_gap, think_gain

REWARDS: dict[str, Callable[..., list[float | None]]] = {
    "margin": margin,
    "info_nce": info_nce,
    "rank_gap": rank_gap,
    "softmax_margin": softmax_margin,
    "think_gain": think_gain,
    "format": format,
    "length": length,
    "adaptive": adaptive,
}

__all__ = [
    "REWARDS",
    "adaptive",
    "format",
    "info_nce",
    "length",
    "margin",
    "rank_gap",
    "softmax_margin",
    "think_gain",
]
