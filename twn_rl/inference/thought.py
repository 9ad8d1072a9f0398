"""One thought of an input: written or given, used or left out and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twn_rl.inference.options import Keep
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.model import DualLoraModel

# Problems beside those of `Think`: what was read out, and what the judge says of it.
NOT_FINITE = "not_finite"
IMPLAUSIBLE = "implausible"


@dataclass
class Thought:
    """One thought of an input.

    Attributes:
        ids: What is embedded of it, end of turn left out.
        text: Its text, also of one that is not used.
        problem: Why it is not used; None if it is.
        written_tokens: Tokens the model wrote for it, end of turn not counted.
        state: (D,) once it has been read out; None of one that is not used.
        plausibility: What the judge says of it; None where nobody was asked.
    """

    ids: list[int]
    text: str
    problem: str | None = None
    written_tokens: int = 0
    state: Tensor | None = None
    plausibility: float | None = None


def written_thought(model: DualLoraModel, ids: Sequence[int]) -> Thought:
    """Return the thought in a completion that the model wrote."""
    think, eos = model.think(ids), model.backbone.eos_token_id
    written = [token for token in ids if token != eos]
    embedded = model.until_close(written) if think.is_complete else written
    return Thought(embedded, think.text, think.problem, written_tokens=len(written))


def note_states(
    thoughts: Sequence[Thought],
    states: Tensor,
    no_think: Tensor,
    *,
    judge: Judge | None,
    keep: Keep,
) -> None:
    """Give usable thoughts their states; those that are left out get a problem instead.

    Args:
        thoughts: N thoughts.
        states: (N, D) with each of them.
        no_think: (N, D) of the same inputs without.
        judge: Says how plausible each is, if there is one.
        keep: "better" leaves out what the judge refuses.
    """
    if not thoughts:
        return
    said: list[float | None] = [None] * len(thoughts)
    if judge is not None:
        said = judge.plausibility(no_think, states).tolist()
    is_finite = torch.isfinite(states).all(dim=1).tolist()
    rows = zip(thoughts, states, is_finite, said, strict=True)
    for thought, state, is_usable, plausibility in rows:
        if not is_usable:
            thought.problem = NOT_FINITE
            continue
        thought.plausibility = plausibility
        if keep == "better" and judge is not None and not judge.keeps(plausibility or 0.0):
            thought.problem = IMPLAUSIBLE
        else:
            thought.state = state
