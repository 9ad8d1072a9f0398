"""Candidate thoughts about records, and files of them; knows no model and no endpoint."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Record
from twn_rl.runtime.whole_files import digest
from twn_rl.training.thought_selection.shards import SelectionError

logger = logging.getLogger(__name__)

# Why a candidate cannot be taught; the first ones are those of `templates.Think`.
PROBLEMS = (
    "no_open",
    "nested",
    "truncated",
    "empty",
    "marker",
    "too_long",
    "timeout",
    "junk",
    "refused",
    "no_negatives",
)


@dataclass(frozen=True)
class Candidate:
    """One chain of thought about a record's query, without think markers.

    Attributes:
        cot: The text; of an unusable candidate, what could be read.
        source: Who wrote it.
        problem: None if it can be taught, else one of `PROBLEMS`.
    """

    cot: str
    source: str
    problem: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict."""
        return asdict(self)


class Writer(Protocol):
    """A source of candidates.

    Attributes:
        name: Name of its folder.
        plan: What its candidates depend on; stored candidates of another plan are refused.
        shard_size: Records between two writes.
    """

    name: str
    plan: dict[str, Any]
    shard_size: int

    def write(self, records: Sequence[Record]) -> list[list[Candidate]]:
        """Return the candidates of each record."""
        ...


class ListedCots:
    """CoTs that exist already: from a file, from the records, or from the demo's teachers."""

    shard_size = 4096

    def __init__(
        self, name: str, cots: dict[str, list[tuple[str, str]]], renderer: Renderer
    ) -> None:
        """Hold record id -> (source, CoT) pairs, in order; ids without CoTs may be missing."""
        self.name, self._cots, self._renderer = name, cots, renderer
        self.plan: dict[str, Any] = {"cots": digest(cots), "renderer": renderer.to_dict()}

    def write(self, records: Sequence[Record]) -> list[list[Candidate]]:
        """Return the listed candidates; blank ones and those with think markers have a problem."""
        return [
            [
                Candidate(cot, source, problem_of(cot, self._renderer))
                for source, cot in self._cots.get(record.id, [])
            ]
            for record in records
        ]


def problem_of(cot: str, renderer: Renderer) -> str | None:
    """Return why a bare CoT cannot be rendered as a think, or None.

    >>> problem_of(" ", Renderer()), problem_of("a </think> b", Renderer())
    ('empty', 'marker')
    """
    if not cot.strip():
        return "empty"
    if renderer.think_open in cot or renderer.think_close in cot:
        return "marker"
    return None


def read_candidate_file(
    path: str | Path, ids: Collection[str], *, on_bad_row: str = "raise"
) -> tuple[dict[str, list[tuple[str, str]]], Counter[str]]:
    """Return record id -> (source, CoT) pairs of a JSON-lines file, and counts of rows left out.

    A row is `{"id": ..., "cot": ...}` and may name its `source`; the default is the file's name.
    The same CoT of the same source twice for one record counts once ("duplicate"). Blank CoTs are
    kept: they are candidates that will be rejected, and counted there.

    Args:
        path: The file.
        ids: Ids of the records.
        on_bad_row: "raise" stops at a row that is damaged or names no record; "skip" counts it.

    Raises:
        SelectionError: For a bad row under "raise"; always if no row is about any record.
    """
    path, wanted = Path(path), frozenset(ids)
    cots: dict[str, dict[tuple[str, str], None]] = {}
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    unknown: list[str] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _checked_row(json.loads(line))
            except ValueError as error:
                skipped["bad_row"] += 1
                problems.append(f"line {number}: {error}")
                continue
            if row["id"] not in wanted:
                skipped["unknown_id"] += 1
                unknown.append(row["id"])
                continue
            found = cots.setdefault(row["id"], {})
            key = (str(row.get("source") or path.stem), row["cot"])
            skipped["duplicate"] += key in found
            found[key] = None
    if unknown:
        problems.append(f"{len(unknown)} rows are about no record: ids {unknown[:3]}")
    if problems and (on_bad_row == "raise" or not cots):
        raise SelectionError(
            f"{path}: {'; '.join(problems[:3])}; expected rows {{id, cot[, source]}} with ids of "
            f"the records, such as {sorted(wanted)[:2]}; correct the file"
            + (" or pass --on_bad_record skip" if cots else "")
        )
    if not cots:
        raise SelectionError(f"{path} holds no rows; expected {{id, cot[, source]}}; fill it")
    skipped = +skipped
    if skipped:
        logger.warning("%s: rows left out: %s", path, dict(skipped))
    return {key: list(pairs) for key, pairs in cots.items()}, skipped


def unique_ids(records: Sequence[Record]) -> list[str]:
    """Return the ids of all records, which candidates are matched by.

    Raises:
        SelectionError: If an id occurs more than once.
    """
    ids = [record.id for record in records]
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise SelectionError(
            f"{len(twice)} record ids occur more than once, such as {twice[:3]}; expected unique "
            "ids, candidates are matched by them; rename these records"
        )
    return ids


def _checked_row(row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__}, expected an object")
    wrong = [name for name in ("id", "cot") if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"{wrong} missing or no string")
    return row
