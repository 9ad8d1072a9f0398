"""The rows of a file -> a collection, or more rows of one that is there. Knows no search.

Beside the table lie the vectors as `twn-rl encode` writes them, so that a killed run goes on.
"""

from __future__ import annotations

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from twn_rl.inference.collection import (
    COLLECTION_FILE,
    COLLECTION_FORMAT,
    TABLE,
    TAGS,
    Collection,
    CollectionError,
    database,
)
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.encode_file import encode_file, fingerprints
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile, ItemRow
from twn_rl.inference.metadata_filter import tags_of
from twn_rl.inference.vector_files import StoredVectors, open_vectors
from twn_rl.inference.vector_meta import details_path, meta_path
from twn_rl.runtime.whole_files import owned, read_json, write_json

logger = logging.getLogger(__name__)

VECTORS_FILE = "vectors.npy"
ADDED_FILE = "added.npy"  # vectors of rows that are being added; gone once they are in the table
# An exact search of so many rows of width 1024 takes about half a second on one core.
ANN_ROWS = 500_000
_BATCH_ROWS = 4096


def build_collection(
    embedder: ThinkingEmbedder,
    source: ItemFile,
    output: str | Path,
    settings: EncodeSettings | None = None,
    *,
    ann_rows: int = ANN_ROWS,
    is_distinct: bool = False,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> Collection:
    """Return the collection of a file's rows; a killed run goes on where it stopped.

    Args:
        embedder: The model.
        source: Rows; bad ones are left out and counted.
        output: The folder.
        settings: How rows are encoded.
        ann_rows: Build an approximate index from so many rows on.
        is_distinct: Of rows with the same text and pictures keep the first; records share targets.
        overwrite: Make all vectors anew.
        show_progress_bar: Show rows done.

    Raises:
        ValueError: As `encode_file`; also if no row can be found, or if rows were added to the
            collection that is there.
    """
    folder = Path(output)
    with owned(folder, CollectionError):
        folder.mkdir(parents=True, exist_ok=True)
        _keep_added(folder, overwrite=overwrite)
        (folder / COLLECTION_FILE).unlink(missing_ok=True)  # until its table is whole again
        stored = _encoded(
            embedder, source, folder / VECTORS_FILE, settings, overwrite, show_progress_bar
        )
        kept = stored.is_usable & (_first_of_each(source) if is_distinct else True)
        if is_distinct:
            repeated = int(stored.is_usable.sum()) - int(kept.sum())
            logger.info("%d rows hold what an earlier one holds and are left out", repeated)
        parts = _parts(source, stored, kept, source.data_root)
        width = stored.vectors.shape[1]
        table = database(folder).create_table(TABLE, data=_reader(parts, width), mode="overwrite")
        notes = {
            "format": COLLECTION_FORMAT,
            "rows": table.count_rows(),
            "has_added_rows": False,
            "width": width,
            "space": stored.space,
            # So that a folder that is moved with its data goes on to find them.
            "data_root": os.path.relpath(source.data_root, folder),
            "input": source.path.name,
            "is_approximate": _index(table, ann_rows),
        }
        write_json(folder / COLLECTION_FILE, notes, indent=1)
    return Collection(folder)


def add_to_collection(
    embedder: ThinkingEmbedder,
    source: ItemFile,
    output: str | Path,
    settings: EncodeSettings | None = None,
    *,
    ann_rows: int = ANN_ROWS,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> Collection:
    """Add the rows of a file to a collection; those whose id is there take that row's place.

    The table changes at once, when all rows are encoded. A killed run goes on where it stopped;
    one that had come to its end does no harm if it is repeated.

    Args:
        embedder: The collection's model.
        source: Rows, each with an id of its own; bad ones are left out and counted.
        output: The collection's folder.
        settings: How rows are encoded.
        ann_rows: Build an approximate index from so many rows on.
        overwrite: Make vectors of an addition that was begun anew.
        show_progress_bar: Show rows done.

    Raises:
        ValueError: As `encode_file`; also if no row can be found, an id is missing or repeated, a
            picture is outside the collection's data root, or the collection is another model's.
    """
    folder = Path(output)
    with owned(folder, CollectionError):
        collection = Collection(folder)
        collection.check_space(fingerprints(embedder.model, "document", "never")["space"])
        _check_added(source, collection)
        file = folder / ADDED_FILE
        stored = _encoded(embedder, source, file, settings, overwrite, show_progress_bar)
        table = collection.table
        numbers = table.search().select(["row"]).limit(None).to_arrow()["row"].to_numpy()
        parts = _parts(source, stored, stored.is_usable, collection.data_root, numbers.max() + 1)
        merged = (
            table.merge_insert("id")
            .when_matched_update_all()
            .when_not_matched_insert_all()
            .execute(_reader(parts, collection.width))
        )
        added, replaced = merged.num_inserted_rows, merged.num_updated_rows
        logger.info("%s: %d rows added, %d replaced", folder, added, replaced)
        if collection.is_approximate:
            table.optimize()  # takes new rows into the index
        changed = {
            "rows": table.count_rows(),
            "has_added_rows": True,
            "is_approximate": collection.is_approximate or _index(table, ann_rows),
        }
        write_json(folder / COLLECTION_FILE, {**collection.notes, **changed}, indent=1)
        for left in (meta_path(file), details_path(file), file):
            left.unlink()
    return Collection(folder)


def _keep_added(folder: Path, *, overwrite: bool) -> None:
    """Refuse to build a collection anew that holds rows of other files."""
    notes = read_json(folder / COLLECTION_FILE)
    if isinstance(notes, dict) and notes.get("has_added_rows") and not overwrite:
        raise CollectionError(
            f"{folder} holds rows that were added, which building it from one file would drop; "
            "expected a collection of one file; add with --add, or drop them with --overwrite"
        )


def _check_added(source: ItemFile, collection: Collection) -> None:
    """Refuse rows that cannot take their place, before any is encoded."""
    ids: Counter[str] = Counter()
    for row in source.rows():
        if row.item is not None:
            ids[row.id] += 1
            _pictures(row, collection.data_root)
    repeated = [name for name, count in ids.items() if count > 1]
    there = collection.table.search().select(["id"]).limit(None).to_arrow()["id"]
    same = Counter(name for name in there.to_pylist() if name in ids)
    repeated += [name for name, count in same.items() if count > 1]
    if repeated:
        raise CollectionError(
            f"{source.path}: {len(repeated)} ids are there more than once, in it or in the "
            f"collection: {repeated[:3]}; expected one row an id; correct them, or name another "
            "field with --field id=NAME"
        )


def _encoded(
    embedder: ThinkingEmbedder,
    source: ItemFile,
    file: Path,
    settings: EncodeSettings | None,
    overwrite: bool,
    show_progress_bar: bool,
) -> StoredVectors:
    """Return the vectors of all rows, going on where an earlier run stopped."""
    encode_file(
        cast(Any, embedder),  # its keywords are spelt out, the protocol has **settings
        source,
        file,
        settings,
        overwrite=overwrite,
        show_progress_bar=show_progress_bar,
    )
    stored = open_vectors(file)
    usable = int(stored.is_usable.sum())
    if not usable:
        raise CollectionError(
            f"no row of {source.path} could be encoded; expected at least one; their errors "
            f"are in {file.parent}"
        )
    if usable < len(stored.vectors):
        left_out = len(stored.vectors) - usable
        logger.warning("%d rows have no vector and are left out", left_out)
    return stored


def _reader(parts: Iterator[list[dict[str, Any]]], width: int) -> Any:
    """Return rows as LanceDB takes them, some at a time."""
    import pyarrow

    schema = pyarrow.schema(
        [
            ("row", pyarrow.int64()),
            ("id", pyarrow.string()),
            ("text", pyarrow.string()),
            ("pictures", pyarrow.list_(pyarrow.string())),
            ("metadata", pyarrow.string()),
            (TAGS, pyarrow.list_(pyarrow.string())),
            ("vector", pyarrow.list_(pyarrow.float32(), width)),
        ]
    )
    batches = (pyarrow.RecordBatch.from_pylist(part, schema=schema) for part in parts)
    return pyarrow.RecordBatchReader.from_batches(schema, batches)


def _index(table: Any, ann_rows: int) -> bool:
    """Build an approximate index if there are enough rows; return whether there is one."""
    if table.count_rows() < ann_rows:
        return False
    from lancedb.index import HnswSq

    table.create_index("vector", config=HnswSq(distance_type="cosine"))
    return True


def _first_of_each(source: ItemFile) -> NDArray[np.bool_]:
    """Return (N,) bool: whether no earlier row has the same text and the same paths."""
    seen: set[Any] = set()
    is_first = []
    for row in source.rows():
        is_first.append(row.item not in seen)
        seen.add(row.item)
    return np.array(is_first)


def _parts(
    source: ItemFile,
    stored: StoredVectors,
    kept: NDArray[np.bool_],
    data_root: Path,
    first: int = 0,
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows that are kept, some at a time, numbered from `first` on."""
    part: list[dict[str, Any]] = []
    for number, row in enumerate(source.rows()):
        if kept[number]:
            part.append({"row": int(first) + number, **_fields(row, data_root)})
            part[-1]["vector"] = stored.vectors[number].tolist()
        if len(part) == _BATCH_ROWS:
            yield part
            part = []
    if part:
        yield part


def _fields(row: ItemRow, data_root: Path) -> dict[str, Any]:
    assert row.item is not None
    metadata = row.metadata or {}
    return {
        "id": row.id,
        "text": row.item.text,
        "pictures": _pictures(row, data_root),
        "metadata": json.dumps(metadata, ensure_ascii=False),
        TAGS: tags_of(metadata),
    }


def _pictures(row: ItemRow, data_root: Path) -> list[str]:
    """Return the paths of a row's pictures from the data root."""
    assert row.item is not None
    sources = cast(Sequence[str], (*row.item.images, *row.item.video))
    try:
        return [Path(source).relative_to(data_root).as_posix() for source in sources]
    except ValueError as error:
        raise CollectionError(
            f"row {row.id!r}: a picture is outside {data_root}, the collection's data root; "
            "expected it inside; move the pictures, or build the collection with a --data_root "
            "above both"
        ) from error
