"""Inputs as clients send them -> items, within limits. No path and no address is ever opened."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from twn_rl.data.images import ImageError, image_of_bytes
from twn_rl.data.record import Item
from twn_rl.inference.inputs import InputError, InputRules, parse_input
from twn_rl.modeling.limits import PromptLimits
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.settings import ServeSettings

_SHOWN_CHARACTERS = 60


@dataclass(frozen=True)
class Received:
    """One input of a request.

    Attributes:
        where: Its name in the request, for errors.
        text: Its text.
        pictures: Data URIs.
        instruction: What to do with it.
    """

    where: str
    text: str | None = None
    pictures: tuple[str, ...] = ()
    instruction: str | None = None


def received_messages(messages: Sequence[Mapping[str, Any]], where: str) -> Received:
    """Return the input of chat messages: a user message, before it perhaps an instruction.

    Raises:
        ServiceError: For other roles or parts.
    """
    roles = [message.get("role") for message in messages]
    if roles not in (["user"], ["system", "user"]):
        raise refusal(
            where,
            f"roles = {str(roles)[:_SHOWN_CHARACTERS]}; expected one user message, or a system "
            "message (the instruction) and a user message; thoughts are written by the model",
        )
    parts = [
        received_parts(message.get("content"), f"{where}.{number}.content")
        for number, message in enumerate(messages)
    ]
    if len(parts) == 1:
        return replace(parts[0], where=where)
    if parts[0].pictures:
        raise refusal(where, "the system message holds pictures; expected text only; move them")
    return replace(parts[1], where=where, instruction=parts[0].text)


def received_parts(content: Any, where: str) -> Received:
    """Return the input of a message's content: a string, or parts of text and pictures.

    Raises:
        ServiceError: For other parts.
    """
    if isinstance(content, str):
        return Received(where, content)
    if not isinstance(content, list):
        raise refusal(where, "content is no string and no list; expected text or a list of parts")
    texts: list[str] = []
    pictures: list[str] = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        value = part.get(kind) if isinstance(part, Mapping) and isinstance(kind, str) else None
        if kind == "image_url" and isinstance(value, Mapping):
            value = value.get("url")  # `detail` is a hint about cost that nothing here depends on
        if kind not in ("text", "image_url") or not isinstance(value, str):
            raise refusal(
                f"{where}.{number}",
                f"part = {str(part)[:_SHOWN_CHARACTERS]!r}; expected type text or image_url, and "
                "a string under the same name; correct the part",
            )
        (texts if kind == "text" else pictures).append(value)
    return Received(where, "\n".join(texts) or None, tuple(pictures))


def refusal(
    where: str, problem: str, *, status: int = 400, code: str = "bad_input"
) -> ServiceError:
    """Return the error of one input."""
    return ServiceError(status, f"{where}: {problem}", code=code, param=where)


def to_item(
    received: Received, rules: InputRules, settings: ServeSettings, max_pixels: int | None
) -> Item:
    """Return the item of an input, its pictures decoded and scaled to the model's limit.

    Args:
        received: The input.
        rules: What the model can be shown.
        settings: Limits.
        max_pixels: Largest picture the model is shown; None is unlimited.

    Raises:
        ServiceError: For an input that is above a limit, damaged, or nothing the model reads.
    """
    where = received.where
    characters = len(received.text or "") + len(received.instruction or "")
    if characters > settings.max_text_characters:
        raise refusal(
            where,
            f"text of {characters} characters; expected at most {settings.max_text_characters}; "
            "shorten or split it",
            status=413,
            code="text_too_long",
        )
    if len(received.pictures) > settings.max_pictures:
        raise refusal(
            where,
            f"{len(received.pictures)} pictures; expected at most {settings.max_pictures}; drop "
            "some",
            status=413,
            code="too_many_pictures",
        )
    pictures = [_picture(uri, where, settings) for uri in received.pictures]
    value = {"text": received.text, "images": pictures, "instruction": received.instruction}
    try:
        item = parse_input(value, 0, rules)
        return PromptLimits(max_image_pixels=max_pixels).open(item)
    except InputError as error:
        raise refusal(where, error.problem) from error
    except ImageError as error:
        raise refusal(where, str(error), code=error.reason) from error


def _picture(uri: str, where: str, settings: ServeSettings) -> Image.Image:
    """Return the picture of a data URI, of which only the size is known yet."""
    head, comma, encoded = uri.partition(",")
    if not head.startswith("data:image/") or not head.endswith(";base64") or not comma:
        raise refusal(
            where,
            f"picture = {uri[:_SHOWN_CHARACTERS]!r}; expected data:image/...;base64,...; nothing "
            "is fetched and no file is read for a client: send the bytes",
            code="no_data_uri",
        )
    try:
        picture = image_of_bytes(base64.b64decode(encoded, validate=True))
    except binascii.Error as error:
        raise refusal(where, f"picture is no base64 ({error}); encode it again") from error
    except ImageError as error:
        raise refusal(where, str(error), code=error.reason) from error
    width, height = picture.size
    if width * height > settings.max_picture_pixels:
        raise refusal(
            where,
            f"picture of {width} x {height} pixels; expected at most "
            f"{settings.max_picture_pixels} pixels; scale it down",
            status=413,
            code="picture_too_large",
        )
    return picture
