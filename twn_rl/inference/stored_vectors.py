"""Vectors of `vector_files` as a reader sees them, also while they are being made."""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.inference.vector_files import VectorFileError, details_path, read_meta
from twn_rl.runtime.whole_files import map_file

logger = logging.getLogger(__name__)


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


def read_details(path: Path, meta: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the details of every row of `path` that counts, one at a time."""
    meta = meta or read_meta(path) or {"details_bytes": 0}
    left = meta["details_bytes"]
    with details_path(path).open("rb") as file:
        while left > 0 and (line := file.readline()):
            left -= len(line)
            yield json.loads(line)
