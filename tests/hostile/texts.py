"""Seeded hostile values: texts, JSON values, bytes. The same seed gives the same case."""

import json
import random
import string
from collections.abc import Iterator
from typing import Any

MARKUP = (
    "<image>",
    "</think>",
    "<think>",
    "<end_of_utterance>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<global-img>",
    "<row_1_col_1>",
    "<|readout_0|>",
    "<pad>",
    "<unk>",
)
UNUSABLE = ("\x00", "\ud800", "\udfff")
ODD = (
    "\x1b[31m",
    "\x07",
    "\u202e",
    "\u200b",
    "\ufeff",
    "\u2028",
    "\r\n",
    "\x85",
    "\U0010ffff",
    "e\u0301" * 20,
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "{{ 7*7 }}",
    "{% for x in y %}",
    "%s%n",
    "${HOME}",
    "../../etc/passwd",
    "'; DROP TABLE x; --",
    "\u0660\u0661",
    "\ufdfd",
)
WORDS = ("camel", "pizza", "zebra", "tree", "left", "right", "Kamel", "ラクダ", "جمل")


def hostile_texts(seed: int, count: int) -> Iterator[str]:
    """Yield texts of words, markup, odd and unusable characters; some blank, some very long."""
    die = random.Random(seed)
    for index in range(count):
        pieces = [die.choice(WORDS) for _ in range(die.randrange(4))]
        for kind in (MARKUP, ODD, UNUSABLE):
            chance = 0.25 if kind is UNUSABLE else 0.7
            pieces += [
                die.choice(kind) for _ in range(die.randrange(1, 5)) if die.random() < chance
            ]
        die.shuffle(pieces)
        text = die.choice(["", " ", "\n"]).join(pieces)
        if index % 17 == 16:
            text *= 500
        yield text if index % 13 else die.choice(["", " ", "\n\t ", "\u200b", "\u3000"])


def hostile_values(seed: int, count: int) -> Iterator[Any]:
    """Yield JSON-ready values of every type, most of them of no use as a setting or a field."""
    die = random.Random(seed)
    simple: list[Any] = [None, True, False, 0, -1, 10**6, 2**63, 10**30, -1.5, 1e308, "", " ", "x"]
    simple += ["1e400", "nan", "/etc/passwd", "..", [], {}, [None], {"a": 1}, [[[[1]]]]]
    for index in range(count):
        if index % 3 == 2:
            yield "".join(die.choice(string.printable) for _ in range(die.randrange(1, 30)))
        else:
            yield die.choice(simple)


def damaged(content: bytes, die: random.Random) -> bytes:
    """Return bytes that were cut, flipped, zeroed, doubled, spliced, or replaced."""
    way, at = die.randrange(9), die.randrange(max(1, len(content)))
    width = die.randrange(1, 64)
    if way == 0:
        return content[:at]
    if way == 1:
        flipped = bytearray(content)
        for _ in range(die.randrange(1, 9)):
            flipped[die.randrange(len(flipped))] ^= 1 << die.randrange(8)
        return bytes(flipped)
    if way == 2:
        return content[:at] + bytes(width) + content[at + width :]
    if way == 3:
        return content[:at] + die.randbytes(width) + content[at:]
    if way == 4:
        return content[at:]
    if way == 5:
        return content + content
    if way == 6:
        return die.choice([b"", b"\x00", b"\n", b"{}", b"[]", b"null", b"\xff\xfe", b"PK\x03\x04"])
    if way == 7:
        return content[:at] + content[at + width :]
    return die.randbytes(len(content) or 1)


def repeats_a_key(text: str | bytes) -> bool:
    """Return whether an object of a JSON text has a key twice."""
    found: list[bool] = []

    def look(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found.append(len(dict(pairs)) < len(pairs))
        return dict(pairs)

    try:
        json.loads(text, object_pairs_hook=look)
    except ValueError:
        return False
    return any(found)


def hostile_json(die: random.Random, value: dict[str, Any]) -> str:
    """Return the text of a JSON object after one hostile change to its text."""
    text, way = json.dumps(value), die.randrange(8)
    key = json.dumps(die.choice(sorted(value)))
    if way == 0:
        first = value[json.loads(key)]
        second = f"{first} again" if isinstance(first, str) else first
        return text[:-1] + f", {key}: {json.dumps(second)}}}"  # a key twice, both of use
    if way == 1:
        return text.replace(f"{key}:", f"{key}: " + "[" * 3000 + "]" * 3000 + ', "x":', 1)
    if way == 2:
        return text.replace(f"{key}:", f'{key}: NaN, "x":', 1)
    if way == 3:
        return text.replace(f"{key}:", f'{key}: "\\ud800", "x":', 1)
    if way == 4:
        return text[: die.randrange(len(text))]
    if way == 5:
        return f"[{text}]"
    if way == 6:
        return text.replace(f"{key}:", f'{key}: 1e999, "x":', 1)
    return text + text
