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
from functools import partial
from itertools import chain
from math import ceil
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Outcome, build_each, required, text_of
from twn_rl.data.formats.extras import import_extra
from twn_rl.data.formats.layout import find_files
from twn_rl.data.formats.marks import Thought, parse_thought, strip_marks
from twn_rl.data.formats.rows import Row, count_rows, read_rows
from twn_rl.data.record import Item, Record, RecordError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_DISC = "<disc_emb>"
_SAMPLING_SEED = 0


def convert_ume_sft(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of a file of SFT rows, or of all files of a folder."""
    return build_each(conversion.rows(), partial(_sft_records, conversion=conversion))


def convert_ume_rl(conversion: Conversion) -> Iterator[Outcome]:
    """Yield the records of RL rows: of a file, a folder, or the files a YAML file lists."""
    is_yaml = conversion.input.suffix in (".yaml", ".yml")
    rows = _listed_rows(conversion) if is_yaml else conversion.rows()
    return build_each(rows, partial(_rl_records, conversion=conversion))


def _sft_records(row: Row, data: Mapping[str, Any], *, conversion: Conversion) -> Iterator[Record]:
    query, query_thought = _chat(required(data, "qry"), "qry", "query", conversion)
    positive, positive_thought = _chat(required(data, "pos"), "pos", "positive", conversion)
    kept = conversion.metadata(
        data, used=("qry", "pos", "dataset_name"), kept=("id", "pos_text", "data_path")
    )
    yield Record(
        id=row.name,
        source=text_of(data, "dataset_name") or row.subset,
        query=query,
        positive=positive,
        query_cot=query_thought.cot,
        positive_cot=positive_thought.cot,
        metadata={**kept, **query_thought.metadata, **positive_thought.metadata},
    )


def _chat(chat: Any, field: str, side: str, conversion: Conversion) -> tuple[Item, Thought]:
    """Return the item and the thought of a chat about it."""
    if not isinstance(chat, Mapping):
        raise RecordError(
            f"value = {chat!r:.80}; expected an object with conversations; correct the row",
            reason="bad_type",
            field=field,
        )
    conversion.metadata(chat, used=("conversations", "image", "video"), prefix=f"{field}.")
    turns = _turns(required(chat, "conversations", where=f"{field}."), f"{field}.conversations")
    pictures, notes = conversion.pictures, conversion.tally.notes
    images = pictures.paths(chat.get("image"), field=f"{field}.image")
    video = pictures.frames(chat.get("video"), field=f"{field}.video")
    content, disc, request = turns.get("user", "").partition(_DISC)
    if disc and request.strip():
        notes["requests to think after <disc_emb>, left behind"] += 1
    text = strip_marks(
        content, has_pictures=bool(images or video), notes=notes, field=f"{field}.conversations"
    )
    thought = parse_thought(turns.get("assistant"), side=side, notes=notes)
    return Item(text=text, images=images, video=video), thought


def _turns(turns: Any, field: str) -> dict[str, str]:
    """Return the one text of each role."""
    texts: dict[str, str] = {}
    for turn in turns if isinstance(turns, list) else [turns]:
        role = turn.get("from", turn.get("role")) if isinstance(turn, Mapping) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(text, str) or _ROLES[role] in texts:
            raise RecordError(
                f"turn = {turn!r:.80}; expected one text from human and at most one from gpt; "
                "correct the row",
                reason="bad_type",
                field=field,
            )
        texts[_ROLES[role]] = text
    return texts


def _rl_records(row: Row, data: Mapping[str, Any], *, conversion: Conversion) -> Iterator[Record]:
    used = [f"{side}_{kind}" for side in ("qry", "pos") for kind in ("text", "image", "video")]
    yield Record(
        id=row.name,
        source=text_of(data, "dataset_name") or row.subset,
        query=_flat_item(data, "qry", conversion),
        positive=_flat_item(data, "pos", conversion),
        metadata=conversion.metadata(
            data, used=[*used, "dataset_name"], kept=("id", "solution", "problem")
        ),
    )


def _flat_item(data: Mapping[str, Any], side: str, conversion: Conversion) -> Item:
    required(data, f"{side}_text")
    images = conversion.pictures.paths(data.get(f"{side}_image"), field=f"{side}_image")
    video = conversion.pictures.frames(data.get(f"{side}_video"), field=f"{side}_video")
    text = strip_marks(
        text_of(data, f"{side}_text"),
        has_pictures=bool(images or video),
        notes=conversion.tally.notes,
        field=f"{side}_text",
    )
    return Item(text=text, images=images, video=video)


def _listed_rows(conversion: Conversion) -> Iterator[Row]:
    yaml = import_extra("yaml", package="yaml", extra="train", purpose="YAML files")
    try:
        data = yaml.safe_load(conversion.input.read_text(encoding="utf-8"))
        entries = [(str(entry["json_path"]), entry) for entry in data["datasets"]]
    except (yaml.YAMLError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise RecordError(
            f"no list of data sets ({error!r}); expected datasets: [{{json_path, "
            "sampling_strategy}]; correct the file",
            reason="bad_file",
            file=conversion.input,
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
        raise RecordError(
            f"sampling_strategy = {strategy!r}; expected all, first:N, end:N or random:N, where N "
            "is a number or a percentage; correct the entry",
            reason="bad_file",
            file=path,
        )
    total = count_rows(path)
    size = min(total, ceil(int(digits) * total / 100) if "%" in number else int(digits))
    if kind == "random":
        chosen = set(random.Random(_SAMPLING_SEED).sample(range(1, total + 1), size))
    else:
        start = 1 if kind == "first" else total - size + 1
        chosen = set(range(start, start + size))
    yield from (row for row in rows if row.position in chosen)
