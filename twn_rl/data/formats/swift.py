"""ms-swift's embedding data: `--from swift`.

A row is `messages, images` with `positive_messages, positive_images` (lists of one chat) and
`negative_messages, negative_images` (lists of chats), `videos` likewise; a system message becomes
the instruction, the rest of a chat the text. Older rows are `query, response, rejected_response`
with one list of `images` for all of them in this order. A `label` (similarity, or 0 and 1) makes a
row a positive pair from `min_score` on.
"""

from collections.abc import Iterator
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Fields
from twn_rl.data.formats.input_files import Row, as_list, required
from twn_rl.data.formats.marks import count_marks
from twn_rl.data.formats.messages import item_of_messages
from twn_rl.data.record import Item, Record, RecordError

_KEPT = ("id", "source", "channel", "solution", "label")


def swift_records(row: Row, data: Fields, conversion: Conversion) -> Iterator[Record]:
    """Yield the record of an ms-swift row, if it is a positive pair."""
    audios = [data.get(f"{side}audios") for side in ("", "positive_", "negative_")]
    if any(audios):
        raise RecordError(
            "row has audio; expected text, images and video only; leave the row out",
            reason="audio",
        )
    if not conversion.is_positive(data.get("label"), field="label"):
        return
    query, positive, *negatives = (_chats if "messages" in data else _flat)(data, conversion)
    yield Record(
        id=row.name,
        source=row.subset,
        query=query,
        positive=positive,
        negatives=conversion.first_negatives(negatives),
        metadata=conversion.metadata(data, kept=_KEPT),
    )


def _chats(data: Fields, conversion: Conversion) -> list[Item]:
    """Return query, positive and negatives of a row of chats."""
    query = item_of_messages(
        required(data, "messages"),
        images=as_list(data.get("images")),
        videos=as_list(data.get("videos")),
        conversion=conversion,
        field="messages",
    )
    required(data, "positive_messages")
    positives = _side(data, "positive", conversion)
    if len(positives) != 1:
        raise RecordError(
            f"positive_messages = {len(positives)} chats; expected one; split the row",
            reason="bad_type",
            field="positive_messages",
        )
    return [query, *positives, *_side(data, "negative", conversion)]


def _side(data: Fields, side: str, conversion: Conversion) -> list[Item]:
    """Return the items of a list of chats, each with its own list of pictures."""
    chats = as_list(data.get(f"{side}_messages"))
    cells = {kind: as_list(data.get(f"{side}_{kind}")) for kind in ("images", "videos")}
    for kind, lists in cells.items():
        if lists and len(lists) != len(chats):
            raise RecordError(
                f"{side}_{kind} = {len(lists)} lists for {len(chats)} chats; expected one list per "
                "chat (empty for a chat without any); correct the row",
                reason="bad_type",
                field=f"{side}_{kind}",
            )
    return [
        item_of_messages(
            chat,
            images=as_list(cells["images"][i]) if cells["images"] else (),
            videos=as_list(cells["videos"][i]) if cells["videos"] else (),
            conversion=conversion,
            field=f"{side}_messages[{i}]",
        )
        for i, chat in enumerate(chats)
    ]


def _flat(data: Fields, conversion: Conversion) -> list[Item]:
    """Return the items of the older shape, dealing out the images by the marks of each text."""
    rejected = as_list(data.get("rejected_response"))
    texts = [required(data, "query"), required(data, "response"), *rejected]
    left = {kind: as_list(data.get(f"{kind}s")) for kind in ("image", "video")}
    items = []
    for i, text in enumerate(texts):
        own: dict[str, list[Any]] = {}
        for kind, cells in left.items():
            number = count_marks(text, kind) if isinstance(text, str) else 0
            own[kind], left[kind] = cells[:number], cells[number:]
        system = [{"role": "system", "content": data["system"]}] if data.get("system") else []
        items.append(
            item_of_messages(
                [*(system if i == 0 else []), {"role": "user", "content": text}],
                images=own["image"],
                videos=own["video"],
                conversion=conversion,
                field=("query", "response")[i] if i < 2 else f"rejected_response[{i - 2}]",
            )
        )
    if left["image"] or left["video"]:
        raise RecordError(
            f"images left over = {left['image'] + left['video']!r:.80}; expected a mark for each; "
            "add the marks or remove the images",
            reason="image_without_mark",
            field="images",
        )
    return items
