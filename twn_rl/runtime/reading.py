"""Files that people hand in, read strictly: regular ones only, one meaning each, or an error.

Refused are pipes and devices (reading them may never end), keys that are there twice (one of the
two would be lost), nesting beyond all use, and aliases in YAML (a small file could unfold without
end).
"""

import json
import re
import stat
from collections import Counter
from collections.abc import Hashable
from json import JSONDecodeError
from pathlib import Path
from typing import Any

import msgspec
import yaml

from twn_rl.runtime.nearest import path_hint

MAX_DOCUMENT_BYTES = 64 * 1024 * 1024
_AFTER_KEY = re.compile(r'"[ \t\r\n]*:')
_AFTER_KEY_BYTES = re.compile(rb'"[ \t\r\n]*:')
_KINDS = {
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


class RepeatedKeyError(ValueError):
    """A key that a mapping has twice."""

    def __init__(self, key: Any) -> None:
        """Name the key."""
        super().__init__(f"key {str(key)[:80]!r} is there twice")


def regular_file(path: str | Path) -> Path:
    """Return the path of a regular file, links followed.

    Raises:
        FileNotFoundError: If there is nothing.
        ValueError: If it is a folder, a pipe, a device or a socket, or no possible path.
    """
    path = Path(path)
    try:
        kind = stat.S_IFMT(path.stat().st_mode)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{str(path)!r} does not exist; expected a file{path_hint(path)} Check the path"
        ) from None
    except (ValueError, OSError) as error:  # NUL, too long, a loop of links
        raise ValueError(
            f"{str(path)[:200]!r} is no usable path ({error}); expected a file; check the path"
        ) from error
    if kind != stat.S_IFREG:
        raise ValueError(
            f"{str(path)!r} is {_KINDS.get(kind, 'no regular file')}; expected a regular file; "
            "write its content to a file first"
        )
    return path


def read_document(path: str | Path) -> str:
    """Return the text of a small file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it is no regular file, no UTF-8, or larger than `MAX_DOCUMENT_BYTES`.
    """
    path = regular_file(path)
    if path.stat().st_size > MAX_DOCUMENT_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size} bytes; expected at most {MAX_DOCUMENT_BYTES} of "
            "settings; is it the right file?"
        )
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no UTF-8 text ({error}); expected text; is it the right file?"
        ) from error


def load_json(path: str | Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it cannot be read as one value; the message names the file.
    """
    text = read_document(path)
    try:
        return decode_json(text)
    except ValueError as error:
        raise ValueError(f"{path} is no valid JSON ({error}); correct it") from error


def decode_json(text: str | bytes, *, is_strict: bool = True) -> Any:
    """Return the value of a JSON text; `is_strict` looks for keys that are there twice.

    >>> decode_json('{"a": 1, "b": {"a": 2}}')
    {'a': 1, 'b': {'a': 2}}
    >>> decode_json('{"a": 1, "a": 2}')
    Traceback (most recent call last):
    twn_rl.runtime.reading.RepeatedKeyError: key 'a' is there twice

    Raises:
        ValueError: If it is no JSON, holds NaN or Infinity, nests too deeply, or repeats a key.
    """
    try:
        value = msgspec.json.decode(text)
        if is_strict and _most_keys(text) != _count_keys(value):
            json.loads(text, object_pairs_hook=unrepeated)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    except (msgspec.DecodeError, UnicodeError, JSONDecodeError) as error:
        raise ValueError(str(error)) from error
    return value


def _most_keys(text: str | bytes) -> int:
    """Return how many keys a JSON text has; more where its strings hold quotes before colons.

    If the parsed value has as many, none was there twice.
    """
    found = _AFTER_KEY.findall(text) if isinstance(text, str) else _AFTER_KEY_BYTES.findall(text)
    return len(found)


def _count_keys(value: Any) -> int:
    if isinstance(value, dict):
        inside = (each for each in value.values() if isinstance(each, dict | list))
        return len(value) + sum(map(_count_keys, inside))
    if isinstance(value, list):
        return sum(_count_keys(each) for each in value if isinstance(each, dict | list))
    return 0


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return the mapping of a JSON object, for `object_pairs_hook`.

    Raises:
        RepeatedKeyError: If a key is there twice.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(key for key, _ in pairs)
        raise RepeatedKeyError(next(key for key in found if counts[key] > 1))
    return found


def load_yaml(path: str | Path) -> Any:
    """Return the content of a YAML file, of plain values only.

    Raises:
        FileNotFoundError: If it does not exist.
        ValueError: If it cannot be read as one value; the message names the file.
    """
    text = read_document(path)
    try:
        return yaml.load(text, _StrictLoader)
    except RecursionError:
        raise ValueError(f"{path} nests too deeply; expected settings; correct it") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date that does not exist
        reason = " ".join(str(error).split())  # YAML's own spans lines
        raise ValueError(f"{path} is no valid YAML ({reason}); correct it") from error


class _StrictLoader(yaml.SafeLoader):
    """Plain values; no key twice, no aliases."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Refuse an alias."""
        if self.check_event(yaml.AliasEvent):
            name = self.peek_event().anchor
            raise ValueError(f"alias *{name} stands for another value; expected it written out")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Hashable, Any]:
        """Refuse a key that is there twice."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for place, key in enumerate(keys):
            if key in keys[:place]:
                line = node.value[place][0].start_mark.line + 1
                raise ValueError(f"line {line}: {RepeatedKeyError(key)}")
        return super().construct_mapping(node, deep)
