"""UME-R1's training data: `--from ume-sft` and `--from ume-rl` (PLUME and Embed-RL share shapes).

SFT rows hold two chats, `qry` and `pos`, each `{"conversations": [human, gpt], "image" | "video"}`.
The human turn is the content (instruction and text unseparated: all of it stays in `text`), then
`<disc_emb>` and UME's own request to think, which is left behind. The gpt turn is
`<think>...</think>summary<gen_emb>`: the thought becomes `query_cot` or `positive_cot`, the summary
metadata. RL rows are flat (`qry_text, qry_image, qry_video, pos_...`), alone or listed by a YAML
file of `datasets: [{json_path, sampling_strategy}]`.
"""

import random
from collections.abc import Iterator, Mapping
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Fields, Outcome, fields_of
from twn_rl.data.formats.input_files import (
    Row,
    count_rows,
    find_files,
    read_rows,
    read_yaml,
    required,
    text_of,
)
from twn_rl.data.formats.marks import Thought, parse_thought
from twn_rl.data.record import Item, Record, bad_file, bad_type

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_DISC = "<disc_emb>"
_SAMPLING_SEED = 0


def ume_sft_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    """Yield the record of an SFT row."""
    query, query_thought = _chat(required(data, "qry"), "qry", "query", conversion)
    positive, positive_thought = _chat(required(data, "pos"), "pos", "positive", conversion)
    source = text_of(data, "dataset_name") or row.subset
    kept = conversion.metadata(data, kept=("id", "pos_text", "data_path"))
    yield Record(
        id=row.name,
        source=source,
        query=query,
        positive=positive,
        query_cot=query_thought.cot,
        positive_cot=positive_thought.cot,
        metadata={**kept, **query_thought.metadata, **positive_thought.metadata},
    )


def _chat(value: Any, field: str, side: str, conversion: Conversion) -> tuple[Item, Thought]:
    """Return the item and the thought of a chat about it."""
    chat = fields_of(value, "an object with conversations", field)
    turns = _turns(required(chat, "conversations", where=f"{field}."), f"{field}.conversations")
    content, disc, request = turns.get("user", "").partition(_DISC)
    if disc and request.strip():
        conversion.tally.notes["requests to think after <disc_emb>, left behind"] += 1
    item = conversion.item(
        {"conversations": content, "image": chat.get("image"), "video": chat.get("video")},
        text="conversations",
        image="image",
        video="video",
        where=f"{field}.",
        has_marks=True,
    )
    conversion.metadata(chat, prefix=f"{field}.")
    return item, parse_thought(turns.get("assistant"), side=side, notes=conversion.tally.notes)


def _turns(turns: Any, field: str) -> dict[str, str]:
    """Return the one text of each role."""
    texts: dict[str, str] = {}
    for turn in turns if isinstance(turns, list) else [turns]:
        said = turn if isinstance(turn, Mapping) else {}
        role = _ROLES.get(str(said.get("from", said.get("role"))))
        text = said.get("value", said.get("content"))
        if role is None or not isinstance(text, str) or role in texts:
            raise bad_type(turn, "one text from human and at most one from gpt", field)
        texts[role] = text
    return texts


def convert_ume_rl(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of RL rows: of a file, a folder, or the files a YAML file lists."""
    is_yaml = conversion.input.suffix in (".yaml", ".yml")
    rows = _listed_rows(conversion) if is_yaml else conversion.rows()
    return conversion.records(rows, _rl_records)


def _rl_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    sides = []
    for side in ("qry", "pos"):
        text, image, video = (f"{side}_{kind}" for kind in ("text", "image", "video"))
        required(data, text)
        sides.append(conversion.item(data, text=text, image=image, video=video, has_marks=True))
    source = text_of(data, "dataset_name") or row.subset
    metadata = conversion.metadata(data, kept=("id", "solution", "problem"))
    yield Record(row.name, source, *sides, metadata=metadata)


def _listed_rows(conversion: Conversion) -> Iterator[Row]:
    expected = "datasets: [{json_path, sampling_strategy}]"
    data = read_yaml(conversion.input, expected)
    try:
        entries = [(str(entry["json_path"]), entry) for entry in data["datasets"]]
    except (KeyError, TypeError) as error:
        raise bad_file(
            conversion.input,
            f"no list of data sets ({error!r}); expected {expected}; correct the file",
        ) from error
    # Paths stand relative to the data root; all are looked up before the first row is read.
    found = [
        (file._replace(subset=Path(path).with_suffix("").as_posix()), entry)
        for path, entry in entries
        for file in find_files(conversion.data_root / path)
    ]
    return chain.from_iterable(
        _sampled(file.path, read_rows([file]), str(entry.get("sampling_strategy", "all")))
        for file, entry in found
    )


def _sampled(path: Path, rows: Iterator[Row], strategy: str) -> Iterator[Row]:
    """Yield the rows that `all`, `first:N`, `end:N` or `random:N` chooses; N may end in %."""
    kind, _, number = strategy.partition(":")
    if kind == "all" and not number:
        yield from rows
        return
    digits = number.removesuffix("%")
    if kind not in ("first", "end", "random") or not digits.isdigit():
        raise bad_file(
            path,
            f"sampling_strategy = {strategy!r}; expected all, first:N, end:N or random:N, where N "
            "is a number or a percentage; correct the entry",
        )
    total = count_rows(path)
    size = min(total, ceil(int(digits) * total / 100) if "%" in number else int(digits))
    if kind == "random":
        chosen = set(random.Random(_SAMPLING_SEED).sample(range(1, total + 1), size))
    else:
        start = 1 if kind == "first" else total - size + 1
        chosen = set(range(start, start + size))
    yield from (row for row in rows if row.position in chosen)
