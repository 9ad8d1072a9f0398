"""How a bank's vectors are stored, shared between processes, and checked; knows no folder layout.

NumPy has no bfloat16: on disk such a vector is its bits, as uint16.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from twn_rl.runtime.processes import Processes

BLOCK_ROWS = 16_384
NORM_TOLERANCE = 1e-2  # bfloat16 rounds the length of a unit vector by less than this
FILE_TYPES = {"float32": "<f4", "bfloat16": "<u2"}
_EXPONENT_BITS = 0x7F80  # all of them set: infinity or NaN in bfloat16


class BankError(ValueError):
    """A bank that is missing, incomplete or damaged, or targets that cannot be stored."""


def to_stored(vectors: Tensor, dtype: str) -> np.ndarray:
    """Return vectors (N, D) as they are written, rounded to `dtype`."""
    if dtype == "float32":
        return vectors.numpy()
    return vectors.to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def from_stored(stored: np.ndarray) -> Tensor:
    """Return what is stored (N, D) as a tensor that shares its memory."""
    if stored.dtype == np.uint16:
        return torch.from_numpy(stored.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(stored)


def is_finite(stored: np.ndarray) -> np.ndarray:
    """Return (N,) bool, whether a stored vector holds neither NaN nor infinity."""
    if stored.dtype == np.uint16:
        return np.all((stored & _EXPONENT_BITS) != _EXPONENT_BITS, axis=1)
    return np.all(np.isfinite(stored), axis=1)


def own_rows(count: int, processes: Processes | None, block_rows: int = BLOCK_ROWS) -> range:
    """Return this process's share of a bank: whole blocks, next to each other.

    Shares begin at multiples of `block_rows`, so that a product with a block has the same shape,
    and the same result to the last bit, however many processes there are.

    >>> own_rows(100_000, None)
    range(0, 100000)
    """
    if processes is None:
        return range(count)
    blocks = -(-count // block_rows)
    each = -(-blocks // processes.num_processes) * block_rows
    start = min(count, each * processes.process_index)
    return range(start, min(count, start + each))


def check_vectors(vectors: Tensor, batch: Sequence[int]) -> None:
    """Refuse what `encode` returned for the rows of a batch unless it can be compared by cosine.

    Raises:
        BankError: For another shape, values that are not finite, or vectors not of unit length.
    """
    if vectors.ndim != 2 or len(vectors) != len(batch):
        raise BankError(
            f"encode returned shape {tuple(vectors.shape)} for {len(batch)} items, expected "
            f"({len(batch)}, D); return one vector per item"
        )
    check_finite(vectors.numpy(), batch, "encode")
    norms = vectors.norm(dim=1)
    worst = int((norms - 1).abs().argmax())
    if abs(norms[worst] - 1) > NORM_TOLERANCE:
        raise BankError(
            f"encode returned length {norms[worst]:.4g} for the vector of target "
            f"{batch[worst]}, expected 1: similarities are cosines; L2-normalise the vectors"
        )


def check_finite(stored: np.ndarray, numbers: Sequence[int], source: str) -> None:
    """Raise `BankError` if a row holds NaN or infinity; `numbers` are those of the rows."""
    bad = np.flatnonzero(~is_finite(stored))
    if len(bad):
        raise BankError(
            f"{source}: vectors of targets {[numbers[row] for row in bad[:5]]} ({len(bad)} in this "
            "batch) hold NaN or infinity, expected finite numbers; check the scorer's precision, "
            "then build with rebuild=True"
        )
