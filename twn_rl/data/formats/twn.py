"""The training data of Think When Needed (TWN): `--from twn`.

Public pages show a JSON list of `{"data_info": {"data_type", "dataset_name", "data_id"}, "query":
{"text", "image", ...}, ...}` and the schemes of its image URIs, and no more. The names of the other
side and of the chains of thought are therefore settings (`positive_field`, `cot_field`), whose
defaults are assumptions; a row without the first is refused with the names it does have, rows
without the second are counted. A chain of thought is looked for in each side (`query.cot`) and
beside it (`query_cot`). A URI `scheme://path` is the path in the data root's folder of that name,
unless `uri_folders` names another. Texts hold instruction and text unseparated.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Fields, fields_of
from twn_rl.data.formats.input_files import Row, as_list, required, text_of
from twn_rl.data.formats.marks import Thought, thought_of
from twn_rl.data.record import Item, Record, RecordError

SCHEMES = ("mmeb_train", "sharegpt_video", "visrag_in_domain", "visrag_synthetic", "vidore_colpali")
_URI = re.compile(r"^(\w+)://(.+)$")


def twn_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    """Yield the record of a TWN row."""
    expected = "an object with data_type, dataset_name and data_id"
    info = fields_of(required(data, "data_info"), expected, "data_info")
    source = text_of(info, "dataset_name", where="data_info.") or row.subset
    number = info.get("data_id")
    kept = conversion.metadata(info, kept=("data_type",), prefix="data_info.")
    positive_field, cot = conversion.positive_field, conversion.cot_field
    if positive_field not in data:
        raise RecordError(
            f"positive_field = {positive_field!r} is missing; expected the other side of the pair "
            f"under one of {sorted(set(data) - {'data_info', 'query'})}; set positive_field",
            reason="missing_field",
            field=positive_field,
        )
    query, query_thought = _side(data, "query", "query", conversion)
    positive, positive_thought = _side(data, positive_field, "positive", conversion)
    if query_thought.cot is None and positive_thought.cot is None:
        conversion.tally.notes[f"rows without a chain of thought under {cot!r}"] += 1
    negatives = enumerate(as_list(data.get("negatives")))
    items = [_item(side, f"negatives[{i}]", conversion) for i, side in negatives]
    conversion.metadata(data, used=(f"query_{cot}", f"{positive_field}_{cot}"))
    yield Record(
        id=row.name if number is None else f"{source}/{number}",
        source=source,
        query=query,
        positive=positive,
        negatives=conversion.first_negatives(items),
        query_cot=query_thought.cot,
        positive_cot=positive_thought.cot,
        metadata={**kept, **query_thought.metadata, **positive_thought.metadata},
    )


def _side(data: Fields, field: str, side: str, conversion: Conversion) -> tuple[Item, Thought]:
    content, cot = required(data, field), conversion.cot_field
    item = _item(content, field, conversion)
    within = isinstance(content, Mapping) and cot in content
    found = (content, cot) if within else (data, f"{field}_{cot}")
    return item, thought_of(*found, side=side, notes=conversion.tally.notes)


def _item(content: Any, field: str, conversion: Conversion) -> Item:
    if isinstance(content, str):
        content = {"text": content}
    fields = fields_of(content, "an object with text, image or video", field)
    fields |= {kind: _local(fields.get(kind), conversion) for kind in ("image", "video")}
    item = conversion.item(
        fields,
        image="image",
        video="video",
        instruction="instruction",
        where=f"{field}.",
        has_marks=True,
    )
    conversion.metadata(fields, used=(conversion.cot_field,), prefix=f"{field}.")
    return item


def _local(cell: Any, conversion: Conversion) -> Any:
    """Return a path for a URI of one of TWN's schemes, also within lists; all else as it is."""
    if isinstance(cell, list):
        return [_local(part, conversion) for part in cell]
    match = _URI.match(cell) if isinstance(cell, str) else None
    folders = {**{scheme: scheme for scheme in SCHEMES}, **conversion.uri_folders}
    return f"{folders[match[1]]}/{match[2]}" if match and match[1] in folders else cell
