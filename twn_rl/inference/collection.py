"""A searchable collection: what the rows of a file hold, and their vectors, in one folder.

LanceDB keeps text, pictures' paths, metadata and vector of each row in a table on disk, which any
number of processes read; above `ann_rows` rows an approximate index is built. Beside the table lie
the vectors as `twn-rl encode` writes them. Refuses to know who asks.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.images import resolve_inside
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile, ItemRow
from twn_rl.inference.vector_files import StoredVectors, open_vectors
from twn_rl.runtime.extras import extra
from twn_rl.runtime.whole_files import owned, read_json, write_json

logger = logging.getLogger(__name__)

COLLECTION_FILE = "collection.json"
COLLECTION_FORMAT = 1
VECTORS_FILE = "vectors.npy"
# An exact search of so many rows of width 1024 takes about half a second on one core.
ANN_ROWS = 500_000
_TABLE = "items"
_BATCH_ROWS = 4096
_REFINED = 10  # candidates of the approximate index for each hit, scored again exactly


class CollectionError(ValueError):
    """A folder that is no collection, or one of another model."""


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: Its id.
        row: Its place in the file.
        score: Cosine of its vector and the query's.
        text: Its text.
        pictures: Paths of its pictures, relative to the collection's data root.
        metadata: What else the file says of it.
    """

    id: str
    row: int
    score: float
    text: str | None
    pictures: tuple[str, ...]
    metadata: Mapping[str, Any]


class Collection:
    """A collection on disk, open for reading.

    Attributes:
        path: Its folder.
        rows: How many rows can be found.
        width: Numbers of a vector.
        space: Fingerprint of the model whose vectors these are.
        data_root: Folder that no picture's path may leave.
        is_approximate: Whether an approximate index is searched.
    """

    def __init__(self, path: str | Path) -> None:
        """Open the collection in a folder.

        Raises:
            CollectionError: If there is none.
        """
        self.path = Path(path)
        notes = read_json(self.path / COLLECTION_FILE)
        if not isinstance(notes, dict) or notes.get("format") != COLLECTION_FORMAT:
            raise CollectionError(
                f"{self.path} holds no readable {COLLECTION_FILE} of format {COLLECTION_FORMAT}; "
                "expected a folder that `twn-rl index` finished; run it, or check the path"
            )
        self.rows, self.width, self.space = notes["rows"], notes["width"], notes["space"]
        self.is_approximate = notes["is_approximate"]
        self.data_root = (self.path / notes["data_root"]).resolve()
        self._table = _database(self.path).open_table(_TABLE)

    def check_space(self, space: str | None) -> None:
        """Refuse a model whose vectors cannot be compared with these.

        Raises:
            CollectionError: If it is another one.
        """
        if self.space != space:
            raise CollectionError(
                f"{self.path} was embedded by {str(self.space)[:12]}, the model is "
                f"{str(space)[:12]}; expected one model: their vectors cannot be compared; index "
                "again with this model"
            )

    def search(self, vector: NDArray[np.float32], top_k: int = 10) -> list[Hit]:
        """Return the rows nearest to a vector (D,), best first."""
        query = self._table.search(vector.astype(np.float32), vector_column_name="vector")
        query = query.distance_type("cosine").limit(top_k)
        if self.is_approximate:
            query = query.refine_factor(_REFINED)
        found = query.select(["row", "id", "text", "pictures", "metadata", "_distance"]).to_list()
        found.sort(key=lambda row: (row["_distance"], row["row"]))
        return [_hit(row, 1.0 - row["_distance"]) for row in found]

    def row(self, number: int) -> Hit | None:
        """Return a row by its place in the file; None if it is not in the collection."""
        found = self._table.search().where(f"row = {int(number)}").limit(1).to_list()
        return _hit(found[0], 1.0) if found else None

    def picture(self, row: int, number: int) -> Path | None:
        """Return the file of a picture of a row, inside the data root; None without one.

        Raises:
            ImageError: If the file is gone or its path leads elsewhere.
        """
        hit = self.row(row)
        if hit is None or not 0 <= number < len(hit.pictures):
            return None
        return resolve_inside(hit.pictures[number], self.data_root)


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
        ValueError: As `encode_file`; also if no row can be found.
    """
    folder = Path(output)
    with owned(folder, CollectionError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / COLLECTION_FILE).unlink(missing_ok=True)  # until its table is whole again
        vectors = folder / VECTORS_FILE
        encode_file(
            cast(Any, embedder),  # its keywords are spelt out, the protocol has **settings
            source,
            vectors,
            settings,
            overwrite=overwrite,
            show_progress_bar=show_progress_bar,
        )
        stored = open_vectors(vectors)
        kept = stored.is_usable & (_first_of_each(source) if is_distinct else True)
        usable = int(kept.sum())
        if not usable:
            raise CollectionError(
                f"no row of {source.path} could be encoded; expected at least one; their errors "
                f"are in {folder}"
            )
        failed = len(stored.vectors) - int(stored.is_usable.sum())
        if failed:
            logger.warning("%d rows have no vector and are left out", failed)
        if is_distinct:
            repeated = len(stored.vectors) - failed - usable
            logger.info("%d rows hold what an earlier one holds and are left out", repeated)
        is_approximate = usable >= ann_rows
        parts = _parts(source, stored, kept)
        _write_table(folder, parts, stored.vectors.shape[1], is_approximate=is_approximate)
        notes = {
            "format": COLLECTION_FORMAT,
            "rows": usable,
            "width": stored.vectors.shape[1],
            "space": stored.space,
            # So that a folder that is moved with its data goes on to find them.
            "data_root": os.path.relpath(source.data_root, folder),
            "input": source.path.name,
            "is_approximate": is_approximate,
        }
        write_json(folder / COLLECTION_FILE, notes, indent=1)
    return Collection(folder)


def _database(folder: Path) -> Any:
    os.environ.setdefault("LANCE_LOG", "error")  # it warns of every table that is new
    with extra("index"):
        import lancedb
    return lancedb.connect(folder)


def _write_table(
    folder: Path, parts: Iterator[list[dict[str, Any]]], width: int, *, is_approximate: bool
) -> None:
    database = _database(folder)
    import pyarrow

    schema = pyarrow.schema(
        [
            ("row", pyarrow.int64()),
            ("id", pyarrow.string()),
            ("text", pyarrow.string()),
            ("pictures", pyarrow.list_(pyarrow.string())),
            ("metadata", pyarrow.string()),
            ("vector", pyarrow.list_(pyarrow.float32(), width)),
        ]
    )
    batches = (pyarrow.RecordBatch.from_pylist(part, schema=schema) for part in parts)
    reader = pyarrow.RecordBatchReader.from_batches(schema, batches)
    table = database.create_table(_TABLE, data=reader, mode="overwrite")
    if is_approximate:
        from lancedb.index import HnswSq

        table.create_index("vector", config=HnswSq(distance_type="cosine"))


def _first_of_each(source: ItemFile) -> NDArray[np.bool_]:
    """Return (N,) bool: whether no earlier row has the same text and the same paths."""
    seen: set[Any] = set()
    is_first = []
    for row in source.rows():
        is_first.append(row.item not in seen)
        seen.add(row.item)
    return np.array(is_first)


def _parts(
    source: ItemFile, stored: StoredVectors, kept: NDArray[np.bool_]
) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows that are kept, some at a time, as the table has them."""
    part: list[dict[str, Any]] = []
    for number, row in enumerate(source.rows()):
        if kept[number]:
            part.append({"row": number, **_fields(row, source.data_root)})
            part[-1]["vector"] = stored.vectors[number].tolist()
        if len(part) == _BATCH_ROWS:
            yield part
            part = []
    if part:
        yield part


def _fields(row: ItemRow, data_root: Path) -> dict[str, Any]:
    assert row.item is not None
    sources = cast(Sequence[str], (*row.item.images, *row.item.video))
    pictures = [Path(source).relative_to(data_root).as_posix() for source in sources]
    metadata = json.dumps(row.metadata or {}, ensure_ascii=False)
    return {"id": row.id, "text": row.item.text, "pictures": pictures, "metadata": metadata}


def _hit(row: Mapping[str, Any], score: float) -> Hit:
    return Hit(
        id=row["id"],
        row=row["row"],
        score=float(score),
        text=row["text"],
        pictures=tuple(row["pictures"] or ()),
        metadata=json.loads(row["metadata"] or "{}"),
    )
