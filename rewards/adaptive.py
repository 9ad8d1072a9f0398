"""The reward of deciding well whether to think."""

from typing import Any


def adaptive(
    completions: list[Any],
    *,
    utility_gap: list[float | None],
    is_direct: list[bool],
    think_tokens: list[int],
    min_gap: float = 0.02,
    length_cost: float = 0.2,
    max_think_tokens: int = 256,
    **kwargs: Any,
) -> list[float | None]:
    """Return +1 for the right decision to think or not, -1 for the wrong one, less its length.

    The adaptive term of MMEmb-R1 (arXiv 2604.06156), which punishes needless and long reasoning.
    With delta the utility gap, m = `min_gap`, L the tokens and `L_max` the budget:
    `R = +1 if (think and delta > m) or (direct and delta <= m), else -1`, minus
    `length_cost * L / L_max` when thinking. The paper is known from summaries only: the two values,
    the dead band m and the linear cost are our choice. A thinking rollout is judged by its own gap,
    so a wrong CoT is told to stay away; a direct one by the mean gap of its group's CoTs.

    Returns:
        One value in [-1 - length_cost, 1] per rollout. `None` where the gap is unknown.

    Raises:
        ValueError: If the cost is negative or the budget below 1.

    Example:
        >>> adaptive(["a", "b", "c"], utility_gap=[0.5, 0.5, None], is_direct=[False, True, True],
        ...          think_tokens=[64, 0, 0], length_cost=0.5, max_think_tokens=128)
        [0.75, -1.0, None]
    """
    if max_think_tokens < 1 or length_cost < 0:
        raise ValueError(
            f"max_think_tokens = {max_think_tokens}, length_cost = {length_cost}, expected "
            "max_think_tokens >= 1 and length_cost >= 0. Set the budget to max_completion_length."
        )
    rewards: list[float | None] = []
    for gap, direct, tokens in zip(utility_gap, is_direct, think_tokens, strict=True):
        if gap is None:
            rewards.append(None)
            continue
        verdict = 1.0 if (gap > min_gap) != direct else -1.0
        cost = 0.0 if direct else length_cost * tokens / max_think_tokens
        rewards.append(verdict - cost)
    return rewards
