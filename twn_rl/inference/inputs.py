"""What people hand to `encode` -> items, and which position is wrong. Decodes no pictures."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twn_rl.data.images import ImageSource, open_image
from twn_rl.data.markup import unusable_character
from twn_rl.data.record import Item

_DICT_KEYS = ("text", "image", "images", "video", "instruction")
_PICTURE_NAME = re.compile(
    r"\S+\.(png|jpe?g|webp|gif|bmp|tiff?|avif|jp2|ppm|mp4|avi|mov|mkv|webm)", re.IGNORECASE
)
_ACCEPTED = "a string, a PIL image, a pathlib.Path of a picture, a dict, chat messages or an Item"

logger = logging.getLogger(__name__)


class InputError(ValueError):
    """An input that cannot be embedded.

    Attributes:
        position: Its place among the inputs.
        problem: The message without the position.
    """

    def __init__(self, position: int, problem: str) -> None:
        """Compose the message."""
        super().__init__(f"input {position}: {problem}")
        self.position, self.problem = position, problem

    def __reduce__(self) -> tuple[Any, ...]:
        # Exceptions pickle their message only.
        return InputError, (self.position, self.problem)


@dataclass(frozen=True)
class InputRules:
    """What is checked and filled in while inputs become items.

    Attributes:
        instruction: For inputs that bring none of their own.
        is_multimodal: Whether pictures are allowed.
    """

    instruction: str | None = None
    is_multimodal: bool = True


def is_single(inputs: Any) -> bool:
    """Return whether `inputs` is one input and not a list of them.

    A list whose first element is a dict with "role" is one conversation.

    >>> is_single("camel"), is_single(["camel"]), is_single([{"role": "user", "content": "camel"}])
    (True, False, True)
    """
    if isinstance(inputs, str | bytes | Path | Image.Image | Mapping | Item):
        return True
    return getattr(inputs, "ndim", 0) == 3 or _is_conversation(inputs)


def as_list(inputs: Any) -> list[Any]:
    """Return the inputs of one call as a list.

    Raises:
        TypeError: If they have no fixed order and length.
    """
    if is_single(inputs):
        return [[inputs] if _is_message(inputs) else inputs]
    # Columns of data frames and data sets have no common class, but a length and an order.
    if hasattr(inputs, "__getitem__") and hasattr(inputs, "__len__"):
        return list(inputs)
    raise TypeError(
        f"inputs is a {type(inputs).__name__}; expected {_ACCEPTED}, or a list of these; "
        "turn it into a list"
    )


def parse_input(value: Any, position: int, rules: InputRules) -> Item:
    """Return the item of one input; pictures stay unopened, but files must exist.

    Args:
        value: Any of what `ThinkingEmbedder.encode` takes.
        position: Its place among the inputs, for errors.
        rules: What to check.

    Raises:
        InputError: If it cannot be embedded.
    """
    try:
        item = _item(value)
        _check(item, rules)
    except (ValueError, TypeError, OSError) as error:  # OSError: names too long for the system
        raise InputError(position, str(error)) from error
    if rules.instruction and not item.instruction:
        item = replace(item, instruction=rules.instruction)
    return item


def _item(value: Any) -> Item:
    if isinstance(value, Item):
        return value
    if isinstance(value, str):
        return Item(text=value)
    if isinstance(value, Image.Image | Path):
        return Item(images=(value,))
    if _is_message(value):
        return _from_messages([value])
    if isinstance(value, Mapping):
        return _from_dict(value)
    if _is_conversation(value):
        return _from_messages(value)
    if hasattr(value, "ndim"):
        return Item(images=(picture_of(value),))
    raise TypeError(_wrong("value", value, _ACCEPTED))


def _from_dict(value: Mapping[str, Any]) -> Item:
    unknown = [key for key in value if key not in _DICT_KEYS]
    if unknown:
        raise ValueError(
            f"unknown keys {unknown}; expected only {list(_DICT_KEYS)}; rename or remove them"
        )
    if value.get("image") is not None and value.get("images") is not None:
        raise ValueError("both image and images are given; expected one; put all into images")
    image, images, text = value.get("image"), value.get("images"), value.get("text")
    if isinstance(text, list | tuple):  # as sentence-transformers has several texts of one input
        text = "\n".join(_optional_text(part, "text") or "" for part in text)
    if image is not None:
        images = image if isinstance(image, list | tuple) else [image]
    return Item(
        instruction=_optional_text(value.get("instruction"), "instruction"),
        text=_optional_text(text, "text"),
        images=_sources(images, "images"),
        video=_sources(value.get("video"), "video"),
    )


def _from_messages(messages: Sequence[Any]) -> Item:
    """Return the item of a system message (its instruction) and a user message.

    The model's own renderer lays the item out again: training and serving share one template.
    """
    roles = [m.get("role") if isinstance(m, Mapping) else type(m).__name__ for m in messages]
    if roles not in (["user"], ["system", "user"]):
        raise ValueError(
            f"roles = {roles}; expected one user message, or a system message (the instruction) "
            "and a user message; join turns into one, thoughts are written by the model itself"
        )
    parts = [_content(message) for message in messages]
    if len(parts) == 2 and (parts[0].images or parts[0].video):
        raise ValueError(
            "the system message holds pictures; expected text only; move them to the user message"
        )
    instruction = parts[0].text if len(parts) == 2 else None
    return replace(parts[-1], instruction=instruction)


def _content(message: Mapping[str, Any]) -> Item:
    content = message.get("content")
    unknown = sorted(set(message) - {"role", "content"})
    if unknown or not isinstance(content, str | list | tuple):
        raise ValueError(
            f"message = {str(message)[:80]!r}; expected only role and content, and as content a "
            "string or a list of parts; correct the message"
        )
    if isinstance(content, str):
        return Item(text=content)
    texts: list[str] = []
    images: list[ImageSource] = []
    video: list[ImageSource] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        keys = set(part) - {"type"} if isinstance(part, Mapping) else set()
        if kind == "text" and keys == {"text"}:
            texts.append(_optional_text(part["text"], "text") or "")
        elif kind == "image" and keys == {"image"}:
            images += _sources([part["image"]], "image")
        elif kind == "image_url" and keys == {"image_url"}:
            url = part["image_url"]
            images += _sources([url.get("url") if isinstance(url, Mapping) else url], "image_url")
        elif kind == "video" and keys == {"video"}:
            video += _sources(part["video"], "video")
        else:
            raise ValueError(
                f"content part = {str(part)[:80]!r}; expected type text, image, image_url or video "
                "and the value under the same name; correct the part"
            )
    return Item(text="\n".join(texts) or None, images=tuple(images), video=tuple(video))


def _check(item: Item, rules: InputRules) -> None:
    sources = (*item.images, *item.video)
    if not ((item.text or "").strip() or (item.instruction or "").strip() or sources):
        raise ValueError(
            f"text = {item.text!r} without pictures; expected non-blank text or a picture; "
            "fill the input or leave it out"
        )
    if sources and not rules.is_multimodal:
        raise ValueError(
            f"{len(sources)} pictures for a backbone that reads text only; expected none; "
            "use a vision-language backbone or drop the pictures"
        )
    for text in (item.instruction, item.text, rules.instruction):
        found = unusable_character(text or "")
        if found:
            raise ValueError(
                f"text = {str(text)[:80]!r} holds {found}; expected text without NUL and without "
                "halves of surrogate pairs; remove it, or decode the text anew"
            )
    for source in sources:
        # Found now, a missing file does not cost what other inputs were computed for.
        if not isinstance(source, Image.Image) and not Path(source).is_file():
            open_image(source)  # raises the message for missing files and URLs


def _is_conversation(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and _is_message(value[0])


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and "role" in value


def picture_of(array: Any) -> Image.Image:
    """Return the picture of bytes (H, W, 3) or (3, H, W), an array or a tensor.

    Raises:
        TypeError: For other shapes and types: what their numbers mean is not known.
    """
    pixels = np.asarray(array.cpu() if hasattr(array, "cpu") else array)
    if pixels.ndim == 3 and pixels.shape[-1] != 3 and pixels.shape[0] == 3:
        pixels = np.moveaxis(pixels, 0, -1)
    if pixels.ndim != 3 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
        raise TypeError(
            f"an array of shape {pixels.shape} and type {pixels.dtype}; expected a picture as "
            "uint8 (height, width, 3) or (3, height, width); convert it, or pass a PIL image"
        )
    return Image.fromarray(np.ascontiguousarray(pixels))


def warn_of_file_names(values: Sequence[Any]) -> None:
    """Warn if strings look like pictures' files, which sentence-transformers would open."""
    alike = [v for v in values if isinstance(v, str) and _PICTURE_NAME.fullmatch(v)]
    if alike:
        logger.warning(
            "%d of %d inputs are strings that look like names of pictures (%.80r): a string is "
            "always text here; pass pathlib.Path(name) or {'image': name} for the picture",
            *(len(alike), len(values), alike[0]),
        )


def _optional_text(value: Any, name: str) -> str | None:
    if value is not None and not isinstance(value, str):
        raise TypeError(_wrong(name, value, "a string or None"))
    return value


def _sources(value: Any, name: str) -> tuple[ImageSource, ...]:
    if value is None:
        return ()
    if getattr(value, "ndim", 0) == 4:
        value = list(value)  # frames of a video, (T, H, W, 3) or (T, 3, H, W)
    if not isinstance(value, list | tuple):
        raise TypeError(_wrong(name, value, "a list of PIL images or paths"))
    value = [picture_of(source) if hasattr(source, "ndim") else source for source in value]
    for index, source in enumerate(value):
        if not isinstance(source, Image.Image | Path | str) or not str(source):
            raise TypeError(_wrong(f"{name}[{index}]", source, "a PIL image or a path"))
    return tuple(value)


def _wrong(name: str, value: Any, expected: str) -> str:
    shown = repr(value)[:80]
    return (
        f"{name} = {shown} of type {type(value).__name__}; expected {expected}; correct the input"
    )
