"""Chat messages, as ms-swift and sentence-transformers write them, to items."""

from collections.abc import Mapping, Sequence
from typing import Any

from twn_rl.data.formats.conversion import Conversion
from twn_rl.data.formats.marks import count_marks
from twn_rl.data.record import Item, RecordError, bad_type


def item_of_messages(
    messages: Any,
    *,
    images: Any = (),
    videos: Any = (),
    conversion: Conversion,
    field: str,
) -> Item:
    """Return the item of one chat: a system message is the instruction, the other one the content.

    Args:
        messages: List of `{"role", "content"}`; a content is text or a list of typed parts.
        images: Pictures that `<image>` marks in the texts stand for, in order.
        videos: Videos (frames or folders of them) that `<video>` marks stand for; at most one.
        conversion: Settings and counts.
        field: Dotted name of the messages for errors.

    Raises:
        RecordError: For several turns, other parts than text, image and video, or marks that do
            not number as many as the pictures.
    """
    texts: dict[str, str] = {}
    found_images, found_videos = list(images or ()), list(videos or ())
    for i, message in enumerate(messages if isinstance(messages, Sequence) else [messages]):
        where = f"{field}[{i}]"
        role, content = _role_and_content(message, where)
        kind = "system" if role == "system" else "content"
        if kind in texts:
            raise RecordError(
                f"role = {role!r} is a second turn; expected one system message at most and one "
                "other; join the turns or leave the row out",
                reason="many_turns",
                field=where,
            )
        texts[kind], part_images, part_videos = _parts(content, where)
        found_images += part_images
        found_videos += part_videos
    _check_marks(" ".join(texts.values()), images, videos, field)
    if len(found_videos) > 1:
        raise RecordError(
            f"videos = {len(found_videos)}; expected one at most in an item; split the row",
            reason="many_videos",
            field=field,
        )
    pictures = conversion.pictures
    shown = pictures.paths(found_images, field=f"{field} images")
    frames = pictures.frames(found_videos[0], field=f"{field} videos") if found_videos else ()
    instruction, text = (
        conversion.strip(texts.get(kind), bool(shown or frames), field)
        for kind in ("system", "content")
    )
    return Item(instruction=instruction, text=text, images=shown, video=frames)


def _role_and_content(message: Any, where: str) -> tuple[str, Any]:
    if not isinstance(message, Mapping) or not {"role", "content"} <= set(message):
        raise bad_type(message, "a message with role and content", where)
    return str(message["role"]), message["content"]


def _parts(content: Any, where: str) -> tuple[str, list[Any], list[Any]]:
    """Return text, pictures and videos of a content."""
    if isinstance(content, str):
        return content, [], []
    texts: list[str] = []
    images: list[Any] = []
    videos: list[Any] = []
    for part in content if isinstance(content, list) else [content]:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url"):
            # Parts that hold nothing are marks for a picture of the row's own list.
            cell = part.get(kind, part.get("url", part.get("path")))
            images += [cell.get("url") if kind == "image_url" and isinstance(cell, dict) else cell]
        elif kind == "video":
            videos.append(part.get("video", part.get("path")))
        else:
            raise bad_type(part, "a part of type text, image or video", where)
    return "\n".join(texts), images, [video for video in videos if video]


def _check_marks(text: str, images: Any, videos: Any, field: str) -> None:
    """Refuse a row whose pictures and marks differ in number: some have been lost."""
    for kind, cells in (("image", images), ("video", videos)):
        marks, given = count_marks(text, kind), len(cells or ())
        if marks and marks != given:
            raise RecordError(
                f"<{kind}> marks = {marks} but {kind}s = {given}; expected as many of both; add "
                "the missing ones",
                reason="mark_without_image",
                field=field,
            )
