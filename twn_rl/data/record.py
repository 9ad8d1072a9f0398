"""What a training record is, and what is wrong with one. Knows no files, no models, no tensors.

Reading, verifying and writing files of records lives in `records`, which offers these names too.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from twn_rl.data.images import ImageSource, image_digest, open_image


class RecordError(ValueError):
    """A record that cannot be used: where it is, what is wrong, what was expected, what to do.

    Attributes:
        reason: Short key for counting, such as "missing_field".
        field: Dotted name of the field, such as "negatives[2].text"; None for the whole row.
        file: File the record was read from, if any.
        row: 1-based row (line for JSON lines), if any.
        detail: The message without its location.
    """

    def __init__(
        self,
        detail: str,
        *,
        reason: str,
        field: str | None = None,
        file: str | Path | None = None,
        row: int | None = None,
    ) -> None:
        """Compose the message from `detail` and the location."""
        self.detail, self.reason, self.field, self.file, self.row = detail, reason, field, file, row
        place = [] if file is None else [str(file)]
        place += [] if row is None else [f"row {row}"]
        place += [] if field is None else [f"field {field}"]
        super().__init__(": ".join([", ".join(place), detail]) if place else detail)

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their positional arguments only.
        where = {"field": self.field, "file": self.file, "row": self.row}
        return partial(RecordError, self.detail, reason=self.reason, **where), ()

    def at(self, *, file: str | Path, row: int) -> "RecordError":
        """Return the same error with its file and row named."""
        return RecordError(self.detail, reason=self.reason, field=self.field, file=file, row=row)


DEFAULT_POOL = ""


@dataclass(frozen=True)
class Item:
    """One side of a record: any of an instruction, a text, images and a video (its frames).

    Paths are kept as strings. In a file they are relative to the data root; records that a
    `RecordSet` hands out have absolute ones.
    """

    instruction: str | None = None
    text: str | None = None
    images: tuple[ImageSource, ...] = ()
    video: tuple[ImageSource, ...] = ()

    def __post_init__(self) -> None:
        """Bring lists and Path objects to the one form that compares equal."""
        for name in ("images", "video"):
            sources = tuple(s.as_posix() if isinstance(s, Path) else s for s in getattr(self, name))
            object.__setattr__(self, name, sources)

    def load(self, data_root: str | Path | None = None) -> "Item":
        """Return the item with every picture opened as an RGB image.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        return replace(
            self,
            images=tuple(open_image(source, data_root) for source in self.images),
            video=tuple(open_image(source, data_root) for source in self.video),
        )

    def content_key(self, data_root: str | Path | None = None) -> str:
        """Return the sha256 hex digest of the content: equal content, equal key.

        Pictures count by their pixels, so an opened image, its file and a copy of that file agree.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        parts = [
            self.instruction,
            self.text,
            [image_digest(source, data_root) for source in self.images],
            [image_digest(source, data_root) for source in self.video],
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict; `from_dict` is its inverse. JSON-ready when all images are paths."""
        return {
            "instruction": self.instruction,
            "text": self.text,
            "images": list(self.images),
            "video": list(self.video),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> "Item":
        """Return the item of a `to_dict` result; `where` names the field in errors.

        Raises:
            RecordError: For unknown keys, wrong types, and an item without text, image and video.
        """
        if not isinstance(data, Mapping):
            raise _type_error(where, data, "an object with instruction, text, images, video")
        for key in data:
            if key not in _ITEM_FIELDS:
                raise RecordError(
                    f"unknown key {key!r}; expected only {_ITEM_FIELDS}; rename or remove it",
                    reason="unknown_field",
                    field=_dotted(where, str(key)),
                )
        item = cls(
            instruction=_optional_str(data.get("instruction"), _dotted(where, "instruction")),
            text=_optional_str(data.get("text"), _dotted(where, "text")),
            images=_sources(data.get("images"), _dotted(where, "images")),
            video=_sources(data.get("video"), _dotted(where, "video")),
        )
        if not (item.text or "").strip() and not item.images and not item.video:
            raise RecordError(
                f"text = {item.text!r} without images or video; expected non-blank text or at "
                "least one image or frame; fill the item or leave the row out",
                reason="empty_item",
                field=_dotted(where, "text"),
            )
        return item


_ITEM_FIELDS = [item_field.name for item_field in fields(Item)]


@dataclass(frozen=True)
class Record:
    """One training example: what retrieves, what it must find, and what it must not.

    Attributes:
        id: Unique name within its file.
        source: Data set or task the record comes from.
        query: The retrieving side.
        positive: The item to be found.
        negatives: Hard negatives, possibly none.
        query_cot: Chain of thought about the query, without think markers.
        positive_cot: Chain of thought about the positive, without think markers.
        metadata: Whatever else a source wants to carry.
    """

    id: str
    source: str
    query: Item
    positive: Item
    negatives: tuple[Item, ...] = ()
    query_cot: str | None = None
    positive_cot: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Bring lists to the one form that compares equal."""
        object.__setattr__(self, "negatives", tuple(self.negatives))

    def load(self, data_root: str | Path | None = None) -> "Record":
        """Return the record with every picture of every item opened as an RGB image.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        return self.map_items(lambda item: item.load(data_root))

    def items(self) -> tuple[Item, ...]:
        """Return query, positive and negatives, in this order."""
        return (self.query, self.positive, *self.negatives)

    def map_items(self, function: Callable[[Item], Item]) -> "Record":
        """Return the record with `function` (item -> item) applied to every item."""
        return replace(
            self,
            query=function(self.query),
            positive=function(self.positive),
            negatives=tuple(function(item) for item in self.negatives),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict; `from_dict` is its inverse."""
        return {
            "id": self.id,
            "source": self.source,
            "query": self.query.to_dict(),
            "positive": self.positive.to_dict(),
            "negatives": [item.to_dict() for item in self.negatives],
            "query_cot": self.query_cot,
            "positive_cot": self.positive_cot,
            "metadata": dict(self.metadata),
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Record":
        """Return the record of a `to_dict` result; unknown top-level keys go to `metadata`.

        Raises:
            RecordError: For a missing field, a wrong type, an empty item, and an unknown key that
                looks like a misspelt known one or is also a key of `metadata`.
        """
        if not isinstance(data, Mapping):
            raise _type_error(None, data, "an object with id, source, query, positive")
        for name in ("id", "source", "query", "positive"):
            if data.get(name) is None:
                raise RecordError(
                    f"{name} is {'null' if name in data else 'missing'}; expected "
                    "id, source, query and positive in every record; add it or leave the row out",
                    reason="missing_field",
                    field=name,
                )
        negatives = data.get("negatives")
        if not isinstance(negatives, Sequence | None) or isinstance(negatives, str):
            raise _type_error("negatives", negatives, "a list of items")
        return cls(
            id=_required_str(data["id"], "id"),
            source=_required_str(data["source"], "source"),
            query=Item.from_dict(data["query"], where="query"),
            positive=Item.from_dict(data["positive"], where="positive"),
            negatives=tuple(
                Item.from_dict(item, where=f"negatives[{i}]")
                for i, item in enumerate(negatives or ())
            ),
            query_cot=_optional_cot(data.get("query_cot"), "query_cot"),
            positive_cot=_optional_cot(data.get("positive_cot"), "positive_cot"),
            metadata=_metadata(data),
        )


_RECORD_FIELDS = [record_field.name for record_field in fields(Record)]


def task_of(record: Record) -> str:
    """Return `metadata["task"]`, or the source of records that name no task."""
    return str(record.metadata.get("task") or record.source)


def hop_of(record: Record) -> str | None:
    """Return "hop0", "hop1", ... from `metadata["hops"]`; None for records without hops."""
    hops = record.metadata.get("hops")
    return None if hops is None else f"hop{int(hops)}"


def pool_of(record: Record) -> str:
    """Return the pool a record's query competes in: `metadata["pool"]`, or one pool for all."""
    return str(record.metadata.get("pool", DEFAULT_POOL))


def _metadata(data: Mapping[str, Any]) -> dict[str, Any]:
    metadata = data.get("metadata")
    if not isinstance(metadata, Mapping | None):
        raise _type_error("metadata", metadata, "an object or null")
    merged = dict(metadata or {})
    for key in data:
        if key in _RECORD_FIELDS:
            continue
        # A misspelt field must not vanish into metadata: "negative" would train without negatives.
        twin = next((name for name in _RECORD_FIELDS if _letters(name) == _letters(str(key))), None)
        if twin is not None or key in merged:
            what = f"is it {twin!r}?" if twin else "metadata has the same key"
            raise RecordError(
                f"unknown field {key!r}: {what}; expected only {_RECORD_FIELDS} or names unlike "
                "them and unlike the keys of metadata; rename it",
                reason="unknown_field",
                field=str(key),
            )
        merged[str(key)] = data[key]
    return merged


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").rstrip("s")


def _dotted(where: str | None, name: str) -> str:
    return name if where is None else f"{where}.{name}"


def _type_error(name: str | None, value: Any, expected: str) -> RecordError:
    shown = "NaN" if isinstance(value, float) and math.isnan(value) else repr(value)[:80]
    return RecordError(
        f"value = {shown} of type {type(value).__name__}; expected {expected}; correct the value",
        reason="bad_type",
        field=name,
    )


def _optional_str(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _type_error(name, value, "a string or null")
    return value


def _required_str(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise _type_error(name, value, "a non-blank string")
    return value


def _optional_cot(value: Any, name: str) -> str | None:
    if _optional_str(value, name) is not None and not value.strip():
        raise _type_error(name, value, "a non-blank string or null")
    return value


def _sources(value: Any, name: str) -> tuple[ImageSource, ...]:
    if value is None:
        return ()
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise _type_error(name, value, "a list of image paths or null")
    for i, source in enumerate(value):
        if not isinstance(source, Image.Image | str | Path) or source == "":
            raise _type_error(f"{name}[{i}]", source, "an image path")
    return tuple(value)
