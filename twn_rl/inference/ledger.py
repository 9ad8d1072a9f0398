"""Vectors and happenings of one call of `encode`, as they come in. Knows no models."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from twn_rl.inference.inputs import InputError
from twn_rl.inference.outputs import EncodeDetails


class Ledger:
    """What is known of N inputs so far.

    Attributes:
        states: (N, D) float32 vectors, not normalised; zeros where nothing is known.
        details: What happened.
        is_strict: Raise at the first bad input; otherwise note it and go on.
    """

    def __init__(self, count: int, width: int, *, is_strict: bool) -> None:
        """Start with nothing known."""
        self.states = np.zeros((count, width), np.float32)
        self.details = EncodeDetails.of(count)
        self.is_strict = is_strict

    def refuse(self, error: InputError) -> None:
        """Raise the error, or note it; the input's vector is then zeros."""
        if self.is_strict:
            raise error
        self.details.errors[error.position] = error.problem
        self.states[error.position] = 0.0

    def accept(self, positions: Sequence[int], states: Tensor) -> None:
        """Take over vectors (n, D); those with NaN or infinity are refused."""
        is_finite = torch.isfinite(states).all(dim=1).tolist()
        rows = states.float().cpu().numpy()
        for position, row, is_usable in zip(positions, rows, is_finite, strict=True):
            if is_usable:
                self.states[position] = row
                continue
            self.refuse(
                InputError(
                    position,
                    f"its vector holds NaN or infinity (type {states.dtype}); expected finite "
                    "numbers; load the model with dtype='float32' and check the checkpoint",
                )
            )

    @contextmanager
    def timed(self, part: str) -> Iterator[None]:
        """Add the seconds of the body to a part of the work."""
        started = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - started
            self.details.timings[part] = self.details.timings.get(part, 0.0) + seconds
