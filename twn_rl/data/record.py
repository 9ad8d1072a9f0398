"""What a training record is, and what is wrong with one."""

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from twn_rl.data.images import ImageError, ImageSource, image_digest, open_image
from twn_rl.data.markup import KNOWN_MARKUP, Markup, unusable_in

DEFAULT_POOL = ""
# A picture fills some hundred tokens in most backbones; only the order of batches depends on it.
_CHARACTERS_PER_PICTURE = 1000


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

    def at(self, *, file: str | Path, row: int | None = None) -> "RecordError":
        """Return the same error with its file and row named."""
        return RecordError(self.detail, reason=self.reason, field=self.field, file=file, row=row)


def bad_type(value: Any, expected: str, field: str | None = None) -> RecordError:
    """Return the error of a value of another kind than expected."""
    return RecordError(
        f"value = {value!r:.80} of type {type(value).__name__}; expected {expected}; correct the "
        "value",
        reason="bad_type",
        field=field,
    )


def bad_file(file: Path, detail: str, row: int | None = None) -> RecordError:
    """Return the error of a file that cannot be used as a whole."""
    return RecordError(detail, reason="bad_file", file=file, row=row)


@contextmanager
def named_in_errors(name: str) -> Iterator[None]:
    """Turn an `ImageError` of the body into a `RecordError` that names the field."""
    try:
        yield
    except ImageError as error:
        raise RecordError(str(error), reason=error.reason, field=name) from error


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
        for name, given in (("images", self.images), ("video", self.video)):
            if given != ():
                sources = tuple(s.as_posix() if isinstance(s, Path) else s for s in given)
                object.__setattr__(self, name, sources)

    def load(self, data_root: str | Path | None = None) -> "Item":
        """Return the item with every picture opened as an RGB image.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        return self.map_sources(lambda source: open_image(source, data_root))

    def map_sources(self, function: Callable[[ImageSource], ImageSource]) -> "Item":
        """Return the item with `function` applied to every picture, frames included."""
        if not self.images and not self.video:
            return self
        return replace(
            self,
            images=tuple(function(source) for source in self.images),
            video=tuple(function(source) for source in self.video),
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

    def length_estimate(self) -> int:
        """Return a number that grows with the item's tokens; reads nothing.

        >>> Item(text="a camel", images=("camel.png",)).length_estimate()
        1007
        """
        pictures = len(self.images) + len(self.video)
        text = len(self.instruction or "") + len(self.text or "")
        return text + _CHARACTERS_PER_PICTURE * pictures

    def is_same(self, other: "Item", data_root: str | Path | None = None) -> bool:
        """Return whether two items have equal content; decodes pictures only if all else agrees.

        Raises:
            ImageError: If such a picture is missing or cannot be decoded.
        """
        plain = [(it.instruction, it.text, len(it.images), len(it.video)) for it in (self, other)]
        return plain[0] == plain[1] and (
            self.content_key(data_root) == other.content_key(data_root)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return a plain dict; `from_dict` is its inverse. JSON-ready when all images are paths."""
        return {**vars(self), "images": list(self.images), "video": list(self.video)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str | None = None) -> "Item":
        """Return the item of a `to_dict` result; `where` names the field in errors.

        Raises:
            RecordError: For unknown keys, wrong types, and an item without text, image and video.
        """
        return checked_fields(data, _ItemFields, where).item(where)


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

    def sources(self) -> Iterator[tuple[str, ImageSource]]:
        """Yield the dotted field name and the source of every picture."""
        for position, item in enumerate(self.items()):
            for kind, sources in (("images", item.images), ("video", item.video)):
                for i, source in enumerate(sources):
                    side = ("query", "positive", f"negatives[{position - 2}]")[min(position, 2)]
                    yield f"{side}.{kind}[{i}]", source

    def with_paths(self, resolve: Callable[[str], str]) -> "Record":
        """Return the record with `resolve` applied to the path of every picture.

        Raises:
            RecordError: If `resolve` raises an ImageError; it names the field.
        """
        paths: dict[ImageSource, str] = {}
        for name, source in self.sources():
            with named_in_errors(name):
                paths[source] = resolve(str(source))
        return self.map_items(lambda item: item.map_sources(paths.__getitem__)) if paths else self

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
            **vars(self),
            "query": self.query.to_dict(),
            "positive": self.positive.to_dict(),
            "negatives": [item.to_dict() for item in self.negatives],
            "metadata": dict(self.metadata),
        }

    def refuse_positive_as_negative(self, data_root: str | Path | None = None) -> None:
        """Refuse a negative with the content of the positive; pictures decide if all else agrees.

        Raises:
            RecordError: If there is one, or if such a picture cannot be decoded.
        """
        for i, negative in enumerate(self.negatives):
            name = f"negatives[{i}]"
            with named_in_errors(name):
                if negative.is_same(self.positive, data_root):
                    raise RecordError(
                        f"{name} has the content of positive; expected items that must not be "
                        "found; remove it",
                        reason="positive_in_negatives",
                        field=name,
                    )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Record":
        """Return the record of a `to_dict` result; unknown top-level keys go to `metadata`.

        Raises:
            RecordError: For a missing field, a wrong type, an empty item, and an unknown key that
                looks like a misspelt known one or is also a key of `metadata`.
        """
        absent = [n for n in _REQUIRED if isinstance(data, Mapping) and data.get(n) is None]
        if absent:
            raise RecordError(
                f"{absent[0]} is {'null' if absent[0] in data else 'missing'}; expected "
                "id, source, query and positive in every record; add it or leave the row out",
                reason="missing_field",
                field=absent[0],
            )
        row = checked_fields(data, _RecordFields, None)
        for name in ("id", "source", "metadata"):
            _refuse_unusable(getattr(row, name), name)
        for name in ("query_cot", "positive_cot"):
            refuse_in_thought(getattr(row, name), name)
        negatives = enumerate(row.negatives or ())
        return cls(
            id=row.id,
            source=row.source,
            query=row.query.item("query"),
            positive=row.positive.item("positive"),
            negatives=tuple(item.item(f"negatives[{i}]") for i, item in negatives),
            query_cot=row.query_cot,
            positive_cot=row.positive_cot,
            metadata=_metadata(data, row.metadata or {}),
        )


def _refuse_unusable(value: Any, name: str) -> None:
    found = unusable_in(value, name)
    if found is not None:
        raise RecordError(
            f"{found[0]} holds {found[1]}; expected text without NUL and without halves of "
            "surrogate pairs; remove it, or decode the text anew",
            reason="unusable_character",
            field=found[0],
        )


def refuse_in_thought(cot: str | None, name: str, markup: Markup = KNOWN_MARKUP) -> None:
    """Refuse a thought with markup, which would be structure, or with an unusable character.

    Args:
        cot: The thought.
        name: Of its field.
        markup: What means something to a model; think markers and well-known tokens if no model
            is at hand.

    Raises:
        RecordError: If it has any.
    """
    _refuse_unusable(cot, name)
    found = markup.found(cot) if cot else []
    if found:
        raise RecordError(
            f"{name} holds {found[:5]}; expected a thought without markers and special tokens, "
            "which the renderer adds; strip them",
            reason="markup_in_thought",
            field=name,
        )


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


_Path = Annotated[str, msgspec.Meta(min_length=1)]
_Text = Annotated[str, msgspec.Meta(pattern=r"\S")]


class _ItemFields(msgspec.Struct, forbid_unknown_fields=True):
    """What an item may hold in a file, where null is as good as absent."""

    instruction: str | None = None
    text: str | None = None
    images: tuple[_Path, ...] | None = None
    video: tuple[_Path, ...] | None = None

    def item(self, where: str | None) -> Item:
        """Return the item, which must not be empty."""
        if not (self.images or self.video or (self.text and self.text.strip())):
            raise RecordError(
                f"text = {self.text!r} without images or video; expected non-blank text or at "
                "least one image or frame; fill the item or leave the row out",
                reason="empty_item",
                field=_dotted(where, "text"),
            )
        for name, text in (("instruction", self.instruction), ("text", self.text)):
            _refuse_unusable(text, _dotted(where, name) or name)
        return Item(self.instruction, self.text, self.images or (), self.video or ())


class _RecordFields(msgspec.Struct):
    """What a record may hold in a file, besides metadata at the top level."""

    id: _Text
    source: _Text
    query: _ItemFields
    positive: _ItemFields
    negatives: tuple[_ItemFields, ...] | None = None
    query_cot: _Text | None = None
    positive_cot: _Text | None = None
    metadata: dict[str, Any] | None = None


_REQUIRED = ("id", "source", "query", "positive")
_Fields = TypeVar("_Fields", bound=msgspec.Struct)


def checked_fields(data: Any, kind: type[_Fields], where: str | None) -> _Fields:
    """Return the named fields of an object.

    Args:
        data: The object.
        kind: What it may hold.
        where: Dotted name of the object in errors.

    Raises:
        RecordError: For the first field that is missing, unknown or of another type.
    """
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        complaint, _, path = str(error).partition(" - at `$")
        name = _dotted(where, path.strip(".`"))
        about = re.fullmatch("Object (contains|missing).* field `(.*)`", complaint)
        if about:
            is_unknown, key, known = about[1] == "contains", about[2], kind.__struct_fields__
            raise RecordError(
                f"unknown key {key!r}; expected only {list(known)}; rename or remove it"
                if is_unknown
                else f"{key} is missing; expected it beside {sorted(map(str, data))}; add it",
                reason="unknown_field" if is_unknown else "missing_field",
                field=_dotted(name, key),
            ) from error
        value = data
        for key, index in re.findall(r"\.(\w+)|\[(\d+)\]", path):
            value = value[key] if key else value[int(index)]
        expected = complaint.removeprefix("Expected ").partition(", got")[0]
        if "regex" in expected:
            expected = "a non-blank string"
        raise bad_type(value, expected, name) from error


def _metadata(data: Mapping[str, Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """Return the metadata with the unknown fields of the row."""
    merged, known = dict(metadata), _RecordFields.__struct_fields__
    for key in data:
        if key in known:
            continue
        # A misspelt field must not vanish into metadata: "negative" would train without negatives.
        twin = next((name for name in known if _letters(name) == _letters(str(key))), None)
        if twin is not None or key in merged:
            what = f"is it {twin!r}?" if twin else "metadata has the same key"
            raise RecordError(
                f"unknown field {key!r}: {what}; expected only {list(known)} or names unlike them "
                "and unlike the keys of metadata; rename it",
                reason="unknown_field",
                field=str(key),
            )
        merged[str(key)] = data[key]
    return merged


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "").rstrip("s")


def _dotted(where: str | None, name: str) -> str | None:
    return ".".join(part for part in (where, name) if part) or None
