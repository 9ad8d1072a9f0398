"""Rewards on the form of the CoT itself: its format and its length."""

from typing import Any


def format(
    completions: list[Any], *, is_think_complete: list[bool], **kwargs: Any
) -> list[float | None]:
    """Return 1 for one complete, well-formed think and 0 for anything else.

    The format reward of UME-R1 (arXiv 2511.00405) and Embed-RL (arXiv 2602.13823, `R_format`), for
    our format `<think> ... </think>`: opened once, closed once, not empty, not cut off. The trainer
    parses the completion with the renderer saved in the model, so that training and serving agree
    on what complete means; this reward only reads the verdict. The papers weigh it 0.05 to 1 next
    to the embedding reward.

    Returns:
        0.0 or 1.0 per rollout.

    Example:
        >>> format(["<think> a </think>", "<think> a"], is_think_complete=[True, False])
        [1.0, 0.0]
    """
    return [1.0 if is_complete else 0.0 for is_complete in is_think_complete]


def length(
    completions: list[Any],
    *,
    think_tokens: list[int],
    max_think_tokens: int = 256,
    soft_window_tokens: int = 64,
    **kwargs: Any,
) -> list[float | None]:
    """Return a penalty that grows over the last tokens of the budget.

    Soft over-long punishment of DAPO (arXiv 2503.14476, eq. 13) on the tokens of the think, with L
    the tokens, `L_max` = `max_think_tokens` the budget and `L_cache` = `soft_window_tokens`: 0 up
    to `L_max - L_cache`; then `((L_max - L_cache) - L) / L_cache`; and -1 above `L_max`. A window
    of 0 is a cliff at the budget. No deviation.

    Returns:
        One value in [-1, 0] per rollout.

    Raises:
        ValueError: If the window is negative or larger than the budget, or the budget is below 1.

    Example:
        >>> length(["a", "b", "c"], think_tokens=[80, 90, 101],
        ...        max_think_tokens=100, soft_window_tokens=20)
        [0.0, -0.5, -1.0]
    """
    if max_think_tokens < 1 or not 0 <= soft_window_tokens <= max_think_tokens:
        raise ValueError(
            f"max_think_tokens = {max_think_tokens}, soft_window_tokens = {soft_window_tokens}, "
            "expected 0 <= soft_window_tokens <= max_think_tokens and max_think_tokens >= 1. "
            "Shrink the window or raise the budget."
        )
    free_tokens = max_think_tokens - soft_window_tokens
    rewards: list[float | None] = []
    for tokens in think_tokens:
        if tokens <= free_tokens:
            rewards.append(0.0)
        elif tokens > max_think_tokens:
            rewards.append(-1.0)
        else:
            rewards.append((free_tokens - tokens) / soft_window_tokens)
    return rewards
