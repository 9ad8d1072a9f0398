"""Vectors of the rows of a file, on disk while they are being made. Knows no model and no items.

`NAME.npy` is (N, D) float32 and has its full size from the start, so that `np.load(mmap_mode="r")`
works at any time and a full disk shows before the first row; rows not yet written are zero.
`NAME.details.jsonl` has one line a row, and `NAME.meta.json`, replaced after every shard, says how
much of both counts. A killed run, or one whose disk filled up, goes on from there, and
anybody may read what there is at any time.
"""

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.inference.vector_meta import (
    VECTORS_FORMAT,
    VectorFileError,
    details_path,
    meta_path,
    read_details,
    read_meta,
)
from twn_rl.runtime.reading import regular_file
from twn_rl.runtime.sharded_pass import differences
from twn_rl.runtime.whole_files import (
    map_file,
    owned,
    write_array_header,
    write_json,
    written_aside,
)

logger = logging.getLogger(__name__)


class VectorWriter:
    """Writes vectors and details shard by shard; opening it again goes on after the last shard.

    Attributes:
        rows: N, rows of the whole file.
        done_rows: Rows that count already.
        counts: What the caller counted over these rows.
    """

    def __init__(
        self,
        path: str | Path,
        shape: tuple[int, int],
        plan: Mapping[str, Any],
        *,
        notes: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        """Open or create the three files; the space of all vectors is reserved.

        Args:
            path: The .npy file.
            shape: N rows of width D.
            plan: JSON-ready; what must be the same for the rows of two runs to fit together.
            notes: JSON-ready; stored and not compared.
            overwrite: Start anew whatever is there.

        Raises:
            VectorFileError: If there are vectors made otherwise, damaged, or being written.
            OSError: If the disk has no room for all vectors.
        """
        self.path, (self.rows, self.width) = Path(path), shape
        if self.path.suffix != ".npy":
            raise VectorFileError(f"output = {str(path)!r}; expected a name in .npy; rename it")
        self._plan: dict[str, Any] = json.loads(json.dumps(dict(plan)))
        self._notes = dict(notes or {})
        self.done_rows, self._details_bytes, self.counts = 0, 0, dict[str, int]()
        with ExitStack() as files:
            files.enter_context(owned(self.path, VectorFileError))
            meta = None if overwrite else read_meta(self.path)
            # A run that failed at its first shard must not stand in the way of a corrected one.
            if self.path.exists() and not overwrite and (meta is None or meta["done_rows"]):
                self._resume(meta)
            else:
                meta_path(self.path).unlink(missing_ok=True)  # stops existing before it is touched
                self._create()
            self._details, self._descriptor = (
                os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                for path in (details_path(self.path), self.path)
            )
            files.callback(os.close, self._details)
            files.callback(os.close, self._descriptor)
            os.ftruncate(self._details, self._details_bytes)  # lines of a shard that never counted
            self._files = files.pop_all()

    def append(
        self,
        vectors: NDArray[np.float32],
        details: Sequence[Mapping[str, Any]],
        counts: Mapping[str, int],
    ) -> None:
        """Add the next shard; it counts when this returns, and not at all if it raises.

        Args:
            vectors: (n, D) rows.
            details: n JSON-ready objects.
            counts: Added to `counts`.
        """
        if vectors.shape != (len(details), self.width) or not len(details):
            raise ValueError(
                f"vectors = {vectors.shape} for {len(details)} details; expected "
                f"({len(details)}, {self.width}) and at least one row; pass one each"
            )
        data = np.ascontiguousarray(vectors, dtype="<f4").tobytes()
        # Not through a memory map: a write that fails there kills the process.
        _write_at(self._descriptor, data, self._header_bytes + 4 * self.width * self.done_rows)
        lines = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in details).encode()
        _write_at(self._details, lines, self._details_bytes)
        self.done_rows += len(details)
        self._details_bytes += len(lines)
        for name, count in counts.items():
            self.counts[name] = self.counts.get(name, 0) + count
        self._write_meta()

    def close(self) -> None:
        """Let go of the files."""
        self._files.close()

    def __enter__(self) -> "VectorWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _create(self) -> None:
        needed = 4 * self.rows * self.width  # and a header
        with written_aside(self.path, needed_bytes=needed) as aside:
            with aside.open("wb") as file:
                write_array_header(file, (self.rows, self.width))
                self._header_bytes = file.tell()
                file.flush()
                os.posix_fallocate(file.fileno(), 0, self._header_bytes + needed)
            self._write_meta()  # before the vectors: a disk that is full now leaves none behind

    def _resume(self, meta: dict[str, Any] | None) -> None:
        if meta is None:
            raise VectorFileError(
                f"{self.path} exists without a readable {meta_path(self.path).name}; expected "
                "none, or vectors this command began; pass --overwrite or another --output"
            )
        if different := differences(meta["plan"], self._plan):
            raise VectorFileError(
                f"{self.path} was begun otherwise: {'; '.join(different)}; expected the same, "
                "else its rows would not fit together; pass --overwrite to make all "
                f"{self.rows} rows anew, or another --output"
            )
        details = details_path(self.path)
        have = details.stat().st_size if details.exists() else 0
        if (
            map_file(self.path, (self.rows, self.width)) is None
            or have < meta["details_bytes"]
            or meta["width"] != self.width
        ):
            raise VectorFileError(
                f"{self.path} or {details.name} is cut short; expected {self.rows} x {self.width} "
                f"vectors and {meta['details_bytes']} bytes of details; pass --overwrite"
            )
        self._header_bytes = self.path.stat().st_size - 4 * self.rows * self.width
        self.done_rows, self.counts = meta["done_rows"], meta["counts"]
        self._details_bytes = meta["details_bytes"]

    def _write_meta(self) -> None:
        content = {
            "format": VECTORS_FORMAT,
            "rows": self.rows,
            "width": self.width,
            "done_rows": self.done_rows,
            "is_complete": self.done_rows == self.rows,
            "details_bytes": self._details_bytes,
            "counts": self.counts,
            "plan": self._plan,
            "notes": self._notes,
        }
        write_json(meta_path(self.path), content, indent=1)


def _write_at(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(descriptor, view, offset)
        view, offset = view[written:], offset + written
    os.fsync(descriptor)


@dataclass(frozen=True)
class StoredVectors:
    """Vectors on disk with what their details say.

    Attributes:
        path: The .npy file.
        vectors: (N, D) float32, memory-mapped.
        ids: N names.
        is_usable: (N,) bool; False for rows that failed or are not written yet.
        failed_rows: How many rows failed.
        unwritten_rows: How many rows are not written yet.
        space: Fingerprint of what made the vectors; None for a foreign file.
    """

    path: Path
    vectors: NDArray[np.float32]
    ids: list[str]
    is_usable: NDArray[np.bool_]
    failed_rows: int
    unwritten_rows: int
    space: str | None


def open_vectors(path: str | Path) -> StoredVectors:
    """Return the vectors of a .npy file; without details and meta the ids are row numbers.

    Raises:
        VectorFileError: If the file is missing or holds no (N, D) float32, or its details are
            damaged.
    """
    path = Path(path)
    try:
        regular_file(path)
    except (ValueError, FileNotFoundError) as error:
        raise VectorFileError(str(error)) from error
    vectors = map_file(path, (None, None))
    if vectors is None or not vectors.size:
        raise VectorFileError(
            f"{path} is no .npy file of (N, D) float32 vectors; expected one that "
            "`twn-rl encode` wrote; check the path"
        )
    meta = read_meta(path)
    if meta is None:
        logger.warning("%s has no meta.json: ids are row numbers, every row counts", path)
        ids = [str(row) for row in range(len(vectors))]
        return StoredVectors(path, vectors, ids, np.ones(len(vectors), bool), 0, 0, None)
    done = meta["done_rows"]
    ids, is_usable = [], np.zeros(len(vectors), dtype=bool)
    for row, line in zip(range(len(vectors)), read_details(path, meta), strict=False):
        ids.append(line["id"])
        is_usable[row] = line["error"] is None
    if len(ids) != done or len(vectors) != meta["rows"]:
        raise VectorFileError(
            f"{details_path(path)} has {len(ids)} rows, {path.name} {len(vectors)}; expected "
            f"{done} and {meta['rows']}; encode again with --overwrite"
        )
    failed = done - int(is_usable.sum())
    ids += [""] * (len(vectors) - done)
    space = meta["plan"].get("model", {}).get("space")
    return StoredVectors(path, vectors, ids, is_usable, failed, len(vectors) - done, space)
