"""Columns as sentence-transformers reads them, by order: `--from sentence-transformers`.

(anchor, positive), (anchor, positive, negative, ...), and either with a `score` or `label` column:
a pair is a positive one from `min_score` on. A cell is a text, the path of a picture, an embedded
picture, `{"text", "image", "video", "instruction"}`, a list of messages, or (after the positive) a
list of cells. A text that ends like an image file and has no blanks is taken for a path.
Text and class (one column and a label) is refused: it names no pairs.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Outcome, build_each, required, text_of
from twn_rl.data.formats.messages import item_of_messages
from twn_rl.data.formats.pictures import IMAGE_SUFFIXES
from twn_rl.data.formats.rows import Row
from twn_rl.data.record import Item, Record, RecordError

# The names by which sentence-transformers itself tells labels from inputs.
_LABELS = ("label", "labels", "score", "scores")
# Columns that it strips or adds, never inputs.
_IGNORED = ("dataset_name", "return_loss")
_CELL = {"text", "image", "images", "video", "instruction"}


def convert_sentence_transformers(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of a file or folder whose columns count by their order.

    Raises:
        RecordError: If the first row has fewer than two inputs: no pairs can come of such data.
    """
    rows = conversion.rows()
    first = next(rows, None)
    if first is None:
        return iter(())
    columns = conversion.columns
    if not columns and not isinstance(first.data, RecordError):
        columns = tuple(name for name in first.data if name not in (*_LABELS, *_IGNORED))
    if not isinstance(first.data, RecordError) and len(columns) < 2:
        labels = [name for name in first.data if name in _LABELS]
        raise RecordError(
            f"columns = {list(columns)} with labels {labels}; expected an anchor and a positive at "
            "least: texts with classes name no pairs; build pairs of one class first",
            reason="bad_columns",
            file=first.file,
        )
    build = partial(_records, columns=columns, conversion=conversion)
    return build_each(chain([first], rows), build)


def _records(
    row: Row, data: Mapping[str, Any], *, columns: tuple[str, ...], conversion: Conversion
) -> Iterator[Record]:
    label = next((name for name in _LABELS if data.get(name) is not None), None)
    # A list of scores belongs to several documents (distillation) and says nothing of the pair.
    score = data[label] if label and not isinstance(data[label], list) else None
    if not conversion.is_positive(score, field=label or "score"):
        return
    query, positive, *others = (required(data, name) for name in columns)
    negatives = [
        _item(cell, f"{name}", conversion)
        for name, value in zip(columns[2:], others, strict=True)
        for cell in (value if _is_cell_list(value) else [value])
    ]
    yield Record(
        id=row.name,
        source=row.subset,
        query=_item(query, columns[0], conversion),
        positive=_item(positive, columns[1], conversion),
        negatives=conversion.first_negatives(negatives),
        metadata=conversion.metadata(data, used=columns, kept=(*_LABELS, *_IGNORED)),
    )


def _is_cell_list(value: Any) -> bool:
    return isinstance(value, list) and not (
        value and isinstance(value[0], Mapping) and "role" in value[0]
    )


def _item(cell: Any, field: str, conversion: Conversion) -> Item:
    pictures = conversion.pictures
    if isinstance(cell, str):
        if _is_picture_name(cell):
            return Item(images=pictures.paths(cell, field=field))
        return Item(text=cell)
    if isinstance(cell, list):
        return item_of_messages(cell, conversion=conversion, field=field)
    if isinstance(cell, Mapping) and set(cell) <= _CELL:
        return Item(
            instruction=text_of(cell, "instruction", where=f"{field}."),
            text=text_of(cell, "text", where=f"{field}."),
            images=pictures.paths(cell.get("images", cell.get("image")), field=f"{field}.image"),
            video=pictures.frames(cell.get("video"), field=f"{field}.video"),
        )
    return Item(images=pictures.paths(cell, field=field))


def _is_picture_name(text: str) -> bool:
    is_one_word = not any(character.isspace() for character in text)
    return is_one_word and (
        text.lower().endswith(IMAGE_SUFFIXES) or text.lower().startswith("data:image/")
    )
