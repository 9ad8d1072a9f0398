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
from functools import partial
from typing import Any

from twn_rl.data.formats.conversion import (
    Conversion,
    Outcome,
    as_list,
    build_each,
    required,
    text_of,
)
from twn_rl.data.formats.marks import Thought, strip_marks, thought_of
from twn_rl.data.formats.rows import Row
from twn_rl.data.record import Item, Record, RecordError

SCHEMES = ("mmeb_train", "sharegpt_video", "visrag_in_domain", "visrag_synthetic", "vidore_colpali")
_URI = re.compile(r"^(\w+)://(.+)$")


def convert_twn(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of a TWN file, or of all files of a folder."""
    return build_each(conversion.rows(), partial(_records, conversion=conversion))


def _records(row: Row, data: Mapping[str, Any], *, conversion: Conversion) -> Iterator[Record]:
    info = required(data, "data_info")
    positive_field, cot = conversion.positive_field, conversion.cot_field
    if not isinstance(info, Mapping):
        raise RecordError(
            f"value = {info!r:.80}; expected data_type, dataset_name and data_id; correct the row",
            reason="bad_type",
            field="data_info",
        )
    kept = conversion.metadata(
        info, used=("dataset_name", "data_id"), kept=("data_type",), prefix="data_info."
    )
    if positive_field not in data:
        raise RecordError(
            f"positive_field = {positive_field!r} is missing; expected the other side of the pair "
            f"under one of {sorted(set(data) - {'data_info', 'query'})}; set positive_field",
            reason="missing_field",
            field=positive_field,
        )
    query, query_thought = _side(data, "query", "query", conversion)
    positive, positive_thought = _side(data, positive_field, "positive", conversion)
    used = ("data_info", "query", positive_field, f"query_{cot}", f"{positive_field}_{cot}")
    conversion.metadata(data, used=(*used, "negatives"))
    if query_thought.cot is None and positive_thought.cot is None:
        conversion.tally.note(f"rows without a chain of thought under {cot!r}")
    source = text_of(info, "dataset_name", where="data_info.") or row.subset
    number = info.get("data_id")
    yield Record(
        id=row.name if number is None else f"{source}/{number}",
        source=source,
        query=query,
        positive=positive,
        negatives=conversion.first_negatives(
            [
                _item(side, f"negatives[{i}]", conversion)
                for i, side in enumerate(as_list(data.get("negatives")))
            ]
        ),
        query_cot=query_thought.cot,
        positive_cot=positive_thought.cot,
        metadata={**kept, **query_thought.metadata, **positive_thought.metadata},
    )


def _side(
    data: Mapping[str, Any], field: str, side: str, conversion: Conversion
) -> tuple[Item, Thought]:
    content = required(data, field)
    cot, notes = conversion.cot_field, conversion.tally.notes
    item = _item(content, field, conversion)
    within = isinstance(content, Mapping) and cot in content
    found = (content, cot) if within else (data, f"{field}_{cot}")
    return item, thought_of(*found, side=side, notes=notes)


def _item(content: Any, field: str, conversion: Conversion) -> Item:
    if isinstance(content, str):
        content = {"text": content}
    if not isinstance(content, Mapping):
        raise RecordError(
            f"value = {content!r:.80}; expected an object with text, image or video; correct it",
            reason="bad_type",
            field=field,
        )
    used = ("text", "image", "video", "instruction", conversion.cot_field)
    conversion.metadata(content, used=used, prefix=f"{field}.")
    pictures = conversion.pictures
    images = pictures.paths(
        [_local(cell, conversion) for cell in as_list(content.get("image"))], field=f"{field}.image"
    )
    video = content.get("video")
    frames = [_local(cell, conversion) for cell in video] if isinstance(video, list) else None
    found = pictures.frames(
        _local(video, conversion) if frames is None else frames, field=f"{field}.video"
    )
    text = strip_marks(
        text_of(content, "text", where=f"{field}."),
        has_pictures=bool(images or found),
        notes=conversion.tally.notes,
        field=f"{field}.text",
    )
    instruction = text_of(content, "instruction", where=f"{field}.")
    return Item(instruction=instruction, text=text, images=images, video=found)


def _local(cell: Any, conversion: Conversion) -> Any:
    """Return a path for a URI of one of TWN's schemes, and anything else as it is."""
    match = _URI.match(cell) if isinstance(cell, str) else None
    folders = {**{scheme: scheme for scheme in SCHEMES}, **conversion.uri_folders}
    return f"{folders[match[1]]}/{match[2]}" if match and match[1] in folders else cell
