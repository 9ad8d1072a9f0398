"""How a target bank gets onto the disk, shard by shard; knows no pools, queries or model."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from twn_rl.data.record import Item
from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.sharded_pass import PLAN_FILE
from twn_rl.runtime.whole_files import map_file, read_json, write_array, write_json

logger = logging.getLogger(__name__)

NORM_TOLERANCE = 1e-2  # bfloat16 rounds the length of a unit vector by less than this

Encode = Callable[[list[Item]], Tensor]


class BankError(ValueError):
    """A bank that is missing, incomplete or damaged, or targets that cannot be stored."""


class ScorerMismatchError(BankError):
    """A bank whose vectors come from another scorer than the one asked for."""


class BankBuilder:
    """One build: which shards are missing, who embeds them, and how they become the bank."""

    def __init__(
        self,
        directory: Path,
        items: list[Item],
        encode: Encode,
        plan: dict[str, Any],
        batch_size: int,
        processes: Processes | None,
        show_progress_bar: bool,
    ) -> None:
        self.directory, self.items, self.encode, self.plan = directory, items, encode, plan
        self.processes = processes
        self.index = processes.process_index if processes else 0
        self.count = processes.num_processes if processes else 1
        self.batch_size, self.shard_size = batch_size, plan["shard_size"]
        self.num_shards = -(-len(items) // self.shard_size)
        self.shows_progress = show_progress_bar and is_main(processes)

    def run(self, ids: list[str], pool_rows: dict[str, list[int]]) -> None:
        """Embed what is missing, then write the bank; every process calls this."""
        if self.index == 0:
            self._prepare()
        wait(self.processes)
        missing = [shard for shard in range(self.num_shards) if self._read(shard) is None]
        if len(missing) < self.num_shards:
            logger.info("going on: %d of %d shards missing", len(missing), self.num_shards)
        wait(self.processes)  # all have listed before the first new shard appears
        self._encode_shards(missing)
        wait(self.processes)
        if self.index == 0:
            self._assemble(ids, pool_rows)
        wait(self.processes)

    def _prepare(self) -> None:
        # The old bank stops existing before its files are touched.
        (self.directory / "meta.json").unlink(missing_ok=True)
        shards = self.directory / "shards"
        if shards.exists() and read_json(shards / PLAN_FILE) != self.plan:
            shutil.rmtree(shards)
        shards.mkdir(parents=True, exist_ok=True)
        write_json(shards / PLAN_FILE, self.plan)

    def _encode_shards(self, missing: list[int]) -> None:
        rounds = -(-len(missing) // self.count)
        steps = -(-min(self.shard_size, len(self.items)) // self.batch_size)
        with tqdm(
            total=rounds * steps, desc="target bank", unit="batch", disable=not self.shows_progress
        ) as bar:
            for first in range(0, rounds * self.count, self.count):
                mine = first + self.index
                shard = missing[mine] if mine < len(missing) else None
                start = 0 if shard is None else shard * self.shard_size
                items = [] if shard is None else self.items[start : start + self.shard_size]
                parts = []
                for step in range(steps):
                    batch = items[step * self.batch_size : (step + 1) * self.batch_size]
                    if batch:
                        parts.append(self._encode(batch, start + step * self.batch_size))
                    elif self.count > 1:
                        self.encode(self.items[:1])  # keeps collective calls in step
                    bar.update()
                if shard is not None:
                    write_array(self._path(shard), np.concatenate(parts))

    def _encode(self, batch: list[Item], start: int) -> np.ndarray:
        with torch.no_grad():
            vectors = self.encode(batch).detach().to("cpu", torch.float32).numpy()
        if vectors.ndim != 2 or len(vectors) != len(batch):
            raise BankError(
                f"encode returned shape {vectors.shape} for {len(batch)} items, expected "
                f"({len(batch)}, D); return one vector per item"
            )
        check_finite(vectors, start, "encode")
        norms = np.linalg.norm(vectors, axis=1)
        worst = int(np.abs(norms - 1).argmax())
        if abs(norms[worst] - 1) > NORM_TOLERANCE:
            raise BankError(
                f"encode returned length {norms[worst]:.4g} for the vector of target "
                f"{start + worst}, expected 1: similarities are cosines; L2-normalise the vectors"
            )
        return vectors

    def _path(self, shard: int) -> Path:
        return self.directory / "shards" / f"{shard:06d}.npy"

    def _read(self, shard: int) -> np.ndarray | None:
        rows = min(self.shard_size, len(self.items) - shard * self.shard_size)
        vectors = map_file(self._path(shard), (rows, None))
        return vectors if vectors is not None and np.isfinite(vectors).all() else None

    def _assemble(self, ids: list[str], pool_rows: dict[str, list[int]]) -> None:
        shards = [self._read(shard) for shard in range(self.num_shards)]
        lost = [number for number, shard in enumerate(shards) if shard is None]
        if lost:
            raise BankError(
                f"bank {self.directory} lacks shards {lost}, expected all after "
                "embedding; give every process the same directory"
            )
        parts = [shard for shard in shards if shard is not None]
        write_array(self.directory / "embeddings.npy", parts)
        write_json(self.directory / "targets.json", {"ids": ids, "pools": pool_rows})
        meta = {**self.plan, "rows": len(ids), "width": parts[0].shape[1]}
        write_json(self.directory / "meta.json", meta)
        shutil.rmtree(self.directory / "shards")


def check_finite(vectors: np.ndarray, start: int, source: str) -> None:
    """Raise `BankError` if a row holds NaN or infinity; `start` is the first row's number."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise BankError(
            f"{source}: vectors of targets {(bad[:5] + start).tolist()} ({len(bad)} in this batch) "
            "hold NaN or infinity, expected finite numbers; check the scorer's precision, then "
            "build with rebuild=True"
        )
