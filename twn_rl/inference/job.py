"""One input on its way through a `ContinuousPass`: what is wanted, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twn_rl.data.record import Item
from twn_rl.inference.chooser import Chooser
from twn_rl.inference.thought import Thought


@dataclass(eq=False)
class Job:
    """One input, who decides whether it thinks, and its result.

    Attributes:
        item: What to embed.
        chooser: Of one input, see `make_chooser`; without a given thought.
        max_think_tokens: Longest thought; None is the model's.
        on_read: Told once the no-think vector and the decision are known: (job, whether it thinks).
        on_token: Told after every token of the thought: (job, ids so far), which it must not keep.
        is_cancelled: Set by whoever no longer wants the result, from any thread.
        state: (D,) float32, not normalised: with the thought if it is usable, else without.
        no_think_state: (D,) float32, not normalised.
        probability: What the gate or the policy said; None where nobody was asked.
        thought: What was thought, also if it is not used; None if nothing was.
        prompt_tokens: Length of the prompt as it was read.
        is_truncated: Whether the text was cut to fit.
        error: Why there is no vector.
        created_at: Seconds of `time.perf_counter`, as the next two.
        read_at: When the no-think vector was known.
        done_at: When the job was done or dropped.
    """

    item: Item
    chooser: Chooser
    max_think_tokens: int | None = None
    on_read: Callable[[Job, bool], None] | None = None
    on_token: Callable[[Job, list[int]], None] | None = None
    is_cancelled: bool = False
    state: NDArray[np.float32] | None = None
    no_think_state: NDArray[np.float32] | None = None
    probability: float | None = None
    thought: Thought | None = None
    prompt_tokens: int = 0
    is_truncated: bool = False
    error: Exception | None = None
    created_at: float = field(default_factory=time.perf_counter)
    read_at: float | None = None
    done_at: float | None = None

    @property
    def may_think(self) -> bool:
        """Whether a thought may be written about it, or the policy must be asked."""
        entries, threshold = self.chooser.entries, self.chooser.threshold
        if entries is not None:
            return entries[0] is True
        return self.chooser.is_policy or (threshold is not None and threshold < 1)

    @property
    def characters(self) -> int:
        """Characters of text and instruction."""
        return len(self.item.text or "") + len(self.item.instruction or "")

    @property
    def pixels(self) -> int:
        """Pixels of the pictures that are in memory."""
        sources = (*self.item.images, *self.item.video)
        return sum(s.width * s.height for s in sources if isinstance(s, Image.Image))

    @property
    def has_thought(self) -> bool:
        """Whether there is a thought to read the vector with."""
        return self.thought is not None and self.thought.problem is None

    @property
    def thought_ids(self) -> list[int]:
        """Ids of the thought, as they are embedded; [] without one."""
        return [] if self.thought is None else self.thought.ids

    @property
    def think_tokens(self) -> int:
        """Tokens written, end of turn not counted."""
        return 0 if self.thought is None else self.thought.written_tokens
