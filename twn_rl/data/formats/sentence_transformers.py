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

from twn_rl.data.formats.conversion import Conversion, Fields, Outcome
from twn_rl.data.formats.input_files import Row, required
from twn_rl.data.formats.messages import item_of_messages
from twn_rl.data.formats.pictures import IMAGE_SUFFIXES
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
    return conversion.records(chain([first], rows), partial(_records, columns))


def _records(
    columns: tuple[str, ...], row: Row, data: Fields, conversion: Conversion
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
        metadata=conversion.metadata(data, kept=(*_LABELS, *_IGNORED)),
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
        image = "images" if "images" in cell else "image"
        return conversion.item(
            cell, image=image, video="video", instruction="instruction", where=f"{field}."
        )
    return Item(images=pictures.paths(cell, field=field))


def _is_picture_name(text: str) -> bool:
    is_one_word = not any(character.isspace() for character in text)
    return is_one_word and (
        text.lower().endswith(IMAGE_SUFFIXES) or text.lower().startswith("data:image/")
    )
