"""Rows of JSON lines, read from start to end or again at the byte where one starts."""

import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec

from twn_rl.data.record import RecordError
from twn_rl.runtime.reading import decode_json, regular_file

_READ_BYTES = 8192
_COUNT_BYTES = 1024 * 1024
_BLOCK_BYTES = 8 * 1024 * 1024
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

Row = Mapping[str, Any] | RecordError


class Thoughts(NamedTuple):
    """The thoughts of a record, and its name."""

    id: str
    query_cot: str | None
    positive_cot: str | None


class RowFile(Protocol):
    """A file of rows, read from start to end, in blocks or one at a place; survives pickling.

    Attributes:
        path: The file.
        place_unit: What places count.
    """

    path: Path
    place_unit: str

    def end(self, limit: int | None) -> int:
        """Return the place behind the first `limit` rows, or behind all."""
        ...

    def blocks(self, end: int) -> list[range]:
        """Return the places before `end` in blocks that can be scanned apart from each other."""
        ...

    def scan(self, block: range | None = None) -> Iterator[tuple[int, int, Row]]:
        """Yield number, place, and the parsed row or what is wrong with it.

        Numbers count from 1, in the file or in the block; the rows of a block start in it.
        """
        ...

    def numbers(self, places: Sequence[int]) -> list[int]:
        """Return the 1-based row numbers of places in ascending order."""
        ...

    def thoughts(self, places: Sequence[int]) -> Iterator[Thoughts]:
        """Yield the thoughts of the rows at places of usable records; nothing else is parsed."""
        ...

    def check(self) -> None:
        """Refuse a file that is no longer the one that was opened.

        Raises:
            RecordError: If it has changed.
        """
        ...

    def read(self, place: int) -> Row:
        """Return the row at a place that `scan` gave.

        Raises:
            RecordError: If the file is no longer the one that was scanned.
        """
        ...


class JsonLines:
    """The rows of a `.jsonl` file; a place is the byte a line starts at."""

    place_unit = "B"

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

    def end(self, limit: int | None) -> int:
        """Return the byte behind the first `limit` rows, or behind all."""
        end = self._signature[0]
        if limit is None:
            return end
        place = count = 0
        with self.path.open("rb") as file:
            for line in file:
                if count == limit:
                    return place
                count += bool(line.strip())
                place += len(line)
        return end

    def blocks(self, end: int) -> list[range]:
        """Return the bytes before `end` in blocks of eight megabytes."""
        starts = range(0, end, _BLOCK_BYTES)
        return [range(start, min(start + _BLOCK_BYTES, end)) for start in starts]

    def scan(self, block: range | None = None) -> Iterator[tuple[int, int, Row]]:
        """Yield row numbers, places and rows; blank lines have a number but are no rows."""
        place, end = (0, None) if block is None else (block.start, block.stop)
        with self.path.open("rb") as file:
            if place:  # the line that goes across the start is of the block before
                file.seek(place - 1)
                place += len(file.readline()) - 1
            for number, line in enumerate(file, start=1):
                if end is not None and place >= end:
                    return
                if line.strip():
                    yield number, place, _parse(line)
                place += len(line)

    def read(self, place: int) -> Row:
        """Return the row that starts at byte `place`."""
        return _parse(self._line(place), is_strict=False)  # `scan` has looked

    def numbers(self, places: Sequence[int]) -> list[int]:
        """Return the numbers of the lines that start at ascending `places`."""
        found, number, at = [], 1, 0
        with self.path.open("rb") as file:
            for place in places:
                while at < place:
                    part = file.read(min(_COUNT_BYTES, place - at))
                    if not part:
                        break
                    number, at = number + part.count(b"\n"), at + len(part)
                found.append(number)
        return found

    def thoughts(self, places: Sequence[int]) -> Iterator[Thoughts]:
        """Yield the thoughts of the rows that start at `places`."""
        decode = msgspec.json.Decoder(_ThoughtFields).decode
        for place in places:
            row = decode(self._line(int(place)).removeprefix(_BYTE_ORDER_MARK))
            yield Thoughts(row.id, row.query_cot, row.positive_cot)

    def check(self) -> None:
        """Refuse a file that is no longer the one that was opened."""
        self._open()
        check_unchanged(self.path, self._signature, self.path.stat())

    def _open(self) -> int:
        if self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._descriptor)
        check_unchanged(self.path, self._signature, os.fstat(self._descriptor))
        return self._descriptor

    def _line(self, place: int) -> bytes:
        # pread moves no file position, which forked processes and threads would share.
        line, descriptor = b"", self._open()
        while b"\n" not in line:
            block = os.pread(descriptor, max(_READ_BYTES, len(line)), place + len(line))
            line += block
            if not block:
                break
        return line.partition(b"\n")[0]


class _ThoughtFields(msgspec.Struct):
    id: str
    query_cot: str | None = None
    positive_cot: str | None = None


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
