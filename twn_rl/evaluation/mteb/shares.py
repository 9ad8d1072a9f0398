"""Processes that share the inputs of a data loader and all get all vectors; knows no models.

Chunks of rows are dealt in turn, whole, so that every input meets the same batch mates however
many processes there are.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import distributed
from torch.utils.data import DataLoader, Subset

from twn_rl.evaluation.usage import Usage
from twn_rl.runtime.sharded_pass import shard_ranges

# Batches handed over in one call: inputs of like length meet, and thoughts are written together.
BATCHES_PER_CALL = 4


def processes() -> tuple[int, int]:
    """Return this process's rank and how many there are."""
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1


def chunk_rows(inputs: DataLoader[Any]) -> list[list[int]]:
    """Return the rows of each process: chunks of one call, dealt in turn."""
    count, (_, world) = len(inputs.dataset), processes()  # type: ignore[arg-type]
    chunks = shard_ranges(count, BATCHES_PER_CALL * (inputs.batch_size or 1))
    return [[row for chunk in chunks[rank::world] for row in chunk] for rank in range(world)]


def own_share(inputs: DataLoader[Any]) -> DataLoader[Any]:
    """Return a loader of this process's rows, which decodes no others."""
    rank, world = processes()
    if world == 1:
        return inputs
    return DataLoader(
        Subset(inputs.dataset, chunk_rows(inputs)[rank]),
        batch_size=inputs.batch_size,
        collate_fn=inputs.collate_fn,
        num_workers=inputs.num_workers,
    )


def assemble(
    parts: list[tuple[NDArray[np.float32], Usage]], rows: list[list[int]], usage: Usage
) -> NDArray[np.float32]:
    """Return all vectors in the order of the inputs and add up what they cost into `usage`."""
    total = Usage()
    vectors = np.zeros((sum(map(len, rows)), parts[0][0].shape[1]), np.float32)
    for (part, cost), places in zip(parts, rows, strict=True):
        vectors[np.array(places, dtype=int)] = part
        total.add(cost)
    usage.__dict__.update(total.__dict__)
    return vectors
