"""What lies beside a file of vectors: how much of it is done, and a line about each row."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from twn_rl.runtime.reading import decode_json, load_json, regular_file

VECTORS_FORMAT = 1


class VectorFileError(ValueError):
    """A file of vectors that is damaged, foreign, in use, or made with other settings."""


class _Meta(msgspec.Struct):
    """Fields that a `meta.json` must have."""

    rows: int
    width: int
    done_rows: int
    details_bytes: int
    counts: dict[str, int]
    plan: dict[str, Any]


class _Detail(msgspec.Struct):
    """Fields that the line about a row must have."""

    id: str
    error: str | None


def details_path(path: Path) -> Path:
    """Return where the lines about the rows of `path` are."""
    return path.with_suffix(".details.jsonl")


def meta_path(path: Path) -> Path:
    """Return where it says how much of `path` is done."""
    return path.with_suffix(".meta.json")


def read_meta(path: Path) -> dict[str, Any] | None:
    """Return what is known of the vectors of `path`, or None if nothing is.

    Raises:
        VectorFileError: If there is something that cannot be read: what it says must not be lost
            silently.
    """
    try:
        meta = load_json(meta_path(path))
        if not isinstance(meta, dict) or meta.get("format") != VECTORS_FORMAT:
            raise ValueError(f"it has no format {VECTORS_FORMAT}")
        msgspec.convert(meta, _Meta)
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as error:
        raise VectorFileError(
            f"{meta_path(path)} cannot be used ({error}); expected what was written beside "
            f"{path.name}; encode again with --overwrite, or remove it: rows then have numbers "
            "for ids"
        ) from error
    return meta


def read_details(path: Path, meta: Mapping[str, Any] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the details of every row of `path` that counts, one at a time.

    Raises:
        VectorFileError: For a line that is damaged.
    """
    meta = meta or read_meta(path) or {"details_bytes": 0}
    left, file = meta["details_bytes"], details_path(path)
    number = 0
    try:
        with regular_file(file).open("rb") as lines:
            while left > 0 and (line := lines.readline()):
                left, number = left - len(line), number + 1
                detail = decode_json(line, is_strict=False)
                msgspec.convert(detail, _Detail)
                yield detail
    except (ValueError, OSError) as error:
        raise VectorFileError(
            f"{file}, line {number}, cannot be used ({error}); expected the lines that were "
            f"written with {path.name}; encode again with --overwrite"
        ) from error
