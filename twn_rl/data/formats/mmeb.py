"""MMEB-train, VLM2Vec's training pairs: `--from mmeb`.

A row is `qry, qry_image_path, pos_text, pos_image_path` and, in some files, `neg_text,
neg_image_path` (one of each, or lists). `qry` holds instruction and text in one string without a
mark between them: all of it stays in `text`. Image paths are relative to the data root.
"""

from collections.abc import Iterator, Mapping
from itertools import zip_longest
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Fields
from twn_rl.data.formats.input_files import Row, as_list, required
from twn_rl.data.record import Item, Record


def mmeb_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    """Yield the record of an MMEB row."""

    def item(side: Mapping[str, Any], text: str, image: str) -> Item:
        return conversion.item(side, text=text, image=image, has_marks=True)

    required(data, "qry")
    required(data, "pos_text")
    pairs = zip_longest(as_list(data.get("neg_text")), as_list(data.get("neg_image_path")))
    negatives = [{"neg_text": t, "neg_image_path": image} for t, image in pairs if t or image]
    yield Record(
        id=row.name,
        source=row.subset,
        query=item(data, "qry", "qry_image_path"),
        positive=item(data, "pos_text", "pos_image_path"),
        negatives=conversion.first_negatives(
            [item(negative, "neg_text", "neg_image_path") for negative in negatives]
        ),
        metadata=conversion.metadata(data),
    )
