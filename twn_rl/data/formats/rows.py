"""Rows of local files, one by one: JSON lists and lines, Parquet, Arrow. Knows no format."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from twn_rl.data.formats.extras import import_extra
from twn_rl.data.formats.layout import DataFile
from twn_rl.data.jsonl import parse_json
from twn_rl.data.record import RecordError

# Rows of Parquet may hold pictures of some megabytes each.
_BATCH_ROWS = 64
_GAP = re.compile(r"\s*(,?)\s*")


class Row(NamedTuple):
    """One row of an input file.

    Attributes:
        file: File it stands in.
        number: 1-based row (line) in that file.
        subset: Name of the subset the file belongs to.
        position: 1-based row among all rows of that subset, over all its files.
        data: The row, or what kept it from being parsed.
    """

    file: Path
    number: int
    subset: str
    position: int
    data: Mapping[str, Any] | RecordError

    @property
    def name(self) -> str:
        """An id for rows whose format has none."""
        return f"{self.subset}/{self.position}"


def read_rows(files: Iterable[DataFile]) -> Iterator[Row]:
    """Yield the rows of all files in order; `position` counts on over the files of a subset.

    Raises:
        RecordError: For a file that cannot be read on, as a damaged one.
    """
    counters: dict[str, Iterator[int]] = {}
    for file in files:
        counter = counters.setdefault(file.subset, count(1))
        for number, data in _read(file.path):
            if not isinstance(data, dict | RecordError):
                data = RecordError(
                    f"row = {data!r:.80} of type {type(data).__name__}; expected an object with "
                    "named fields; correct the row",
                    reason="bad_type",
                )
            yield Row(file.path, number, file.subset, next(counter), data)


def count_rows(path: Path) -> int:
    """Return the number of rows of a file, by reading it."""
    return sum(1 for _ in _read(path))


def _read(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield 1-based row numbers (lines of JSON lines) with rows, or with what is wrong with one."""
    if path.suffix in (".parquet", ".arrow"):
        room = import_extra(
            "twn_rl.data.parquet", package="pyarrow", extra="eval", purpose=f"{path.suffix} files"
        )
        yield from enumerate(room.read_table(path, batch_rows=_BATCH_ROWS), start=1)
    elif path.suffix == ".jsonl" or not _is_list(path):
        # Files of JSON lines are often named .json.
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield number, parse_json(line.removeprefix(b"\xef\xbb\xbf"), field=None)
    else:
        yield from enumerate(read_list(path), start=1)


def _is_list(path: Path) -> bool:
    with path.open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[")


def read_list(path: Path, *, chunk_characters: int = 1 << 20) -> Iterator[Any]:
    """Yield the members of a file with one JSON list, holding a chunk of its text at a time.

    Raises:
        RecordError: Where the text is no JSON: unlike a bad line, it hides all that follows.
    """
    decoder = json.JSONDecoder()
    try:
        with path.open(encoding="utf-8-sig") as file:
            text, size, is_first = file.read(chunk_characters), chunk_characters, True
            at = text.index("[") + 1
            while True:
                gap = _GAP.match(text, at)
                start = gap.end() if gap else at
                has_comma = bool(gap and gap[1])
                if text[start : start + 1] == "]" and not has_comma:
                    _refuse_rest(path, text[start + 1 :] + file.read(chunk_characters))
                    return
                member, end = _decode(decoder, text, start)
                # What reaches the end of the chunk may be cut off; the comma may be still to come.
                if end is None or end == len(text):
                    more = file.read(size)
                    if more:
                        text, at, size = text[at:] + more, 0, size * 2
                        continue
                if end is None or has_comma == is_first:
                    raise _broken(path, f"near {text[start : start + 40]!r}")
                yield member
                at, size, is_first = end, chunk_characters, False
    except UnicodeDecodeError as error:
        raise _broken(path, str(error)) from error


def _decode(decoder: json.JSONDecoder, text: str, start: int) -> tuple[Any, int | None]:
    try:
        return decoder.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return None, None


def _refuse_rest(path: Path, rest: str) -> None:
    if rest.strip():
        raise _broken(path, f"the list has ended but {rest.strip()[:40]!r} follows")


def _broken(path: Path, what: str) -> RecordError:
    return RecordError(
        f"no valid JSON list ({what}); expected [ rows divided by commas ]; write the file again",
        reason="bad_file",
        file=path,
    )
