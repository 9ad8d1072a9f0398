"""Files of training records: read, verified, written.

JSON lines (`.jsonl`) and Parquet (`.parquet`) hold one record a row: `id`, `source`, `query`,
`positive`, `negatives`, `query_cot`, `positive_cot`, `metadata`; an item is `instruction`, `text`,
`images`, `video`. Image paths are relative to the data root. Remote images are never fetched.
"""

import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, Literal, TypeVar, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from twn_rl.data.images import ImageSource, resolve_inside
from twn_rl.data.jsonl import JsonLines, RowFile
from twn_rl.data.record import Record, RecordError, bad_file
from twn_rl.data.verification import RecordChecks
from twn_rl.runtime.whole_files import write_json_lines, written_aside

T = TypeVar("T")
_PROGRESS_AFTER_SECONDS = 5.0


class RecordSet(Sequence[Record]):
    """Verified records with absolute image paths, 8 bytes of memory each: all else stays on disk.

    Each access reads the row again, so a record that is used often is worth keeping. A set can be
    pickled for other processes, which must see the same file.

    Attributes:
        data_root: Folder that holds every image.
        skipped: How many rows were left out, by reason.
        skipped_rows: Row number and message of each row left out.
        errors: The error of each row left out.
        metadata_fields: How many rows kept each unknown top-level field in their metadata.
    """

    def __init__(
        self,
        rows: RowFile,
        places: NDArray[np.int64],
        *,
        data_root: Path,
        skipped_rows: Sequence[tuple[int, RecordError]] = (),
        metadata_fields: Mapping[str, int] | None = None,
    ) -> None:
        """Hold the places of the rows that `load_records` has verified."""
        self._rows, self._places, self.data_root = rows, places, data_root
        self.skipped = Counter(error.reason for _, error in skipped_rows)
        self.skipped_rows = [(row, str(error)) for row, error in skipped_rows]
        self.errors = [error for _, error in skipped_rows]
        self.metadata_fields = Counter(metadata_fields or {})

    def __len__(self) -> int:
        """Return the number of usable records."""
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "RecordSet": ...
    def __getitem__(self, index: int | slice) -> "Record | RecordSet":
        """Return a record with image paths, or a set of the records of a slice.

        Raises:
            RecordError: If the file has changed since it was verified.
        """
        if isinstance(index, slice):
            return RecordSet(self._rows, self._places[index], data_root=self.data_root)
        row, root = self._rows.read(int(self._places[index])), str(self.data_root)
        try:
            if isinstance(row, RecordError):
                raise row
            return Record.from_dict(row).with_paths(lambda name: _resolved(name, root))
        except RecordError as error:
            raise error.at(file=self._rows.path) from error

    def load(self, index: int) -> Record:
        """Return record `index` with every picture opened as an RGB image.

        Raises:
            ImageError: If a picture has been removed or damaged since it was verified.
        """
        return self[index].load(self.data_root)


@lru_cache(maxsize=65_536)
def _resolved(name: str, data_root: str) -> str:
    # A picture that has gone since is for whoever opens it to report.
    return str(resolve_inside(name, data_root, must_exist=False))


def load_records(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    on_bad_record: Literal["raise", "skip"] = "raise",
    limit: int | None = None,
    workers: int = 0,
) -> RecordSet:
    """Return the verified records of a `.jsonl` or `.parquet` file.

    Fields and types are checked, every path must stay inside the data root, each distinct image is
    decoded once, and a positive that is also listed as a negative is refused.

    Args:
        path: File to read.
        data_root: Folder that image paths are relative to; the folder of `path` when None.
        on_bad_record: "raise" stops at a bad row; "skip" leaves it out, counted in `skipped`.
        limit: Read at most this many rows; None reads all.
        workers: Processes that decode images; 0 decodes in threads of this process.

    Raises:
        RecordError: For a bad row under "raise"; for a file of another kind; when no row is usable.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    if on_bad_record not in ("raise", "skip"):
        raise ValueError(
            f"on_bad_record = {on_bad_record!r}; expected 'raise' or 'skip'; change it"
        )
    root = (path.parent if data_root is None else Path(data_root)).resolve()
    check = RecordChecks(path, root, is_strict=on_bad_record == "raise")
    rows = _open_rows(path)
    places, numbers, total = array("q"), array("q"), 0
    illustrated = array("q")  # positions whose pictures must be decoded before they are judged
    for number, place, data in _progress(islice(rows.scan(), limit), f"Reading {path.name}"):
        total += 1
        record = check.parse(number, data)
        has_pictures = record is not None and any(i.images or i.video for i in record.items())
        if record is not None and (has_pictures or check.is_trainable(number, record)):
            if has_pictures:
                illustrated.append(len(places))
            places.append(place)
            numbers.append(number)
    check.decode_images(workers=workers)
    is_usable = np.ones(len(places), dtype=bool)
    for position in _progress(illustrated, f"Verifying {path.name}"):
        record = check.parse_again(rows.read(places[position]))
        is_usable[position] = check.is_trainable(numbers[position], record)
    check.report(usable=int(is_usable.sum()), total=total)
    return RecordSet(
        rows,
        np.array(places, dtype=np.int64)[is_usable],
        data_root=root,
        skipped_rows=sorted(check.skipped, key=lambda pair: pair[0]),
        metadata_fields=check.metadata_fields,
    )


def _progress(rows: Iterable[T], label: str) -> Iterable[T]:
    return tqdm(rows, desc=label, unit="row", delay=_PROGRESS_AFTER_SECONDS, disable=None)


def write_records(
    path: str | Path, records: Iterable[Record], *, data_root: str | Path | None = None
) -> None:
    """Write records as `.jsonl` or `.parquet`; the file appears whole or not at all.

    In Parquet, `metadata` is a column of JSON text, because its shape differs between records.

    Args:
        path: File to write; its suffix chooses the format.
        records: Records whose images are paths, relative to the data root or absolute inside it.
        data_root: Folder that written paths are relative to; the folder of `path` when None.

    Raises:
        RecordError: For an opened image instead of a path, an absolute path outside the data root,
            or metadata that JSON cannot hold; the message names the record.
    """
    path = Path(path)
    root = (path.parent if data_root is None else Path(data_root)).resolve()
    write_rows(path, (_row(record, root) for record in records))


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as `writable_row` makes them; the file appears whole or not at all."""
    if _is_parquet(path):
        from twn_rl.data.parquet import write_parquet

        with written_aside(path) as aside:
            write_parquet(aside, rows)
    else:
        write_json_lines(path, rows)


def _is_parquet(path: Path) -> bool:
    if path.suffix not in (".jsonl", ".parquet"):
        raise bad_file(
            path,
            f"suffix = {path.suffix!r}; expected .jsonl or .parquet; convert or rename the file",
        )
    return path.suffix == ".parquet"


def _open_rows(path: Path) -> RowFile:
    if not _is_parquet(path):
        return JsonLines(path)
    from twn_rl.data.parquet import ParquetRows

    return ParquetRows(path)


def _row(record: Record, root: Path) -> dict[str, Any]:
    try:
        return writable_row(record, root)
    except RecordError as error:
        raise RecordError(
            f"record {record.id!r}: {error.detail}", reason=error.reason, field=error.field
        ) from error


def writable_row(record: Record, data_root: Path) -> dict[str, Any]:
    """Return the JSON-ready row of a record, as `load_records` would accept it.

    Raises:
        RecordError: As of `write_records`.
    """
    row = record.map_items(lambda i: i.map_sources(lambda s: _relative(s, data_root))).to_dict()
    Record.from_dict(row)
    try:
        json.dumps(row["metadata"], allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"JSON cannot hold it ({error}); expected strings, finite numbers, booleans, null, "
            "lists and objects; convert the value",
            reason="bad_type",
            field="metadata",
        ) from error
    return row


def _relative(source: ImageSource, root: Path) -> str:
    if isinstance(source, Image.Image):
        raise RecordError(
            "an image is an opened picture; expected a path; save the picture under the data root "
            "and write its path",
            reason="bad_type",
            field="images",
        )
    path = (root / source).resolve()
    if not path.is_relative_to(root):
        raise RecordError(
            f"image = {str(source)!r} leads outside the data root {str(root)!r}; expected a file "
            "inside it; copy the file there or pass a wider data_root",
            reason="path_outside_root",
            field="images",
        )
    return path.relative_to(root).as_posix() if Path(source).is_absolute() else str(source)
