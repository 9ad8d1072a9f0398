"""Files of other people's rows, local ones only: which there are, and their rows one by one.

Layouts are those the hub and `datasets` write: `SUBSET/SPLIT-00000-of-00001.parquet`,
`data/SPLIT-*.parquet`, `SUBSET/SPLIT/0000.parquet`, `SPLIT/data-*.arrow`, `SUBSET/SPLIT.jsonl`, and
plain folders of `SUBSET.json`. A file holds JSON lines, a JSON list, Parquet or Arrow.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

from twn_rl.data.jsonl import JsonLines
from twn_rl.data.record import RecordError, bad_file, bad_type
from twn_rl.runtime.reading import RepeatedKeyError, load_yaml, regular_file, unrepeated

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
# Files that datasets and the hub put beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_SPLITS = {"train", "validation", "val", "valid", "dev", "test", "original", "diverse_instruction"}
# Rows of Parquet may hold pictures of some megabytes each.
_BATCH_ROWS = 64
_GAP = re.compile(r"\s*(,?)\s*")


class DataFile(NamedTuple):
    """A file of rows, with the subset and split it belongs to (None: it tells no split)."""

    path: Path
    subset: str
    split: str | None


def find_files(
    path: Path,
    *,
    subset: Sequence[str] = (),
    split: str | None = None,
    any_split: bool = False,
    without: Path | None = None,
) -> list[DataFile]:
    """Return the data files at `path`, a file or a folder, sorted; one split of each subset.

    Args:
        path: File, or folder that is searched with all folders in it.
        subset: Keep these subsets; empty keeps all.
        split: Keep this split; None where every subset has one only.
        any_split: Keep the files of all splits, where `split` is None.
        without: File to leave out, such as an output that lies in the folder.

    Raises:
        RecordError: If nothing fits, a wanted subset is missing, or the split must be chosen.
        FileNotFoundError: If there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"input = {str(path)!r} does not exist; expected a file or folder")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise bad_file(
            path,
            f"suffix = {path.suffix!r}; expected one of {', '.join(SUFFIXES)}; convert the file",
        )
    folder = path if path.is_dir() else path.parent
    paths = (
        [file for file in sorted(path.rglob("*")) if _is_data(file, path) and file != without]
        if path.is_dir()
        else [path]
    )
    everything = [_describe(file, folder) for file in paths]
    files = [file for file in everything if not subset or file.subset in subset]
    _refuse_missing(path, everything, subset)
    if split is not None:
        # A file that tells no split is the caller's own choice when it is named alone.
        accepted = (split, None) if path.is_file() else (split,)
        files = [file for file in files if file.split in accepted]
    if not files:
        raise RecordError(
            f"split = {split!r}: no data files; expected {_splits(everything) or 'none'} in "
            f"{', '.join(SUFFIXES)}; choose a split that is there or another folder",
            reason="no_records",
            file=path,
        )
    for name in () if any_split else {file.subset for file in files}:
        splits = _splits([file for file in files if file.subset == name])
        if len(splits) > 1:
            raise RecordError(
                f"subset = {name!r} has the splits {splits}; expected one; choose it by split",
                reason="ambiguous_split",
                file=path,
            )
    return files


def _describe(path: Path, folder: Path) -> DataFile:
    """Tell subset and split from the names of a file and of the folders it lies in."""
    folders = list(path.relative_to(folder).parts[:-1])
    shard = _SHARD.fullmatch(path.stem)
    stem = shard["split"] if shard else path.stem
    split: str | None = None
    if folders and (stem.isdigit() or (stem == "data" and path.suffix == ".arrow")):
        split = folders.pop()
    elif shard or stem in _SPLITS:
        split = stem
    else:
        folders.append(stem)
    names = [name for name in folders if name not in ("data", "default")]
    return DataFile(path, "/".join(names) or folder.resolve().name, split)


def _is_data(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in parts)
    return (
        path.suffix in SUFFIXES and path.name not in _NOT_DATA and not is_hidden and path.is_file()
    )


def _refuse_missing(path: Path, files: Sequence[DataFile], subset: Sequence[str]) -> None:
    there = sorted({file.subset for file in files})
    missing = [name for name in subset if name not in there]
    if missing:
        raise RecordError(
            f"subset = {missing} not found; expected some of {there}; correct the name",
            reason="no_records",
            file=path,
        )


def _splits(files: Sequence[DataFile]) -> list[str]:
    return sorted({file.split for file in files if file.split is not None})


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
        for number, data in read_file(file.path):
            if not isinstance(data, dict | RecordError):
                data = bad_type(data, "an object with named fields")
            yield Row(file.path, number, file.subset, next(counter), data)


def count_rows(path: Path) -> int:
    """Return the number of rows of a file, by reading it."""
    return sum(1 for _ in read_file(path))


def read_file(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield 1-based row numbers (lines of JSON lines) with rows, or with what is wrong with one."""
    if path.suffix in (".parquet", ".arrow"):
        from twn_rl.data.parquet import read_table

        yield from enumerate(read_table(path, batch_rows=_BATCH_ROWS), start=1)
    elif path.suffix == ".jsonl" or not _is_list(path):  # JSON lines are often named .json
        yield from ((number, data) for number, _, data in JsonLines(path).scan())
    else:
        yield from enumerate(read_list(path), start=1)


def _is_list(path: Path) -> bool:
    with regular_file(path).open("rb") as file:
        start = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    return start.startswith(b"[")


def read_list(path: Path, *, chunk_characters: int = 1 << 20) -> Iterator[Any]:
    """Yield the members of a file with one JSON list, holding a chunk of its text at a time.

    Raises:
        RecordError: Where the text is no JSON: unlike a bad line, it hides all that follows.
    """
    decoder = json.JSONDecoder(object_pairs_hook=unrepeated)
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
    except (UnicodeDecodeError, RepeatedKeyError) as error:
        raise _broken(path, str(error)) from error


def _decode(decoder: json.JSONDecoder, text: str, start: int) -> tuple[Any, int | None]:
    try:
        return decoder.raw_decode(text, start)
    except (json.JSONDecodeError, RecursionError):
        return None, None  # perhaps cut off by the end of the chunk


def _refuse_rest(path: Path, rest: str) -> None:
    if rest.strip():
        raise _broken(path, f"the list has ended but {rest.strip()[:40]!r} follows")


def _broken(path: Path, what: str) -> RecordError:
    return bad_file(
        path,
        f"no valid JSON list ({what}); expected [ rows divided by commas ]; write the file again",
    )


def read_yaml(path: Path, expected: str) -> Any:
    """Return the content of a YAML file.

    Raises:
        RecordError: If it is no YAML; the message says what was expected.
    """
    try:
        return load_yaml(path)
    except ValueError as error:
        raise bad_file(path, f"{error}; expected {expected}") from error


def required(data: Mapping[str, Any], name: str, *, where: str = "") -> Any:
    """Return the value of a field that must be there.

    Raises:
        RecordError: If it is missing or null; the message names the fields that are there.
    """
    value = data.get(name)
    if value is None:
        raise RecordError(
            f"{name} is {'null' if name in data else 'missing'}; expected it beside "
            f"{sorted(map(str, data))}; add it, leave the row out or choose another format",
            reason="missing_field",
            field=f"{where}{name}",
        )
    return value


def first_id(data: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the id under the first of `names` that the row has, as text.

    Raises:
        RecordError: If it has none of them.
    """
    found = [str(value) for name in names if (value := data.get(name)) not in (None, "")]
    if not found:
        raise RecordError(
            f"id is missing; expected one of {', '.join(names)} beside {sorted(map(str, data))}; "
            "add it",
            reason="missing_field",
            field=names[0],
        )
    return found[0]


def text_of(data: Mapping[str, Any], name: str, *, where: str = "") -> str | None:
    """Return a text field, None where it is blank, null or missing.

    Raises:
        RecordError: If it holds something else than text.
    """
    value = data.get(name)
    if not isinstance(value, str | None):
        raise bad_type(value, "text", f"{where}{name}")
    return value if value and value.strip() else None


def as_list(value: Any) -> list[Any]:
    """Return the members of a list, one value as a list of its own, and None as an empty list."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]
