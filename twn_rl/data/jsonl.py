"""Rows of JSON lines, read from start to end or again at the byte where one starts."""

import os
import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from twn_rl.data.record import RecordError
from twn_rl.runtime.reading import decode_json, regular_file

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
        """Return the row at a place that `scan` gave.

        Raises:
            RecordError: If the file is no longer the one that was scanned.
        """
        ...


class JsonLines:
    """The rows of a `.jsonl` file; a place is the byte a line starts at."""

    def __init__(self, path: Path) -> None:
        """Note the state of the file, so that a later change shows.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is no regular file.
        """
        self.path = regular_file(path)
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
        return _parse(line.partition(b"\n")[0], is_strict=False)  # `scan` has looked


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


def parse_json(text: str | bytes, *, field: str | None, is_strict: bool = True) -> Any:
    """Return the value of a JSON text, or the RecordError that says why there is none.

    `is_strict` looks for keys that are there twice.
    """
    try:
        return decode_json(text, is_strict=is_strict)
    except ValueError as error:
        return RecordError(
            f"no valid JSON ({error}); expected one object without NaN or Infinity; correct it",
            reason="bad_json",
            field=field,
        )


def _parse(line: bytes, *, is_strict: bool = True) -> Row:
    return parse_json(line.removeprefix(_BYTE_ORDER_MARK), field=None, is_strict=is_strict)
