"""A searchable collection: what the rows of a file hold, and their vectors, in one folder.

LanceDB keeps text, pictures' paths, metadata and vector of each row in a table on disk, which any
number of processes read. `collection_writing` makes it. Refuses to know who asks.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.images import resolve_inside
from twn_rl.inference.metadata_filter import MetadataFilter, sql_of
from twn_rl.inference.vector_files import StoredVectors
from twn_rl.runtime.extras import extra
from twn_rl.runtime.whole_files import read_json, write_json_lines

COLLECTION_FILE = "collection.json"
COLLECTION_FORMAT = 2
TABLE = "items"
TAGS = "tags"  # column of what filters are compared with
_REFINED = 10  # candidates of the approximate index for each hit, scored again exactly
_SHOWN_LINES = 3


class CollectionError(ValueError):
    """A folder that is no collection, or one of another model."""


@dataclass(frozen=True)
class Hit:
    """A row that was found.

    Attributes:
        id: Its id.
        row: Its number in the collection.
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
        notes: What its file says.
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
        self.notes: dict[str, Any] = notes
        self.width, self.space = notes["width"], notes["space"]
        self.is_approximate = notes["is_approximate"]
        self.data_root = (self.path / notes["data_root"]).resolve()
        self.table = database(self.path).open_table(TABLE)
        self.rows: int = self.table.count_rows()

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

    def search(
        self, vector: NDArray[np.float32], top_k: int = 10, wanted: MetadataFilter | None = None
    ) -> list[Hit]:
        """Return the rows nearest to a vector (D,), best first.

        Args:
            vector: (D,), finite.
            top_k: How many.
            wanted: What their metadata must hold; see `metadata_filter`.

        Raises:
            ValueError: For a filter that cannot be compared with metadata.
        """
        query = self.table.search(vector.astype(np.float32), vector_column_name="vector")
        query = query.distance_type("cosine").limit(top_k)
        if condition := sql_of(wanted or {}, TAGS):
            query = query.where(condition, prefilter=True)
        if self.is_approximate:
            query = query.refine_factor(_REFINED)
        found = query.select(["row", "id", "text", "pictures", "metadata", "_distance"]).to_list()
        found.sort(key=lambda row: (row["_distance"], row["row"]))
        return [_hit(row, 1.0 - row["_distance"]) for row in found]

    def row(self, number: int) -> Hit | None:
        """Return a row by its number; None if it is not in the collection."""
        found = self.table.search().where(f"row = {int(number)}").limit(1).to_list()
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


def search_collection(
    queries: StoredVectors,
    collection: Collection,
    output: str | Path,
    *,
    top_k: int = 10,
    wanted: MetadataFilter | None = None,
) -> list[dict[str, Any]]:
    """Write the hits of every query as JSON lines; return the first few lines.

    A line is `id` and `row` of the query and `hits`, each `id`, `row` and `score`; a query without
    a vector has no hits and `"error": true`.

    Args:
        queries: What to search for.
        collection: Where.
        output: The .jsonl file, written whole or not at all.
        top_k: Hits a query.
        wanted: What the metadata of hits must hold.

    Raises:
        ValueError: If the two were made by different embedding models, and as `Collection.search`.
    """
    if queries.space is not None:
        collection.check_space(queries.space)
    if top_k < 1:
        raise ValueError(f"top_k = {top_k}; expected >= 1; change it")
    first: list[dict[str, Any]] = []

    def lines() -> Iterator[dict[str, Any]]:
        for row in range(len(queries.vectors) - queries.unwritten_rows):
            line: dict[str, Any] = {"id": queries.ids[row], "row": row, "hits": []}
            if queries.is_usable[row]:
                hits = collection.search(queries.vectors[row], top_k, wanted)
                line["hits"] = [
                    {"id": hit.id, "row": hit.row, "score": round(hit.score, 6)} for hit in hits
                ]
            else:
                line["error"] = True
            first.extend(islice([line], max(0, _SHOWN_LINES - len(first))))
            yield line

    write_json_lines(Path(output), lines())
    return first


def database(folder: Path) -> Any:
    """Return the database in a folder, which warns of nothing: a table that is new is meant."""
    os.environ.setdefault("LANCEDB_LOG", "error")
    with extra("index"):
        import lancedb
    return lancedb.connect(folder)


def _hit(row: Mapping[str, Any], score: float) -> Hit:
    return Hit(
        id=row["id"],
        row=row["row"],
        score=float(score),
        text=row["text"],
        pictures=tuple(row["pictures"] or ()),
        metadata=json.loads(row["metadata"] or "{}"),
    )
