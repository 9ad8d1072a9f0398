"""Files of training records: reading, verifying, writing. Knows no models and no chat templates.

JSON lines (`.jsonl`) and Parquet (`.parquet`) hold one record a row: `id`, `source`, `query`,
`positive`, `negatives`, `query_cot`, `positive_cot`, `metadata`; an item is `instruction`, `text`,
`images`, `video`. Image paths are relative to the data root. Remote images are never fetched.
"""

import importlib
import json
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar, overload

import numpy as np
from PIL import Image
from tqdm import tqdm

from twn_rl.data.images import ImageSource
from twn_rl.data.jsonl import JsonLines, RowFile, StoredRecords, sources_of
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.verification import RecordChecks
from twn_rl.runtime.whole_files import write_json_lines, written_aside

T = TypeVar("T")
_PROGRESS_AFTER_SECONDS = 5.0


class RecordSet(Sequence[Record]):
    """Verified records with absolute image paths; neither texts nor images stay in memory.

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
        records: Sequence[Record],
        *,
        data_root: str | Path,
        skipped_rows: Sequence[tuple[int, RecordError]] = (),
        metadata_fields: Mapping[str, int] | None = None,
    ) -> None:
        """Hold records that `load_records` has verified."""
        self._records = records if isinstance(records, StoredRecords) else list(records)
        self.data_root = Path(data_root)
        self.skipped = Counter(error.reason for _, error in skipped_rows)
        self.skipped_rows = [(row, str(error)) for row, error in skipped_rows]
        self.errors = [error for _, error in skipped_rows]
        self.metadata_fields = Counter(metadata_fields or {})

    def __len__(self) -> int:
        """Return the number of usable records."""
        return len(self._records)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "RecordSet": ...
    def __getitem__(self, index: int | slice) -> "Record | RecordSet":
        """Return a record with image paths, or a set of the records of a slice."""
        if isinstance(index, slice):
            return RecordSet(self._records[index], data_root=self.data_root)
        return self._records[index]

    def load(self, index: int) -> Record:
        """Return record `index` with every picture opened as an RGB image.

        Raises:
            ImageError: If a picture has been removed or damaged since it was verified.
        """
        return self._records[index].load(self.data_root)


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
        has_pictures = record is not None and next(sources_of(record), None) is not None
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
        StoredRecords(rows, np.array(places, dtype=np.int64)[is_usable], root),
        data_root=root,
        skipped_rows=sorted(check.skipped, key=lambda pair: pair[0]),
        metadata_fields=check.metadata_fields,
    )


def _progress(rows: Iterable[T], label: str) -> Iterable[T]:
    return tqdm(rows, desc=label, unit="row", delay=_PROGRESS_AFTER_SECONDS)


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
    _check_suffix(path)
    root = (path.parent if data_root is None else Path(data_root)).resolve()
    rows = (_to_row(record, root) for record in records)
    if path.suffix == ".parquet":
        with written_aside(path) as aside:
            _parquet().write_parquet(aside, rows)
    else:
        write_json_lines(path, rows)


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".jsonl", ".parquet"):
        raise RecordError(
            f"suffix = {path.suffix!r}; expected .jsonl or .parquet; convert or rename the file",
            reason="bad_file",
            file=path,
        )


def _parquet() -> ModuleType:
    """Return the Parquet room, which alone needs pyarrow: serving and JSON lines do without."""
    try:
        return importlib.import_module("twn_rl.data.parquet")
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "pyarrow":
            raise
        raise ModuleNotFoundError(
            "module pyarrow is missing; expected it for .parquet files; install pyarrow or use "
            ".jsonl",
            name="pyarrow",
        ) from error


def _open_rows(path: Path) -> RowFile:
    _check_suffix(path)
    return _parquet().ParquetRows(path) if path.suffix == ".parquet" else JsonLines(path)


def _to_row(record: Record, root: Path) -> dict[str, Any]:
    """Return the JSON-ready row of `record`, as `load_records` would accept it."""
    try:
        row = record.map_items(lambda item: _relative_item(item, root)).to_dict()
        Record.from_dict(row)
        json.dumps(row["metadata"], allow_nan=False)
    except RecordError as error:
        raise RecordError(
            f"record {record.id!r}: {error.detail}", reason=error.reason, field=error.field
        ) from error
    except (TypeError, ValueError) as error:
        raise RecordError(
            f"record {record.id!r}: JSON cannot hold it ({error}); expected strings, finite "
            "numbers, booleans, null, lists and objects; convert the value",
            reason="bad_type",
            field="metadata",
        ) from error
    return row


def _relative_item(item: Item, root: Path) -> Item:
    return Item(
        instruction=item.instruction,
        text=item.text,
        images=tuple(_relative(source, root) for source in item.images),
        video=tuple(_relative(source, root) for source in item.video),
    )


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
