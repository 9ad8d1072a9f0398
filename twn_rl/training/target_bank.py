"""Target vectors on disk, embedded once; knows no query, no reward and no model.

Layout of the folder: `embeddings.npy` (M, D), float32 or the bits of bfloat16, `targets.json` (ids
and pools) and, written last, `meta.json`: without it the bank does not exist. While it is being
built, `shards/` holds one file per finished shard, so that a killed build goes on where it stopped.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.sharded_pass import ShardedPass, make_shards
from twn_rl.runtime.whole_files import (
    digest,
    file_digest,
    map_file,
    read_json,
    write_array,
    write_json,
)
from twn_rl.training.bank_pass import Encode, Prepare, ShardEncoder, read_shard
from twn_rl.training.bank_rows import FILE_TYPES, BankError, check_finite, from_stored

BANK_FORMAT = 1
ROWS_PER_CHECK = 65_536


class ScorerMismatchError(BankError):
    """A bank whose vectors come from another scorer than the one asked for."""


class TargetBank:
    """The vectors of all targets, memory-mapped, with their ids and pools.

    Attributes:
        directory: Folder of the bank; all processes must see the same one.
        ids: Content keys of the M distinct targets, in bank order.
        row_of: Id to row.
        pools: Pool name to its sorted rows, int64. A target may be in several pools.
        embeddings: (M, D) unit vectors, memory-mapped: float32, or bfloat16 as its bits in uint16.
        fingerprint: The scorer that made them.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.ids: list[str] = []
        self.row_of: dict[str, int] = {}
        self.pools: dict[str, np.ndarray] = {}
        self.embeddings: np.ndarray = np.empty((0, 0), dtype=np.float32)
        self.fingerprint = ""
        self._kept: Tensor | None = None
        self._kept_rows = range(0)

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
        dtype: str = "float32",
        prepare: Prepare | None = None,
        num_workers: int = 0,
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
            encode: Batch of items, or what `prepare` made of it, to (n, D) unit vectors, without
                gradient, on any device.
            fingerprint: Names the scorer, see `Fingerprints.vectors`.
            batch_size: Items per call of `encode`.
            pools: Name of the pool of each item; `None` puts all into one pool named "".
            data_root: Folder that relative image paths start from.
            shard_size: Items between two writes; a kill loses at most one shard per process.
            dtype: "float32", or "bfloat16" for half of the disk and memory.
            prepare: Opens and collates a batch of items; None hands the items to `encode`.
            num_workers: Processes that prepare batches ahead; 0 prepares in this one.
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
            **({} if dtype == "float32" else {"dtype": dtype}),
        }
        stored = None if rebuild else read_json(self.directory / "meta.json")
        if stored is not None and stored["fingerprint"] != fingerprint:
            raise ScorerMismatchError(
                f"bank {self.directory} was built by scorer {stored['fingerprint'][:12]}, expected "
                f"{fingerprint[:12]}; pass rebuild=True to embed {len(first_of)} targets anew, or "
                "use another directory"
            )
        same = {**plan, "dtype": plan.get("dtype")}
        if stored is not None and all(stored.get(key) == value for key, value in same.items()):
            return self.open()
        work = ShardedPass(
            self.directory / "shards", plan, len(first_of), shard_size, error=BankError
        )
        with work.opened(rebuild=not work.is_planned(), processes=processes):
            ranges = enumerate(work.ranges)
            missing = {n: rows for n, rows in ranges if read_shard(work, n, dtype) is None}
            if is_main(processes):  # a bank that was there stops existing
                (self.directory / "meta.json").unlink(missing_ok=True)
            shard = ShardEncoder(
                *(work, missing, [items[row] for row in first_of.values()], encode),
                batch_size=batch_size,
                dtype=dtype,
                prepare=prepare,
                num_workers=num_workers,
                processes=processes,
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
                self._assemble(work, list(first_of), pool_rows, dtype)
        wait(processes)
        return self.open()

    def _assemble(
        self, work: ShardedPass, ids: list[str], pool_rows: dict[str, list[int]], dtype: str
    ) -> None:
        shards = [read_shard(work, number, dtype) for number in range(len(work.ranges))]
        parts = [shard for shard in shards if shard is not None]
        if len(parts) < len(shards):
            lost = [number for number, shard in enumerate(shards) if shard is None]
            raise BankError(
                f"bank {self.directory} lacks shards {lost}, expected all after "
                "embedding; give every process the same directory"
            )
        write_array(self.directory / "embeddings.npy", parts, FILE_TYPES[dtype])
        write_json(self.directory / "targets.json", {"ids": ids, "pools": pool_rows})
        checksum = 0
        for part in parts:
            checksum = crc32(np.ascontiguousarray(part, dtype=FILE_TYPES[dtype]).data, checksum)
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
        file_type = FILE_TYPES[meta.get("dtype", "float32")]
        embeddings = map_file(self.directory / "embeddings.npy", shape, file_type, mode="c")
        if targets is None or embeddings is None or len(targets["ids"]) != meta["rows"]:
            raise BankError(
                f"bank {self.directory} is damaged, expected embeddings.npy of shape {shape} and "
                "as many ids in targets.json; build it with rebuild=True"
            )
        checksum = 0
        for start in range(0, len(embeddings), ROWS_PER_CHECK):
            rows = embeddings[start : start + ROWS_PER_CHECK]
            check_finite(rows, range(start, start + len(rows)), str(self.directory))
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
        self._kept = None
        return self

    def keep(self, device: torch.device | str, rows: range | None = None) -> "TargetBank":
        """Keep a copy of some rows (None: all) in memory on `device`; products read no file then.

        Takes the bank's own type: 2 or 4 bytes a number. Other rows are read from the file.
        """
        self._kept_rows = range(len(self)) if rows is None else rows
        part = self.embeddings[self._kept_rows.start : self._kept_rows.stop]
        self._kept = from_stored(np.array(part)).to(device)
        return self

    def rows(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """Return vectors (len(rows), D) float32 on `device`, as a copy."""
        kept = self._kept_rows
        if self._kept is not None and len(rows) and rows.min() in kept and rows.max() in kept:
            index = torch.from_numpy(rows - kept.start).to(self._kept.device)
            return self._kept[index].to(device).float()
        return from_stored(self.embeddings[rows]).to(device).float()

    def block(self, rows: range, device: torch.device) -> Tensor:
        """Return neighbouring vectors (len(rows), D) float32 on `device`; not to be written to.

        Rows that are kept there as float32, or stored so for the CPU, are not copied.
        """
        kept = self._kept_rows
        if self._kept is not None and rows.start in kept and rows[-1] in kept:
            part = self._kept[rows.start - kept.start : rows.stop - kept.start]
        else:
            part = from_stored(self.embeddings[rows.start : rows.stop])
        return part.to(device).float()


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
