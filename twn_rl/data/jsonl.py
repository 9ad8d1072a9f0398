"""Records that stay in their file: where each row lies, and how one is read again when asked for.

Knows nothing of what makes a record usable; `records` keeps the places of those that are.
"""

import json
import os
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.images import ImageError, ImageSource, resolve_inside
from twn_rl.data.record import Item, Record, RecordError

_BLOCK_BYTES = 8192
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = Mapping[str, Any] | RecordError


class RowFile(Protocol):
    """A file of rows, read from start to end or one at a place; survives pickling."""

    path: Path

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        """Yield 1-based row number, place, and the parsed row or what is wrong with it."""
        ...

    def read(self, place: int) -> Row:
        """Return the row at a place that `scan` gave."""
        ...


class StoredRecords(Sequence[Record]):
    """Verified records of a file, 8 bytes of memory each; every access reads the row again."""

    def __init__(self, rows: RowFile, places: NDArray[np.int64], data_root: Path) -> None:
        """Hold the places of the usable rows of a file."""
        self._rows, self._places, self._data_root = rows, places, data_root

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "StoredRecords": ...
    def __getitem__(self, index: int | slice) -> "Record | StoredRecords":
        """Return a record with absolute image paths, or the records of a slice.

        Raises:
            RecordError: If the file has changed since it was verified.
        """
        if isinstance(index, slice):
            return StoredRecords(self._rows, self._places[index], self._data_root)
        row = self._rows.read(int(self._places[index]))
        try:
            if isinstance(row, RecordError):
                raise row
            root = str(self._data_root)
            return with_absolute_paths(Record.from_dict(row), lambda name: _resolved(name, root))
        except RecordError as error:
            raise RecordError(
                error.detail, reason=error.reason, field=error.field, file=self._rows.path
            ) from error


class JsonLines:
    """The rows of a `.jsonl` file; a place is the byte a line starts at."""

    def __init__(self, path: Path) -> None:
        """Note the state of the file, so that a later change shows.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        self.path = path
        self._signature = file_signature(path.stat())
        self._descriptor: int | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open file behind: another process opens its own."""
        return {**self.__dict__, "_descriptor": None}

    def scan(self) -> Iterator[tuple[int, int, Row]]:
        """Yield row numbers, places and rows; blank lines have a number but are no rows."""
        place = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, place, _parse(line)
                place += len(line)

    def read(self, place: int) -> Row:
        """Return the row that starts at byte `place`."""
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        check_unchanged(self.path, self._signature, os.fstat(self._descriptor))
        # pread moves no file position, which forked processes and threads would share.
        line = b""
        while b"\n" not in line:
            block = os.pread(self._descriptor, max(_BLOCK_BYTES, len(line)), place + len(line))
            line += block
            if not block:
                break
        return _parse(line.partition(b"\n")[0])


def file_signature(stat: os.stat_result) -> tuple[int, int]:
    """Return what changes when a file does: its size in bytes, and its time of change in ns."""
    return stat.st_size, stat.st_mtime_ns


def check_unchanged(path: Path, signature: tuple[int, int], stat: os.stat_result) -> None:
    """Refuse a file that is no longer the one that was verified.

    Raises:
        RecordError: If it has changed.
    """
    if file_signature(stat) != signature:
        raise RecordError(
            f"(size, mtime) = {file_signature(stat)}; expected {signature}, as when the file was "
            "verified; load the records again, and write changed data under another name",
            reason="changed_file",
            file=path,
        )


def with_absolute_paths(record: Record, resolve: Callable[[str], str]) -> Record:
    """Return `record` with `resolve` applied to every image path.

    Raises:
        RecordError: If `resolve` raises an ImageError; it names the field.
    """
    resolved: dict[str, str] = {}
    for name, source in sources_of(record):
        try:
            resolved[str(source)] = resolve(str(source))
        except ImageError as error:
            raise RecordError(str(error), reason=error.reason, field=name) from error
    if not resolved:
        return record

    def absolute(item: Item) -> Item:
        return replace(
            item,
            images=tuple(resolved[str(source)] for source in item.images),
            video=tuple(resolved[str(source)] for source in item.video),
        )

    return record.map_items(absolute)


def sources_of(record: Record) -> Iterator[tuple[str, ImageSource]]:
    """Yield the dotted field name and the source of every picture of `record`."""
    for position, item in enumerate(record.items()):
        if not item.images and not item.video:
            continue
        name = ("query", "positive", f"negatives[{position - 2}]")[min(position, 2)]
        for kind, sources in (("images", item.images), ("video", item.video)):
            for i, source in enumerate(sources):
                yield f"{name}.{kind}[{i}]", source


@lru_cache(maxsize=65_536)
def _resolved(name: str, data_root: str) -> str:
    # A picture that has gone since is for whoever opens it to report.
    return str(resolve_inside(name, data_root, must_exist=False))


def parse_json(text: str | bytes, *, field: str | None) -> Any:
    """Return the value of a JSON text, or the RecordError that says why there is none."""
    try:
        return _DECODER.decode(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 as well
        return RecordError(
            f"no valid JSON ({error}); expected one object without NaN or Infinity; correct it",
            reason="bad_json",
            field=field,
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(parse_constant=_refuse_constant)


def _parse(line: bytes) -> Row:
    return parse_json(line.removeprefix(_BYTE_ORDER_MARK), field=None)
