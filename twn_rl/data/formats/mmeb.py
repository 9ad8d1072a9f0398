"""MMEB-train, VLM2Vec's training pairs: `--from mmeb`.

A row is `qry, qry_image_path, pos_text, pos_image_path` and, in some files, `neg_text,
neg_image_path` (one of each, or lists). `qry` holds instruction and text in one string without a
mark between them: all of it stays in `text`. Image paths are relative to the data root.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import zip_longest
from typing import Any

from twn_rl.data.formats.conversion import (
    Conversion,
    Outcome,
    as_list,
    build_each,
    required,
    text_of,
)
from twn_rl.data.formats.marks import strip_marks
from twn_rl.data.formats.pictures import Pictures
from twn_rl.data.formats.rows import Row
from twn_rl.data.record import Item, Record

_USED = ("qry", "qry_image_path", "pos_text", "pos_image_path", "neg_text", "neg_image_path")


def convert_mmeb(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of an MMEB-train folder (all its subsets) or of one file of it."""
    build = partial(mmeb_records, conversion=conversion, pictures=conversion.pictures)
    return build_each(conversion.rows(), build)


def mmeb_records(
    row: Row, data: Mapping[str, Any], *, conversion: Conversion, pictures: Pictures
) -> Iterator[Record]:
    """Yield the record of an MMEB row whose images are looked up by `pictures`."""
    item = partial(_item, conversion=conversion, pictures=pictures)
    negatives = zip_longest(as_list(data.get("neg_text")), as_list(data.get("neg_image_path")))
    yield Record(
        id=row.name,
        source=row.subset,
        query=item(required(data, "qry"), data.get("qry_image_path"), side="qry"),
        positive=item(required(data, "pos_text"), data.get("pos_image_path"), side="pos"),
        negatives=conversion.first_negatives(
            [item(text, image, side="neg") for text, image in negatives if text or image]
        ),
        metadata=conversion.metadata(data, used=_USED),
    )


def _item(text: Any, image: Any, *, side: str, conversion: Conversion, pictures: Pictures) -> Item:
    path = pictures.path(image, field=f"{side}_image_path")
    bare = strip_marks(
        text_of({f"{side}_text": text}, f"{side}_text"),
        has_pictures=path is not None,
        notes=conversion.tally.notes,
        field=f"{side}_text",
    )
    return Item(text=bare, images=() if path is None else (path,))
