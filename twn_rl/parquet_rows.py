"""Rows of Parquet files, in and out. Knows the columns of a record and nothing of its meaning.

Of the rooms of records the only one that needs pyarrow.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from twn_rl.record_checks import parse_json
from twn_rl.record_schema import RecordError

_PARQUET_BATCH_ROWS = 1024
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


def read_parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any] | RecordError]]:
    """Yield 1-based row numbers with rows, or with what is wrong with the JSON of a row.

    Raises:
        RecordError: If the file is damaged or no Parquet.
        FileNotFoundError: If there is no such file.
    """
    try:
        with pq.ParquetFile(path) as file:
            row = 0
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS):
                for data in batch.to_pylist():
                    row += 1
                    if isinstance(data.get("metadata"), str):
                        data["metadata"] = parse_json(data["metadata"], field="metadata")
                    bad = data.get("metadata")
                    yield row, bad if isinstance(bad, RecordError) else data
    except (pa.ArrowInvalid, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise RecordError(
            f"file is no readable Parquet ({error}); expected a complete file; write it again",
            reason="bad_file",
            file=path,
        ) from error


def write_parquet(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows with the columns of a record; `metadata` becomes JSON text."""
    with pq.ParquetWriter(path, _SCHEMA) as writer:
        for batch in _batches(rows):
            table = [{**row, "metadata": json.dumps(row["metadata"])} for row in batch]
            writer.write_table(pa.Table.from_pylist(table, schema=_SCHEMA))


def _batches(rows: Iterable[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
    iterator = iter(rows)
    while batch := list(islice(iterator, _PARQUET_BATCH_ROWS)):
        yield batch
