"""Files of training records: read, verified, written.

JSON lines (`.jsonl`) and Parquet (`.parquet`) hold one record a row: `id`, `source`, `query`,
`positive`, `negatives`, `query_cot`, `positive_cot`, `metadata`; an item is `instruction`, `text`,
`images`, `video`. Image paths are relative to the data root. Remote images are never fetched.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twn_rl.data.images import ImageSource, ask_about_images, resolve_inside
from twn_rl.data.jsonl import JsonLines, RowFile, Thoughts
from twn_rl.data.record import Record, RecordError, bad_file
from twn_rl.data.shared_verification import verified_blocks
from twn_rl.data.verification import digests_of
from twn_rl.data.verified_blocks import PictureTable, VerifiedBlock
from twn_rl.runtime.whole_files import write_json_lines, written_aside

if TYPE_CHECKING:
    from twn_rl.runtime.processes import Processes

logger = logging.getLogger(__name__)


class RecordSet(Sequence[Record]):
    """Verified records with absolute image paths; all but 24 bytes of each stays on disk.

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
        findings: "Findings | None",
        *,
        data_root: Path,
        skipped_rows: Sequence[tuple[int, RecordError]] = (),
        metadata_fields: Mapping[str, int] | None = None,
    ) -> None:
        """Hold the places of the rows that `load_records` has verified, and its findings."""
        self._rows, self._places, self.data_root = rows, places, data_root
        self._findings = findings
        self.skipped = Counter(error.reason for _, error in skipped_rows)
        self.skipped_rows = [(row, str(error)) for row, error in skipped_rows]
        self.errors = [error for _, error in skipped_rows]
        self.metadata_fields = Counter(metadata_fields or {})

    def __getstate__(self) -> dict[str, Any]:
        """Leave the findings behind: they may be large, and can be found again."""
        return {**self.__dict__, "_findings": None}

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
            findings = self._findings and self._findings[index]
            return RecordSet(self._rows, self._places[index], findings, data_root=self.data_root)
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

    def digests(self, positions: range) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return `digests_of` consecutive records, as they were when they were verified."""
        if self._findings is None:
            return digests_of(self[position] for position in positions)
        return self._findings.digests(positions)

    def thoughts(self, positions: range) -> Iterator[Thoughts]:
        """Yield the thoughts of consecutive records in the order of the file.

        Raises:
            RecordError: If the file has changed since it was verified.
        """
        places = np.sort(self._places[positions.start : positions.stop])
        return self._rows.thoughts(places)  # pyright: ignore[reportArgumentType]


class Findings:
    """What verification found of the records of a set."""

    def __init__(
        self,
        blocks: Sequence[VerifiedBlock],
        kept: NDArray[np.int64],
    ) -> None:
        """Hold the usable rows of `blocks` that are `kept`, counted over all blocks."""
        self._blocks, self._kept = blocks, kept
        self._starts = np.cumsum([0, *(len(block.places) for block in blocks)])

    def __getitem__(self, part: slice) -> "Findings":
        """Return the findings of a slice of the records."""
        return Findings(self._blocks, self._kept[part])

    def digests(self, positions: range) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return the digests of consecutive records, see `digests_of`."""
        rows = self._kept[positions.start : positions.stop]
        ids, contents = np.empty(len(rows), np.uint64), np.empty((len(rows), 32), np.uint8)
        numbers = np.searchsorted(self._starts, rows, side="right") - 1
        for number in np.unique(numbers):
            here = numbers == number
            inside = rows[here] - self._starts[number]
            ids[here] = self._blocks[number].ids[inside]
            contents[here] = self._blocks[number].contents[inside]
        return ids, contents


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
    sharers: Sequence["Processes"] = (),
) -> RecordSet:
    """Return the verified records of a `.jsonl` or `.parquet` file.

    Fields and types are checked, every path must stay inside the data root, each distinct image is
    decoded once, and a positive that is also listed as a negative is refused. What was found of a
    file that takes long is kept beside it (`NAME.verified`) and believed while the file and its
    pictures are the same.

    Args:
        path: File to read.
        data_root: Folder that image paths are relative to; the folder of `path` when None.
        on_bad_record: "raise" stops at a bad row; "skip" leaves it out, counted in `skipped`.
        limit: Read at most this many rows; None reads all.
        workers: Processes that decode images; 0 decodes in threads of this process.
        sharers: Processes that verify together, see `verified_blocks`; each gets all records.

    Raises:
        RecordError: For a bad row under "raise"; for a file of another kind; when no row is usable.
        FileNotFoundError: If there is no such file.
    """
    path = Path(path)
    is_strict = on_bad_record == "raise"
    if on_bad_record not in ("raise", "skip"):
        raise ValueError(
            f"on_bad_record = {on_bad_record!r}; expected 'raise' or 'skip'; change it"
        )
    root = (path.parent if data_root is None else Path(data_root)).resolve()
    rows = _open_rows(path)
    blocks = verified_blocks(
        rows, root, is_strict=is_strict, limit=limit, workers=workers, sharers=sharers
    )
    places = np.concatenate([np.empty(0, np.int64), *(block.places for block in blocks)])
    repeated = _repeated_ids(rows, places, blocks)
    skipped = _located(rows, [*(pair for block in blocks for pair in block.errors), *repeated])
    if is_strict and skipped:
        raise skipped[0][1]
    kept = np.flatnonzero(~np.isin(places, [place for place, _ in repeated]))
    fields = sum((Counter(block.metadata_fields) for block in blocks), Counter[str]())
    _report(path, skipped, fields, usable=len(kept), total=sum(block.rows for block in blocks))
    pictures = PictureTable(path.parent.resolve())
    for block in blocks:
        pictures.add(block)
    ask_about_images(str(path.absolute()), pictures)
    return RecordSet(
        rows,
        places[kept],
        Findings(blocks, kept),
        data_root=root,
        skipped_rows=skipped,
        metadata_fields=fields,
    )


def _repeated_ids(
    rows: RowFile, places: NDArray[np.int64], blocks: Sequence[VerifiedBlock]
) -> list[tuple[int, RecordError]]:
    """Return place and error of each row whose id an earlier one has."""
    ids = np.concatenate([np.empty(0, np.uint64), *(block.ids for block in blocks)])
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    is_shared = np.zeros(len(ids) + 1, dtype=bool)
    is_shared[1:-1] = ids[1:] == ids[:-1]
    suspects = np.sort(places[order[is_shared[1:] | is_shared[:-1]]]).tolist()
    if not suspects:
        return []
    first: dict[str, int] = {}
    errors = []
    names = (thoughts.id for thoughts in rows.thoughts(suspects))
    for place, number, name in zip(suspects, rows.numbers(suspects), names, strict=True):
        used_in = first.setdefault(name, number)  # hashes may agree where ids do not
        if used_in != number:
            error = RecordError(
                f"id = {name!r} was used in row {used_in}; expected unique ids; rename one or "
                "remove the copy",
                reason="duplicate_id",
                field="id",
            )
            errors.append((place, error))
    return errors


def _located(
    rows: RowFile, errors: Iterable[tuple[int, RecordError]]
) -> list[tuple[int, RecordError]]:
    """Return row numbers and errors that name file and row, in the order of the file."""
    ordered = sorted(errors, key=lambda pair: pair[0])
    numbers = rows.numbers([place for place, _ in ordered])
    return [
        (number, error.at(file=rows.path, row=number))
        for number, (_, error) in zip(numbers, ordered, strict=True)
    ]


def _report(
    path: Path,
    skipped: Sequence[tuple[int, RecordError]],
    metadata_fields: Mapping[str, int],
    *,
    usable: int,
    total: int,
) -> None:
    """Log what was left out and where unknown fields went; refuse a file without records."""
    if metadata_fields:
        logger.info("%s: kept in metadata: %s", path, dict(metadata_fields))
    if skipped:
        counts = dict(Counter(error.reason for _, error in skipped))
        logger.warning(
            "%s: skipped %d of %d rows %s, first: %s",
            *(path, len(skipped), total, counts, skipped[0][1]),
        )
    if not usable:
        first = f"; first problem: {skipped[0][1]}" if skipped else ""
        raise RecordError(
            f"usable records = 0 of {total} rows; expected at least one; correct the file" + first,
            reason="no_records",
            file=path,
        )


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
