"""Rows of Parquet and Arrow files; the only file about records that needs pyarrow."""

import json
import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from twn_rl.data.jsonl import Row, Thoughts, check_unchanged, file_signature, parse_json
from twn_rl.data.record import RecordError, bad_file
from twn_rl.runtime.extras import extra
from twn_rl.runtime.reading import regular_file
from twn_rl.runtime.whole_files import written_aside

with extra("eval"):
    import pyarrow as pa
    import pyarrow.parquet as pq

logger = logging.getLogger(__name__)

COPY_SUFFIX = ".rows.arrow"
_SIGNATURE_KEY = b"twn_rl_source"
_IN_MEMORY_BYTES = 32 * 1024 * 1024
_PARQUET_BATCH_ROWS = 1024
_BLOCK_BATCHES = 16
_ITEM = pa.struct(
    {
        "instruction": pa.string(),
        "text": pa.string(),
        "images": pa.list_(pa.string()),
        "video": pa.list_(pa.string()),
    }
)
_SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "source": pa.string(),
        "query": _ITEM,
        "positive": _ITEM,
        "negatives": pa.list_(_ITEM),
        "query_cot": pa.string(),
        "positive_cot": pa.string(),
        "metadata": pa.string(),  # JSON text: its shape differs between records
    }
)


class ParquetRows:
    """The rows of a `.parquet` file; a place is a 0-based row.

    Parquet cannot give one row without decoding thousands. A small file is decoded into memory, a
    large one into an uncompressed Arrow copy beside it, which is memory-mapped and reused while the
    file stays the same.
    """

    place_unit = "row"

    def __init__(self, path: Path) -> None:
        """Note the state of the file, so that a later change shows.

        Raises:
            FileNotFoundError: If there is no such file.
        """
        self.path = regular_file(path)
        self._signature = file_signature(path.stat())
        self._batches: list[pa.RecordBatch] | None = None
        self._starts: list[int] = []

    def __getstate__(self) -> dict[str, Any]:
        """Leave the decoded rows behind: another process opens the file itself."""
        return {**self.__dict__, "_batches": None}

    def end(self, limit: int | None) -> int:
        """Return the number of rows, at most `limit`."""
        with _readable(self.path):
            rows = pq.read_metadata(self.path).num_rows
        return rows if limit is None else min(rows, limit)

    def blocks(self, end: int) -> list[range]:
        """Return the rows before `end` in blocks."""
        size = _BLOCK_BATCHES * _PARQUET_BATCH_ROWS
        return [range(start, min(start + size, end)) for start in range(0, end, size)]

    def scan(self, block: range | None = None) -> Iterator[tuple[int, int, Row]]:
        """Yield row numbers, places and rows.

        Raises:
            RecordError: If the file is damaged or no Parquet.
        """
        number = 0
        for place, batch in self._parts(block):
            with _readable(self.path):
                rows = batch.to_pylist()
            for row, data in enumerate(rows, start=place):
                number += 1
                yield number, row, _parse_metadata(data)

    def numbers(self, places: Sequence[int]) -> list[int]:
        """Return the row numbers, which are places counted from 1."""
        return [place + 1 for place in places]

    def thoughts(self, places: Sequence[int]) -> Iterator[Thoughts]:
        """Yield the thoughts of the rows at ascending `places`; no other column is decoded."""
        wanted = np.asarray(places, dtype=np.int64)
        if not len(wanted):
            return
        for start, batch in self._parts(range(int(wanted[0]), int(wanted[-1]) + 1)):
            first, last = np.searchsorted(wanted, (start, start + batch.num_rows))
            names = [name for name in Thoughts._fields if name in batch.schema.names]
            rows = batch.select(names).take(pa.array(wanted[first:last] - start)).to_pylist()
            yield from (Thoughts(*map(row.get, Thoughts._fields)) for row in rows)

    def check(self) -> None:
        """Refuse a file that is no longer the one that was opened."""
        check_unchanged(self.path, self._signature, self.path.stat())

    def _parts(self, block: range | None) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the first row and the rows of each batch that a block has a part of."""
        batches = self._open()
        rows = self._starts[-1] + batches[-1].num_rows if batches else 0
        start, stop = (0, rows) if block is None else (block.start, min(block.stop, rows))
        while start < stop:
            index = bisect_right(self._starts, start) - 1
            offset = start - self._starts[index]
            part = batches[index].slice(offset, stop - start)
            yield start, part
            start += part.num_rows

    def read(self, place: int) -> Row:
        """Return the row at `place`."""
        batches = self._open()
        index = bisect_right(self._starts, place) - 1
        (data,) = batches[index].slice(place - self._starts[index], 1).to_pylist()
        return _parse_metadata(data)

    def _open(self) -> list[pa.RecordBatch]:
        if self._batches is None:
            check_unchanged(self.path, self._signature, self.path.stat())
            with _readable(self.path):
                self._batches = self._decode()
            lengths = [batch.num_rows for batch in self._batches]
            self._starts = list(accumulate(lengths, initial=0))[:-1]
        return self._batches

    def _decode(self) -> list[pa.RecordBatch]:
        with pq.ParquetFile(self.path) as file:
            groups = range(file.metadata.num_row_groups)
            size = sum(file.metadata.row_group(group).total_byte_size for group in groups)
            if size > _IN_MEMORY_BYTES:
                copy = self.path.with_name(f"{self.path.name}{COPY_SUFFIX}")
                mapped = _map_copy(copy, self._signature)
                if mapped is None and _write_copy(copy, file, self._signature):
                    mapped = _map_copy(copy, self._signature)
                if mapped is not None:
                    return mapped
            return list(file.iter_batches(batch_size=_PARQUET_BATCH_ROWS))


def _map_copy(copy: Path, signature: tuple[int, int]) -> list[pa.RecordBatch] | None:
    """Return the memory-mapped rows of a copy, or None if there is none of this very file."""
    try:
        reader = pa.ipc.open_file(pa.memory_map(str(copy)))
    except (pa.ArrowInvalid, OSError):
        return None
    if (reader.schema.metadata or {}).get(_SIGNATURE_KEY) != str(signature).encode():
        return None
    return [reader.get_batch(index) for index in range(reader.num_record_batches)]


def _write_copy(copy: Path, file: pq.ParquetFile, signature: tuple[int, int]) -> bool:
    """Write the rows uncompressed; return whether that worked."""
    schema = file.schema_arrow.with_metadata({_SIGNATURE_KEY: str(signature).encode()})
    batches = file.iter_batches(batch_size=_PARQUET_BATCH_ROWS)
    total = -(-file.metadata.num_rows // _PARQUET_BATCH_ROWS)
    try:
        with (
            written_aside(copy) as aside,
            pa.OSFile(str(aside), "wb") as sink,
            pa.ipc.new_file(sink, schema) as writer,
        ):
            for batch in tqdm(
                batches, desc=f"Writing {copy.name}", total=total, delay=5.0, disable=None
            ):
                writer.write_batch(batch)
    except OSError as error:
        logger.warning("%s cannot be written (%s); its rows stay in memory", copy, error)
        return False
    return True


def _parse_metadata(data: dict[str, Any]) -> Row:
    if isinstance(data.get("metadata"), str):
        data["metadata"] = parse_json(data["metadata"], field="metadata")
    bad = data.get("metadata")
    return bad if isinstance(bad, RecordError) else data


def read_table(
    path: Path, *, batch_rows: int, columns: Sequence[str] | None = None
) -> Iterator[dict[str, Any]]:
    """Yield the rows of a Parquet file, or of an Arrow stream (`.arrow`), whatever their columns.

    Args:
        path: File to read.
        batch_rows: Rows held in memory at a time; small where cells hold pictures.
        columns: Those of a Parquet file to read, as far as it has them; None reads all.

    Raises:
        RecordError: If the file is damaged or of another kind.
        FileNotFoundError: If there is no such file.
    """
    regular_file(path)
    with _readable(path):
        for batch in _batches_of(path, batch_rows, columns):
            yield from batch.to_pylist()


def num_rows(path: Path) -> int:
    """Return the number of rows of a Parquet file, without reading them.

    Raises:
        RecordError: If the file is damaged or of another kind.
    """
    regular_file(path)
    with _readable(path):
        return pq.read_metadata(path).num_rows


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    # Damaged offsets and lengths of texts show as the last two.
    except (pa.ArrowException, OSError, UnicodeDecodeError, SystemError) as error:
        raise bad_file(
            path,
            f"file is no readable Parquet ({error}); expected a complete file; write it again",
        ) from error


def _batches_of(
    path: Path, batch_rows: int, columns: Sequence[str] | None
) -> Iterator[pa.RecordBatch]:
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as reader:
            for batch in reader:
                for start in range(0, batch.num_rows, batch_rows):
                    yield batch.slice(start, batch_rows)
        return
    with pq.ParquetFile(path) as file:
        yield from file.iter_batches(batch_size=batch_rows, columns=columns)


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the columns of a record; `metadata` becomes JSON text."""
    stored = ({**row, "metadata": json.dumps(row["metadata"])} for row in rows)
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        while batch := list(islice(stored, _PARQUET_BATCH_ROWS)):
            writer.write_table(pa.Table.from_pylist(batch, schema=_SCHEMA))
