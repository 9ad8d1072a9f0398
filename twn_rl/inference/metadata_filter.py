"""Which rows may be found: those whose metadata have certain values. Knows no vectors.

A filter is a mapping of names to a value, or to several of which one is enough; all names count.
Fields and values are compared as whole texts, numbers and booleans, written as JSON: nothing that
a client sends becomes a part of a query's language.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

MetadataFilter = Mapping[str, Any]
_MOST_VALUES = 256
_EXPECTED = (
    'expected names and values of metadata, as {"colour": ["red", "blue"], "year": 2024}; correct '
    "the filter"
)


def tags_of(metadata: Mapping[str, Any]) -> list[str]:
    """Return what filters are compared with: name and value of each field; of a list each value.

    What is no text, number or boolean cannot be asked for.

    >>> tags_of({"colour": ["red", "blue"], "year": 2024.0, "size": {"cm": 3}})
    ['["colour", "red"]', '["colour", "blue"]', '["year", 2024]']
    """
    pairs = [(name, value) for name, given in metadata.items() for value in _values(given)]
    return [_tag(name, value) for name, value in pairs if _is_plain(value)]


def check_filter(wanted: MetadataFilter) -> None:
    """Refuse what no row's metadata could be compared with.

    Raises:
        ValueError: Which part of the filter.
    """
    for name, given in wanted.items():
        values = _values(given)
        if not isinstance(name, str) or not values or not all(map(_is_plain, values)):
            raise ValueError(f"filter: {str(name)[:80]!r} = {str(given)[:80]!r}; {_EXPECTED}")
    count = sum(len(_values(given)) for given in wanted.values())
    if count > _MOST_VALUES:
        raise ValueError(f"filter of {count} values; expected at most {_MOST_VALUES}; drop some")


def sql_of(wanted: MetadataFilter, column: str) -> str | None:
    """Return a condition on the column of `tags_of`; None for an empty filter.

    Raises:
        ValueError: As `check_filter`.
    """
    check_filter(wanted)
    conditions = []
    for name, given in wanted.items():
        quoted = [_quoted(_tag(name, value)) for value in _values(given)]
        conditions.append(f"array_has_any({column}, [{', '.join(quoted)}])")
    return " AND ".join(conditions) or None


def parse_filter(words: Sequence[str]) -> dict[str, list[Any]]:
    """Return the filter of words NAME=VALUE; a value is a number or boolean if it reads as one.

    >>> parse_filter(["colour=red", "colour=blue", "year=2024"])
    {'colour': ['red', 'blue'], 'year': [2024]}

    Raises:
        ValueError: For a word without "=", and as `check_filter`.
    """
    wanted: dict[str, list[Any]] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or not name:
            raise ValueError(f"filter = {word[:80]!r}; expected NAME=VALUE; write it so")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        wanted.setdefault(name, []).append(value if _is_plain(value) else text)
    check_filter(wanted)
    return wanted


def _values(given: Any) -> list[Any]:
    return list(given) if isinstance(given, list | tuple) else [given]


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int)


def _tag(name: str, value: Any) -> str:
    if isinstance(value, float) and value.is_integer():
        value = int(value)  # JSON knows no difference
    return json.dumps([name, value])


def _quoted(tag: str) -> str:
    return "'" + tag.replace("'", "''") + "'"
