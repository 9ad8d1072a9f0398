"""Target vectors on disk, embedded once; knows no query, no reward and no model.

Layout of the folder: `embeddings.npy` (M, D) float32, `targets.json` (ids and pools) and, written
last, `meta.json`: without it the bank does not exist. While it is being built, `shards/` holds one
file per finished shard, so that a killed build goes on where it stopped.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.sharded_pass import Progress, ShardedPass, make_shards
from twn_rl.runtime.whole_files import (
    digest,
    file_digest,
    map_file,
    read_json,
    write_array,
    write_json,
)

BANK_FORMAT = 1
ROWS_PER_CHECK = 65_536
NORM_TOLERANCE = 1e-2  # bfloat16 rounds the length of a unit vector by less than this

Encode = Callable[[list[Item]], Tensor]


class BankError(ValueError):
    """A bank that is missing, incomplete or damaged, or targets that cannot be stored."""


class ScorerMismatchError(BankError):
    """A bank whose vectors come from another scorer than the one asked for."""


class TargetBank:
    """The vectors of all targets, memory-mapped, with their ids and pools.

    Attributes:
        directory: Folder of the bank; all processes must see the same one.
        ids: Content keys of the M distinct targets, in bank order.
        row_of: Id to row.
        pools: Pool name to its sorted rows, int64. A target may be in several pools.
        embeddings: (M, D) float32 unit vectors, read-only and memory-mapped.
        fingerprint: The scorer that made them.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.pools: dict[str, np.ndarray] = {}
        self.embeddings: np.ndarray = np.empty((0, 0), dtype=np.float32)
        self.fingerprint = ""
        self._resident: Tensor | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def build(
        self,
        items: Sequence[Item],
        encode: Encode,
        *,
        fingerprint: str,
        batch_size: int,
        pools: Sequence[str] | None = None,
        data_root: str | Path | None = None,
        shard_size: int = 1024,
        rebuild: bool = False,
        processes: Processes | None = None,
        show_progress_bar: bool = True,
    ) -> "TargetBank":
        """Embed every distinct target once, or reopen what an earlier call left; return self.

        The stored bank is reused if targets, pools and scorer are the same. Other targets are
        embedded anew. With several processes each embeds its share of the shards, and `encode` is
        called equally often on each, as ZeRO-3 needs.

        Args:
            items: Targets; equal content (`Item.content_key`) is embedded once.
            encode: Batch of items to (n, D) unit vectors, without gradient, on any device.
            fingerprint: Names the scorer, see `Fingerprints.vectors`.
            batch_size: Items per call of `encode`.
            pools: Name of the pool of each item; `None` puts all into one pool named "".
            data_root: Folder that relative image paths start from.
            shard_size: Items between two writes; a kill loses at most one shard per process.
            rebuild: Embed anew, whatever is stored.
            processes: An `Accelerator` or `PartialState`; `None` builds alone.
            show_progress_bar: Show batches done, on the main process.

        Raises:
            ScorerMismatchError: If the stored vectors come from another scorer, unless `rebuild`.
            BankError: If the stored bank is damaged, or `encode` returns wrong shapes, values that
                are not finite or vectors that are not of unit length.
        """
        first_of, pool_rows = _distinct(items, pools, data_root)
        plan = {
            "format": BANK_FORMAT,
            "targets_hash": digest([list(first_of), pool_rows]),
            "fingerprint": fingerprint,
        }
        stored = None if rebuild else read_json(self.directory / "meta.json")
        if stored is not None and stored["fingerprint"] != fingerprint:
            raise ScorerMismatchError(
                f"bank {self.directory} was built by scorer {stored['fingerprint'][:12]}, expected "
                f"{fingerprint[:12]}; pass rebuild=True to embed {len(first_of)} targets anew, or "
                "use another directory"
            )
        if stored is not None and all(stored.get(key) == value for key, value in plan.items()):
            return self.open()
        work = ShardedPass(
            self.directory / "shards", plan, len(first_of), shard_size, error=BankError
        )
        with work.opened(rebuild=not work.is_planned(), processes=processes):
            missing = {n: rows for n, rows in enumerate(work.ranges) if _read(work, n) is None}
            if is_main(processes):  # a bank that was there stops existing
                (self.directory / "meta.json").unlink(missing_ok=True)
            is_shared = processes is not None and processes.num_processes > 1
            shard = _ShardEncoder(
                work, [items[row] for row in first_of.values()], encode, batch_size, is_shared
            )
            make_shards(
                missing,
                shard.make,
                description="target bank",
                unit="target",
                num_shards=len(work.ranges),
                idle=shard.idle,
                processes=processes,
                show_progress_bar=show_progress_bar,
            )
            if is_main(processes):
                self._assemble(work, list(first_of), pool_rows)
        wait(processes)
        return self.open()

    def _assemble(self, work: ShardedPass, ids: list[str], pool_rows: dict[str, list[int]]) -> None:
        shards = [_read(work, number) for number in range(len(work.ranges))]
        parts = [shard for shard in shards if shard is not None]
        if len(parts) < len(shards):
            lost = [number for number, shard in enumerate(shards) if shard is None]
            raise BankError(
                f"bank {self.directory} lacks shards {lost}, expected all after "
                "embedding; give every process the same directory"
            )
        write_array(self.directory / "embeddings.npy", parts)
        write_json(self.directory / "targets.json", {"ids": ids, "pools": pool_rows})
        checksum = 0
        for part in parts:
            checksum = crc32(np.ascontiguousarray(part, dtype="<f4").data, checksum)
        meta = {
            **work.plan,
            "rows": len(ids),
            "width": parts[0].shape[1],
            "crc32": checksum,
            "targets": file_digest(self.directory / "targets.json"),
        }
        write_json(self.directory / "meta.json", meta)
        shutil.rmtree(work.folder)

    def open(self, *, fingerprint: str | None = None) -> "TargetBank":
        """Memory-map a finished bank after checking it whole; return self.

        Args:
            fingerprint: Scorer that must have made it; `None` accepts any.

        Raises:
            BankError: If the bank is missing, truncated or holds values that are not finite.
            ScorerMismatchError: If another scorer made it.
        """
        meta = read_json(self.directory / "meta.json")
        if meta is None or meta.get("format") != BANK_FORMAT:
            raise BankError(
                f"bank {self.directory} has no readable meta.json of format {BANK_FORMAT}, "
                "expected a finished bank; build it"
            )
        if fingerprint is not None and meta["fingerprint"] != fingerprint:
            raise ScorerMismatchError(
                f"bank {self.directory} was built by scorer {meta['fingerprint'][:12]}, expected "
                f"{fingerprint[:12]}; build it with rebuild=True"
            )
        targets = read_json(self.directory / "targets.json")
        shape = (meta["rows"], meta["width"])
        embeddings = map_file(self.directory / "embeddings.npy", shape)
        if targets is None or embeddings is None or len(targets["ids"]) != meta["rows"]:
            raise BankError(
                f"bank {self.directory} is damaged, expected embeddings.npy of shape {shape} and "
                "as many ids in targets.json; build it with rebuild=True"
            )
        checksum = 0
        for start in range(0, len(embeddings), ROWS_PER_CHECK):
            rows = embeddings[start : start + ROWS_PER_CHECK]
            _check_finite(rows, start, str(self.directory))
            checksum = crc32(np.ascontiguousarray(rows).data, checksum)
        found = {"crc32": checksum, "targets": file_digest(self.directory / "targets.json")}
        if changed := [name for name in found if meta.get(name, found[name]) != found[name]]:
            raise BankError(
                f"bank {self.directory}: the content of {' and '.join(changed)} has changed since "
                "it was built, expected what meta.json says; build it with rebuild=True"
            )
        self.ids = targets["ids"]
        self.row_of = {target_id: row for row, target_id in enumerate(self.ids)}
        self.pools = {name: np.array(rows) for name, rows in targets["pools"].items()}
        self.embeddings, self.fingerprint = embeddings, meta["fingerprint"]
        self._resident = None
        return self

    def to(self, device: torch.device | str) -> "TargetBank":
        """Keep a copy of all vectors in memory on `device`, so that `rows` reads no file."""
        self._resident = torch.from_numpy(np.array(self.embeddings)).to(device)
        return self

    def rows(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return vectors (len(rows), D) float32 on `device`, as a copy."""
        if self._resident is not None:
            return self._resident[torch.from_numpy(rows).to(self._resident.device)].to(device)
        return torch.from_numpy(self.embeddings[rows]).to(device)


def _distinct(
    items: Sequence[Item], pools: Sequence[str] | None, data_root: str | Path | None
) -> tuple[dict[str, int], dict[str, list[int]]]:
    """Return the first position of each content key, and the bank rows of each pool."""
    if not items or (pools is not None and len(pools) != len(items)):
        raise BankError(
            f"items = {len(items)}, pools = {None if pools is None else len(pools)}, expected at "
            "least one item and one pool name per item; pass matching lists"
        )
    first_of: dict[str, int] = {}
    row_of: dict[str, int] = {}
    members: dict[str, set[int]] = {}
    for position, item in enumerate(items):
        key = item.content_key(data_root)
        first_of.setdefault(key, position)
        row = row_of.setdefault(key, len(row_of))
        members.setdefault("" if pools is None else pools[position], set()).add(row)
    return first_of, {name: sorted(rows) for name, rows in members.items()}


class _ShardEncoder:
    """Embeds shards with the same number of calls for each: ZeRO-3 needs all processes in step."""

    def __init__(
        self,
        work: ShardedPass,
        items: list[Item],
        encode: Encode,
        batch_size: int,
        is_shared: bool,
    ) -> None:
        self.work, self.items, self.encode, self.batch_size = work, items, encode, batch_size
        self.calls = -(-len(work.ranges[0]) // batch_size) if is_shared else 0

    def make(self, number: int, rows: Sequence[int], progress: Progress) -> None:
        """Embed and write one shard."""
        parts = []
        for start in range(0, len(rows), self.batch_size):
            batch = rows[start : start + self.batch_size]
            with torch.no_grad():
                vectors = self.encode([self.items[row] for row in batch])
            parts.append(vectors.detach().to("cpu", torch.float32).numpy())
            _check_vectors(parts[-1], batch)
            progress(len(batch))
        self.idle(self.calls - len(parts))
        write_array(self.work.path(number, ".npy"), np.concatenate(parts))

    def idle(self, calls: int | None = None) -> None:
        """Embed the first item over and over, for nothing."""
        for _ in range(self.calls if calls is None else calls):
            self.encode(self.items[:1])


def _read(work: ShardedPass, number: int) -> np.ndarray | None:
    """Return the vectors of a shard, or None if it is absent or damaged."""
    vectors = map_file(work.path(number, ".npy"), (len(work.ranges[number]), None))
    return vectors if vectors is not None and np.isfinite(vectors).all() else None


def _check_vectors(vectors: np.ndarray, batch: Sequence[int]) -> None:
    """Refuse what `encode` returned for the rows of a batch unless it can be compared by cosine."""
    if vectors.ndim != 2 or len(vectors) != len(batch):
        raise BankError(
            f"encode returned shape {vectors.shape} for {len(batch)} items, expected "
            f"({len(batch)}, D); return one vector per item"
        )
    _check_finite(vectors, batch[0], "encode")
    norms = np.linalg.norm(vectors, axis=1)
    worst = int(np.abs(norms - 1).argmax())
    if abs(norms[worst] - 1) > NORM_TOLERANCE:
        raise BankError(
            f"encode returned length {norms[worst]:.4g} for the vector of target "
            f"{batch[worst]}, expected 1: similarities are cosines; L2-normalise the vectors"
        )


def _check_finite(vectors: np.ndarray, start: int, source: str) -> None:
    """Raise `BankError` if a row holds NaN or infinity; `start` is the first row's number."""
    bad = np.flatnonzero(~np.isfinite(vectors).all(axis=1))
    if len(bad):
        raise BankError(
            f"{source}: vectors of targets {(bad[:5] + start).tolist()} ({len(bad)} in this batch) "
            "hold NaN or infinity, expected finite numbers; check the scorer's precision, then "
            "build with rebuild=True"
        )
