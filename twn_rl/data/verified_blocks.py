"""What verification found of the rows of a file, block by block, kept beside the file.

`NAME.verified/PLAN/000000.safetensors` and so on; PLAN names the content of the file and what the
rows were verified by. Nothing of another plan is believed, and no picture whose size or time of
change is another one now. Knows no rules.
"""

from __future__ import annotations

import json
import logging
import mmap
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, fields
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from twn_rl.data.images import ImageFacts
from twn_rl.data.record import RecordError
from twn_rl.runtime.whole_files import digest, file_state, read_json, write_json, written_aside

logger = logging.getLogger(__name__)

STORE_SUFFIX = ".verified"
FORMER_SUFFIX = ".images.cache"  # what lay there before; nothing reads it
# Raise it when rows are judged by other rules: what is stored was judged by the old ones.
RULES = 1
_STATE_FILE = "state.json"
_PLAN_FILE = "plan.json"
_BLOCK_SUFFIX = ".safetensors"
_LOOSE_PARTS = 16
_DTYPES = {"I64": np.int64, "U64": np.uint64, "U8": np.uint8}


@dataclass(frozen=True, eq=False)
class VerifiedBlock:
    """What was found of one block of rows; n of them are usable, and show m distinct pictures.

    Attributes:
        places: (n,) int64, where the usable rows are.
        ids: (n,) uint64, hashes of their ids.
        contents: (n, 32) uint8, sha256 of their contents.
        picture_keys: (m,) uint64, ascending hashes of the names of pictures.
        picture_digests: (m, 32) uint8, sha256 of pixels.
        picture_facts: (m, 4) int64: width, height, size in bytes, time of change in ns.
        names: (bytes,) uint8, names of pictures relative to the folder of the file, one after the
            other.
        name_ends: (m,) int64, where each name ends.
        rows: How many rows there are, good and bad.
        errors: Place and error of each bad row.
        metadata_fields: How many rows kept each unknown field in their metadata.
        is_final: False if the rows must be judged again next time: a picture was at fault, which
            may be mended, or not all rows were looked at.
    """

    places: NDArray[np.int64]
    ids: NDArray[np.uint64]
    contents: NDArray[np.uint8]
    picture_keys: NDArray[np.uint64]
    picture_digests: NDArray[np.uint8]
    picture_facts: NDArray[np.int64]
    names: NDArray[np.uint8]
    name_ends: NDArray[np.int64]
    rows: int
    errors: Sequence[tuple[int, RecordError]] = ()
    metadata_fields: Mapping[str, int] | None = None
    is_final: bool = True

    def name(self, row: int) -> bytes:
        """Return the name of a picture."""
        start = int(self.name_ends[row - 1]) if row else 0
        return self.names[start : int(self.name_ends[row])].tobytes()

    def facts(self, row: int) -> ImageFacts:
        """Return the facts of a picture."""
        return ImageFacts(
            self.picture_digests[row].tobytes().hex(), *map(int, self.picture_facts[row])
        )

    def has_same_pictures(self, folder: Path) -> bool:
        """Return whether each picture has the size and the time of change it had."""
        names, start, parent = self.names.tobytes(), 0, os.fsencode(folder)
        states = self.picture_facts[:, 2:].tolist()
        try:
            for end, state in zip(self.name_ends.tolist(), states, strict=True):
                stat = os.stat(os.path.join(parent, names[start:end]))
                if [stat.st_size, stat.st_mtime_ns] != state:
                    return False
                start = end
        except (OSError, ValueError):
            return False
        return True


def picture_columns(pictures: Mapping[str, ImageFacts], folder: Path) -> dict[str, Any]:
    """Return the columns of a block about pictures, by absolute path."""
    named = sorted((_key(name), name, path) for path, name in _names(pictures, str(folder)))
    facts = [pictures[path] for _, _, path in named]
    digests = b"".join(bytes.fromhex(fact.digest) for fact in facts)
    return {
        "picture_keys": np.array([key for key, _, _ in named], dtype=np.uint64),
        "picture_digests": np.frombuffer(digests, np.uint8).reshape(len(facts), 32),
        "picture_facts": np.array([fact[1:] for fact in facts], dtype=np.int64).reshape(-1, 4),
        "names": np.frombuffer(b"".join(name for _, name, _ in named), np.uint8),
        "name_ends": np.cumsum([len(name) for _, name, _ in named], dtype=np.int64),
    }


def _names(paths: Mapping[str, Any], folder: str) -> Iterator[tuple[str, bytes]]:
    return ((path, os.fsencode(_relative(path, folder))) for path in paths)


def _relative(path: str, folder: str) -> str:
    start = folder.rstrip("/") + "/"
    return path[len(start) :] if path.startswith(start) else os.path.relpath(path, folder)


def _key(name: bytes) -> int:
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


class PictureTable:
    """The pictures of many blocks, found by their absolute paths."""

    def __init__(self, folder: Path) -> None:
        """Hold no block yet; `folder` is the one of the file."""
        self._folder = str(folder)
        self._blocks: list[VerifiedBlock] = []
        # Ascending keys, and where each is: number of a block, row in it.
        self._parts: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []

    def add(self, block: VerifiedBlock) -> None:
        """Know the pictures of a block."""
        count = len(block.picture_keys)
        if not count:
            return
        numbers = np.full(count, len(self._blocks), dtype=np.int32)
        self._blocks.append(block)
        part = block.picture_keys, numbers, np.arange(count, dtype=np.int32)
        self._parts = [*self._parts, part]

    def facts(self, path: str, state: tuple[int, int]) -> ImageFacts | None:
        """Return what was found at this size and time of change, None if nothing was."""
        name = os.fsencode(_relative(path, self._folder))
        key = np.uint64(_key(name))
        if len(self._parts) > _LOOSE_PARTS:
            self._parts = [_merged(self._parts)]
        for keys, numbers, rows in self._parts:
            at = int(np.searchsorted(keys, key))
            while at < len(keys) and keys[at] == key:
                block, row = self._blocks[numbers[at]], int(rows[at])
                if block.name(row) == name:
                    facts = block.facts(row)
                    if facts[3:] == state:
                        return facts
                at += 1
        return None


def _merged(
    parts: Sequence[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]],
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    keys, numbers, rows = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    order = np.argsort(keys, kind="stable")
    return keys[order], numbers[order], rows[order]


class BlockStore:
    """The verified blocks of a file as far as they are stored.

    Attributes:
        folder: Where those of this plan are.
    """

    def __init__(self, file: Path, plan: Mapping[str, Any]) -> None:
        """Look which content the file has; it is read only if it may be another one than stored.

        Args:
            file: The rows.
            plan: What else the rows are judged by, as JSON.
        """
        self._all = file.with_name(f"{file.name}{STORE_SUFFIX}")
        self._state = file_state(file, read_json(self._all / _STATE_FILE))
        self._plan = {"rules": RULES, "sha256": self._state["sha256"], **plan}
        self.folder = self._all / digest(self._plan)[:16]
        self._parent = file.parent.resolve()

    def read(self, number: int, *, is_new: bool = False) -> VerifiedBlock | None:
        """Return a block, memory-mapped, or None if it is absent, damaged or out of date.

        Args:
            number: Of the block.
            is_new: Whether this run made it: whatever it says is then up to date.
        """
        path = self._path(number)
        try:
            block = _map(path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            logger.warning("%s is not usable (%s); its rows are verified again", path, error)
            return None
        is_fresh = is_new or (block.is_final and block.has_same_pictures(self._parent))
        return block if is_fresh else None

    def write(self, number: int, block: VerifiedBlock) -> None:
        """Store a block; where nothing can be written, that costs time at the next start only."""
        arrays = {
            each.name: np.ascontiguousarray(getattr(block, each.name))
            for each in fields(VerifiedBlock)
            if isinstance(getattr(block, each.name), np.ndarray)
        }
        errors = [[place, error.detail, error.reason, error.field] for place, error in block.errors]
        told = {
            "rows": block.rows,
            "errors": errors,
            "metadata_fields": dict(block.metadata_fields or {}),
            "is_final": block.is_final,
        }
        with _going_on(self._all):
            self.folder.mkdir(parents=True, exist_ok=True)
            with written_aside(self._path(number)) as aside:
                aside.write_bytes(save(arrays, {"told": json.dumps(told)}))

    def stored_pictures(self) -> PictureTable:
        """Return the pictures that any plan knows of: they are told apart by size and time."""
        table = PictureTable(self._parent)
        for path in sorted(self._all.glob(f"*/*{_BLOCK_SUFFIX}")):
            with suppress(OSError, ValueError, KeyError, TypeError):
                table.add(_map(path))
        return table

    def keep_only_this(self) -> None:
        """Note which content of the file the blocks are about, and remove those about others."""
        if not self.folder.is_dir():
            return
        notes = {self._all / _STATE_FILE: self._state, self.folder / _PLAN_FILE: self._plan}
        with _going_on(self._all):
            for path, content in notes.items():
                if read_json(path) != content:
                    write_json(path, content)
        for folder in self._all.iterdir():
            plan = read_json(folder / _PLAN_FILE) if folder.is_dir() else self._plan
            if not isinstance(plan, dict) or plan.get("sha256") != self._plan["sha256"]:
                shutil.rmtree(folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}{_BLOCK_SUFFIX}"


@contextmanager
def _going_on(folder: Path) -> Iterator[None]:
    """Log that nothing can be written there, and go on."""
    try:
        yield
    except OSError as error:
        logger.warning("%s cannot be written (%s); the next start verifies again", folder, error)


def _map(path: Path) -> VerifiedBlock:
    """Return a stored block, memory-mapped.

    Raises:
        OSError: If there is none.
        ValueError: If it is damaged; likewise KeyError and TypeError.
    """
    with path.open("rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    told = json.loads(header.pop("__metadata__")["told"])
    arrays = {}
    for name, stored in header.items():
        dtype, shape = np.dtype(_DTYPES[stored["dtype"]]), stored["shape"]
        count = int(np.prod(shape))
        offset = start + stored["data_offsets"][0]
        flat = np.frombuffer(content, dtype, count, offset) if count else np.empty(0, dtype)
        arrays[name] = flat.reshape(shape)
    errors = [
        (place, RecordError(detail, reason=reason, field=field))
        for place, detail, reason, field in told.pop("errors")
    ]
    block = VerifiedBlock(**arrays, **told, errors=errors)
    if not len(block.places) == len(block.ids) == len(block.contents):
        raise ValueError("its columns are of different lengths")
    return block
