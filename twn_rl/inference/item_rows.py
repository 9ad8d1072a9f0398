"""Rows of a file, one at a time, as items to encode.

A row is a record (one of its sides is taken), a plain item (`id`, `text`, `image` or
`images`, `video`, `instruction`), or anything whose fields are named. A bad row is yielded as what
is wrong with it, because among millions of rows one must not end a job.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from twn_rl.data.formats.input_files import read_file
from twn_rl.data.images import resolve_inside
from twn_rl.data.jsonl import parse_json
from twn_rl.data.record import Item, RecordError, bad_type, named_in_errors
from twn_rl.runtime.problems import Problems

Side = Literal["query", "document"]

# What a plain row may hold; `--field` gives them other names. "item" holds a whole item or a text.
ROW_FIELDS = ("id", "item", "text", "image", "images", "video", "instruction")
_RECORD_SIDE = {"query": "query", "document": "positive"}
_KNOWN = {*ROW_FIELDS, "source", "pool", "metadata"}
_RECORD_ONLY = {"query", "positive", "negatives", "query_cot", "positive_cot"}


@dataclass(frozen=True)
class ItemRow:
    """One row of a file.

    Attributes:
        id: Its `id`, or its position among the rows if it has none.
        item: What to encode, image paths absolute; None if the row is bad.
        error: What is wrong with the row; None if it is usable.
        pool: Its `pool`, at the top or in `metadata`, if it names one.
        metadata: Its `metadata`, if that is an object.
    """

    id: str
    item: Item | None
    error: RecordError | None = None
    pool: str | None = None
    metadata: Mapping[str, Any] | None = None


class ItemFile:
    """A `.jsonl` or `.parquet` file of items, read anew by each iteration.

    Attributes:
        path: The file.
        side: "query" takes a record's query, "document" its positive.
        fields: Field of `ROW_FIELDS` -> name (or dotted path) it has in this file.
        data_root: Folder image paths are relative to and may not leave.
        limit: Rows to read; None reads all.
        ignored_fields: How many rows of the last iteration had each field that nothing reads.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        side: Side,
        fields: Mapping[str, str] | None = None,
        data_root: str | Path | None = None,
        limit: int | None = None,
    ) -> None:
        """Check the settings; the file itself is opened by each iteration.

        Raises:
            ValueError: For another kind of file, side, field or limit.
            FileNotFoundError: If there is no such file.
        """
        self.path, self.limit = Path(path), limit
        self.side: Side = side
        self.fields = dict(fields or {})
        self.data_root = (self.path.parent if data_root is None else Path(data_root)).resolve()
        self.ignored_fields: Counter[str] = Counter()
        named, problems = set(self.fields), Problems()
        problems.unless(
            self.path.suffix in (".jsonl", ".parquet"),
            f"file = {str(path)!r}, expected .jsonl or .parquet",
        )
        problems.unless(side in _RECORD_SIDE, f"side = {side!r}, expected 'query' or 'document'")
        problems.unless(
            named <= set(ROW_FIELDS),
            f"fields = {sorted(named - set(ROW_FIELDS))}, expected only {list(ROW_FIELDS)}",
        )
        problems.expect(self, "None or >= 1", "limit")
        problems.unless(
            not ({"image", "images"} <= named or {"item", "text"} <= named),
            "both images and image (or item and text) are named, expected one of them",
        )
        problems.refuse("rows", "change these settings")
        if not self.path.is_file():
            raise FileNotFoundError(
                f"file = {str(path)!r} does not exist; expected a .jsonl or .parquet file; "
                "check the path"
            )

    def __iter__(self) -> Iterator[ItemRow]:
        """Yield every row, good or bad, in the order of the file."""
        return self.rows()

    def rows(self, start: int = 0) -> Iterator[ItemRow]:
        """Yield the rows from position `start` on; those before are passed over unjudged."""
        self.ignored_fields = Counter()
        rows = enumerate(islice(read_file(self.path), self.limit))
        for position, (number, data) in islice(rows, start, None):
            yield self._to_item(position, number, data)

    def describe(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return size, time of change and sha256 of the file, and how many of its rows are read.

        Args:
            known: An earlier description; believed if size, time and limit are the same.
        """
        stat = self.path.stat()
        state = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns, "limit": self.limit}
        if known is not None and all(known.get(key) == value for key, value in state.items()):
            return dict(known)
        with self.path.open("rb") as file:
            if self.path.suffix == ".parquet":
                from twn_rl.data.parquet import num_rows

                digest, rows = hashlib.file_digest(file, "sha256"), num_rows(self.path)
            else:
                digest, rows = hashlib.sha256(), 0
                for line in file:
                    digest.update(line)
                    rows += bool(line.strip())
        return {**state, "sha256": digest.hexdigest(), "rows": min(rows, self.limit or rows)}

    def _to_item(self, position: int, number: int, data: Any) -> ItemRow:
        row_id = str(position)
        try:
            if isinstance(data, RecordError):
                raise data
            if not isinstance(data, Mapping):
                raise bad_type(data, "an object with named fields")
            row_id = self._id(data, row_id)
            item = self._absolute(self._item(data))
        except RecordError as error:
            return ItemRow(row_id, None, error.at(file=self.path, row=number))
        read = {name.split(".")[0] for name in self.fields.values()}
        self.ignored_fields.update(set(map(str, data)) - _KNOWN - _RECORD_ONLY - read)
        metadata = _metadata(data)
        return ItemRow(row_id, item, pool=_pool(data, metadata), metadata=metadata)

    def _id(self, data: Mapping[str, Any], default: str) -> str:
        name = self.fields.get("id", "id")
        value = _lookup(data, name)
        if value is None and "id" not in self.fields:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise bad_type(value, "a string or whole number", name)
        return str(value)

    def _item(self, data: Mapping[str, Any]) -> Item:
        if "item" in self.fields:
            whole = self.fields["item"]
        elif set(self.fields) <= {"id"} and isinstance(data.get(_RECORD_SIDE[self.side]), Mapping):
            whole = _RECORD_SIDE[self.side]
        else:
            return self._plain(data)
        value = _lookup(data, whole)
        if value is None:
            raise RecordError(
                f"{whole} is missing; expected a text or an item; add it or name another --field",
                reason="missing_field",
                field=whole,
            )
        return Item.from_dict({"text": value} if isinstance(value, str) else value, where=whole)

    def _plain(self, data: Mapping[str, Any]) -> Item:
        """Return the item whose parts are fields of the row."""
        values = {name: _lookup(data, self.fields.get(name, name)) for name in ROW_FIELDS[2:]}
        image = values.pop("image")
        if image is not None:
            if values["images"]:
                raise RecordError(
                    "row has both image and images; expected one of them; remove the other",
                    reason="unknown_field",
                    field="image",
                )
            values["images"] = [image] if isinstance(image, str) else image
        # Named fields that are absent would otherwise pass for items that have none.
        absent = [
            name
            for name, field in self.fields.items()
            if name not in ("id", "item") and not _has(data, field)
        ]
        if absent or all(values[name] is None for name in ("text", "images", "video")):
            wanted = [self.fields.get(name, name) for name in absent or ["text"]]
            raise RecordError(
                f"{', '.join(wanted)} missing among the fields {sorted(map(str, data))[:20]}; "
                "expected text, image, images or video, or a record with query and positive; "
                "name the fields with --field",
                reason="missing_field",
            )
        return Item.from_dict(values)

    def _absolute(self, item: Item) -> Item:
        for name in ("images", "video"):
            with named_in_errors(name):
                paths = [resolve_inside(str(s), self.data_root) for s in getattr(item, name)]
            item = replace(item, **{name: tuple(map(str, paths))})
        return item


def _metadata(data: Mapping[str, Any]) -> Mapping[str, Any] | None:
    metadata = data.get("metadata")
    if isinstance(metadata, str):  # records in Parquet keep it as JSON text
        metadata = parse_json(metadata, field="metadata")
    return metadata if isinstance(metadata, Mapping) else None


def _pool(data: Mapping[str, Any], metadata: Mapping[str, Any] | None) -> str | None:
    pool = data.get("pool")
    if pool is None and metadata is not None:
        pool = metadata.get("pool")
    return None if pool is None else str(pool)


def _has(data: Mapping[str, Any], name: str) -> bool:
    parent, _, leaf = name.rpartition(".")
    holder = _lookup(data, parent) if parent else data
    return name in data or (isinstance(holder, Mapping) and leaf in holder)


def _lookup(data: Mapping[str, Any], name: str) -> Any:
    """Return the value of a field; "a.b" is field b of field a unless a field has that name."""
    if name in data:
        return data[name]
    value: Any = data
    for part in name.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value
