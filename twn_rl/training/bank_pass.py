"""The pass that embeds a bank's targets, shard by shard; knows no model and no queries."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from twn_rl.data.record import Item
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.sharded_pass import Progress, ShardedPass, deal
from twn_rl.runtime.whole_files import map_file, write_array
from twn_rl.training.bank_rows import FILE_TYPES, check_vectors, is_finite, to_stored

# What `Prepare` made of a batch, to the unit vectors (n, D) of its items, on any device.
Encode = Callable[[Any], torch.Tensor]
Prepare = Callable[[list[Item]], Any]


def read_shard(work: ShardedPass, number: int, dtype: str) -> np.ndarray | None:
    """Return the stored vectors of a shard, or None if it is absent or damaged."""
    shape = (len(work.ranges[number]), None)
    vectors = map_file(work.path(number, ".npy"), shape, FILE_TYPES[dtype])
    return vectors if vectors is not None and is_finite(vectors).all() else None


class ShardEncoder:
    """Embeds shards with the same number of calls for each: ZeRO-3 needs all processes in step.

    A batch holds items of like length, the longest first, so that little is padding and memory
    runs out early or not at all. Worker processes open and prepare batches ahead of the model.
    """

    def __init__(
        self,
        work: ShardedPass,
        missing: Mapping[int, Sequence[int]],
        items: Sequence[Item],
        encode: Encode,
        *,
        batch_size: int,
        dtype: str,
        prepare: Prepare | None = None,
        num_workers: int = 0,
        processes: Processes | None = None,
    ) -> None:
        """Plan the batches of this process's missing shards; nothing is embedded yet."""
        self.work, self.items, self.encode, self.dtype = work, items, encode, dtype
        self.prepare: Prepare = prepare or list
        self.batches = {
            number: _by_length(missing[number], items, batch_size)
            for number in deal(list(missing), processes)
        }
        is_shared = processes is not None and processes.num_processes > 1
        self.calls = -(-len(work.ranges[0]) // batch_size) if is_shared else 0
        self._num_workers = num_workers
        self._ready: Iterator[Any] | None = None

    def make(self, number: int, rows: Sequence[int], progress: Progress) -> None:
        """Embed and write one shard."""
        if self._ready is None:
            self._ready = self._prepared()
        batches = self.batches[number]
        parts: list[torch.Tensor] = []
        for batch in batches:
            with torch.no_grad():
                vectors = self.encode(next(self._ready)).detach().to("cpu", torch.float32)
            check_vectors(vectors, batch)
            parts.append(vectors)
            progress(len(batch))
        self.idle(self.calls - len(batches))
        order = torch.tensor([row for batch in batches for row in batch]).argsort()
        stored = to_stored(torch.cat(parts)[order], self.dtype)
        write_array(self.work.path(number, ".npy"), stored, FILE_TYPES[self.dtype])

    def idle(self, calls: int | None = None) -> None:
        """Embed the first item over and over, for nothing."""
        for _ in range(self.calls if calls is None else calls):
            self.encode(self.prepare([self.items[0]]))

    def _prepared(self) -> Iterator[Any]:
        batches = [
            [self.items[row] for row in rows] for each in self.batches.values() for rows in each
        ]
        workers = min(self._num_workers, len(batches))
        loader = DataLoader(
            _Prepared(batches, self.prepare),
            batch_size=None,
            num_workers=workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # or a seed would be drawn from the run's random state
        )
        return iter(loader)


class _Prepared(Dataset[Any]):
    """Batches of items, opened and collated when they are asked for."""

    def __init__(self, batches: Sequence[list[Item]], prepare: Prepare) -> None:
        self.batches, self.prepare = batches, prepare

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.prepare(self.batches[index])


def _as_it_is(batch: Any) -> Any:
    return batch


def _by_length(rows: Sequence[int], items: Sequence[Item], batch_size: int) -> list[list[int]]:
    """Return the rows in batches of like length, the longest first."""
    order = sorted(rows, key=lambda row: -items[row].length_estimate())
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
