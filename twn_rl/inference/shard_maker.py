"""Rows of a file -> vectors and details of a shard. Knows no files of vectors and no processes."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Item, RecordError
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemRow, Side

logger = logging.getLogger(__name__)

_SHOWN_ERRORS = 3


class Embedder(Protocol):
    """What the job needs of `twn_rl.inference.embedder.ThinkingEmbedder`."""

    model: Any

    def get_embedding_dimension(self) -> int:
        """Return the width D of a vector."""
        ...

    def encode_query(self, items: Sequence[Item], **settings: Any) -> Any:
        """Return details: embeddings and what happened to each item."""
        ...

    def encode_document(self, items: Sequence[Item], **settings: Any) -> Any:
        """Return details, as `encode_query`."""
        ...


class ItemSource(Protocol):
    """Rows to encode; `item_rows.ItemFile` is one."""

    path: Path
    side: Side
    fields: dict[str, str]
    data_root: Path
    ignored_fields: Counter[str]

    def rows(self, start: int = 0) -> Iterator[ItemRow]:
        """Yield the rows from position `start` on."""
        ...

    def describe(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return `rows`, their number, and `sha256`, which changes when their content does."""
        ...


class ShardMaker:
    """Makes the shards of one file, which it reads as a stream: best in rising order."""

    def __init__(
        self,
        embedder: Embedder,
        source: ItemSource,
        shape: tuple[int, int],
        settings: EncodeSettings,
        start: int = 0,
        known_errors: int = 0,
    ) -> None:
        """Begin at a row.

        Args:
            embedder: A `ThinkingEmbedder`.
            source: Rows to encode.
            shape: Rows and width of the file.
            settings: How to encode, with what the model decides.
            start: The first row that anybody lacks.
            known_errors: So many bad rows have been told.
        """
        self._embedder, self._source = embedder, source
        self._rows, self._width = shape
        self._settings, self._failed = settings, known_errors
        self._stream, self._at = source.rows(start), start

    def make(
        self, wanted: Sequence[int]
    ) -> tuple[NDArray[np.float32], list[dict[str, Any]], dict[str, int]]:
        """Return vectors (n, D), details and counts of n successive rows.

        Raises:
            ValueError: If the file no longer has them.
            RecordError: For a bad row, if that is to stop the job.
        """
        numbered = dict(zip(wanted, self._read(wanted), strict=True))
        vectors, details = _encode_shard(
            self._embedder, self._source.side, numbered, self._width, self._settings
        )
        _log_errors(details, self._failed)
        counts = _count(details)
        self._failed += counts["failed"]
        return vectors, details, counts

    def expect_end(self) -> None:
        """Refuse a file that has more rows than it had."""
        rest = self._rows - self._at
        if next(islice(self._stream, rest, None), None) is not None:
            raise self._changed()

    def _read(self, wanted: Sequence[int]) -> list[ItemRow]:
        """Return rows; those that others make are passed over."""
        if wanted[0] < self._at:
            self._stream, self._at = self._source.rows(wanted[0]), wanted[0]
        skipped = wanted[0] - self._at
        shard = list(islice(self._stream, skipped, skipped + len(wanted)))
        self._at = wanted[0] + len(shard)
        if len(shard) < len(wanted):
            raise self._changed()
        return shard

    def _changed(self) -> ValueError:
        return ValueError(
            f"{self._source.path} no longer has the {self._rows} rows it had; expected a "
            "file that does not change while it is read; run again with --overwrite"
        )


def _encode_shard(
    embedder: Embedder,
    side: Side,
    rows: Mapping[int, ItemRow],
    width: int,
    settings: EncodeSettings,
) -> tuple[NDArray[np.float32], list[dict[str, Any]]]:
    """Return vectors (n, D) and details of n rows by their numbers, good and bad."""
    shard = list(rows.values())
    vectors = np.zeros((len(shard), width), dtype=np.float32)
    details = [_detail(row, number) for number, row in rows.items()]
    items = {i: row.item for i, row in enumerate(shard) if row.item is not None}
    if len(items) < len(shard):
        _refuse(shard, {i: row.error for i, row in enumerate(shard) if row.error}, settings)
    if items:
        encode = embedder.encode_query if side == "query" else embedder.encode_document
        result = encode(
            list(items.values()),
            think=settings.think_mode(side),
            batch_size=settings.batch_size,
            max_think_tokens=settings.max_think_tokens,
            think_rate=settings.think_rate,
            think_threshold=settings.think_threshold,
            keep=settings.keep,
            on_bad_input="skip",
            show_progress_bar=False,
            return_details=True,
        )
        embeddings = _checked(result.embeddings, (len(items), width))
        for position, i in enumerate(items):
            made = _happened(result, position)
            if made["error"] is None and not np.isfinite(embeddings[position]).all():
                made["error"] = "the model gave NaN or infinity for this row"
            if made["error"] is None:
                vectors[i] = embeddings[position]
            details[i].update(made)
        _refuse(shard, {i: details[i]["error"] for i in items if details[i]["error"]}, settings)
    return vectors, details


def _refuse(
    shard: Sequence[ItemRow], errors: Mapping[int, str | RecordError], settings: EncodeSettings
) -> None:
    """Raise the first error, if bad rows are to stop the job."""
    if settings.on_bad_row == "skip" or not errors:
        return
    place, error = next(iter(errors.items()))
    if isinstance(error, RecordError):
        raise error
    raise RecordError(f"row with id {shard[place].id!r}: {error}", reason="bad_input")


def _detail(row: ItemRow, number: int) -> dict[str, Any]:
    return {
        "id": row.id,
        "row": number,
        "thought": None,
        "gate_probability": None,
        "policy_probability": None,
        "think_tokens": None,
        "problem": None,
        "error": None if row.error is None else str(row.error),
    }


def _happened(result: Any, position: int) -> dict[str, Any]:
    """Return what the embedder says of one item, JSON-ready."""
    gate, policy = result.gate_probabilities[position], result.policy_probabilities[position]
    tokens = result.think_tokens[position]
    problems = [problem for problem in result.problems[position] if problem is not None]
    if position in result.truncated:
        problems.append("input_cut")
    return {
        "thought": next(iter(result.thoughts[position]), None),
        "gate_probability": None if gate is None else float(gate),
        "policy_probability": None if policy is None else float(policy),
        "think_tokens": int(tokens),
        "problem": ", ".join(problems) or None,
        "error": result.errors.get(position),
    }


def _checked(embeddings: Any, shape: tuple[int, int]) -> NDArray[np.float32]:
    vectors = np.asarray(embeddings, dtype=np.float32)
    if vectors.shape != shape:
        raise ValueError(
            f"the embedder returned shape {vectors.shape}; expected {shape}: one vector an item; "
            "correct the embedder"
        )
    return vectors


def _count(details: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts = Counter(
        failed=sum(line["error"] is not None for line in details),
        thoughts=sum(line["thought"] is not None for line in details),
        think_tokens=sum(line["think_tokens"] or 0 for line in details),
    )
    counts.update(f"problem: {line['problem']}" for line in details if line["problem"] is not None)
    return dict(counts)


def _log_errors(details: Sequence[Mapping[str, Any]], known: int) -> None:
    """Log the first bad rows of a file; the others are in the details."""
    errors = [line["error"] for line in details if line["error"] is not None]
    for error in errors[: max(0, _SHOWN_ERRORS - known)]:
        logger.warning("%s", error)
    if known < _SHOWN_ERRORS < known + len(errors):
        logger.warning("further bad rows are only counted; the details file has their errors")
