"""Drafts: candidate thoughts about records, and rows about records kept shard by shard."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from twn_rl.data.chat import Renderer
from twn_rl.data.markup import KNOWN_MARKUP, Markup, unusable_character
from twn_rl.data.record import Record
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.sharded_pass import Progress, ShardedPass, make_shards
from twn_rl.runtime.whole_files import digest, write_text

SHARD_FORMAT = 1
# Records between two signs of progress; a shard may take minutes.
RECORDS_PER_STEP = 64
Row = dict[str, Any]


class SelectionError(ValueError):
    """Drafts, scores or settings that cannot be used: what is wrong, what was expected."""


@dataclass(frozen=True)
class Draft:
    """One chain of thought about a record's query, without think markers.

    Attributes:
        cot: The text; of an unusable draft, what could be read.
        source: Who wrote it.
        problem: Why it cannot be taught, None if it can. A thought that was not written well has
            one of `chat.Think`'s problems, "marker", "character" or "too_long"; one that an
            endpoint did not answer, one of `endpoint.FAILURES`; one that could not be judged,
            "no_negatives".
    """

    cot: str
    source: str
    problem: str | None = None


class Writer(Protocol):
    """Where drafts come from.

    Attributes:
        name: Name of its folder.
        plan: What its drafts depend on; stored drafts of another plan are refused.
        shard_size: Records between two writes.
    """

    name: str
    plan: Row
    shard_size: int

    def write(self, records: Sequence[Record]) -> list[list[Draft]]:
        """Return the drafts about each record."""
        ...


def problem_of(cot: str, renderer: Renderer, markup: Markup = KNOWN_MARKUP) -> str | None:
    """Return why a bare CoT cannot be rendered as a think, or None.

    A thought with markup of its own would teach the model to write structure.

    >>> problem_of(" ", Renderer()), problem_of("a </think> b", Renderer())
    ('empty', 'marker')
    """
    if not cot.strip():
        return "empty"
    if renderer.think_open in cot or renderer.think_close in cot or markup.found(cot):
        return "marker"
    if unusable_character(cot):
        return "character"
    return None


def unique_ids(records: Sequence[Record]) -> list[str]:
    """Return the ids of all records, which drafts are matched by.

    Raises:
        SelectionError: If an id occurs more than once.
    """
    ids = [record.id for record in records]
    twice = [key for key, count in Counter(ids).items() if count > 1]
    if twice:
        raise SelectionError(
            f"{len(twice)} record ids occur more than once, such as {twice[:3]}; expected unique "
            "ids, drafts are matched by them; rename these records"
        )
    return ids


def collect_drafts(
    writer: Writer,
    records: Sequence[Record],
    ids: Sequence[str],
    folder: Path,
    *,
    is_redone: Callable[[Row], bool] | None = None,
    rebuild: bool = False,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> RecordRows:
    """Let a writer fill the `drafts` of every record, below `folder`; see `RecordRows.fill`."""

    def make(positions: Sequence[int]) -> list[Row]:
        written = writer.write([records[position] for position in positions])
        return [{"drafts": [asdict(draft) for draft in drafts]} for drafts in written]

    rows = RecordRows(folder / writer.name, ids, writer.plan, shard_size=writer.shard_size)
    return rows.fill(
        make,
        is_redone=is_redone,
        rebuild=rebuild,
        processes=processes,
        show_progress_bar=show_progress_bar,
    )


def merge_drafts(collected: Sequence[RecordRows]) -> list[Row]:
    """Return one row a record with the `drafts` of all writers, in their order.

    Raises:
        SelectionError: If there is no writer.
    """
    if not collected:
        raise SelectionError(
            "no source of drafts; expected at least one; use --own_temperatures, "
            "--use_record_cots, --draft_files, --demo_teachers or --endpoint_url"
        )
    return [
        {"id": rows[0]["id"], "drafts": [draft for row in rows for draft in row["drafts"]]}
        for rows in zip(*collected, strict=True)
    ]


class RecordRows:
    """One JSON row a record, in files of `shard_size` rows; several processes share the files.

    Attributes:
        ids: Ids of the records in order; row i is about record i and carries its id.
    """

    def __init__(
        self, folder: str | Path, ids: Sequence[str], plan: Row, *, shard_size: int = 256
    ) -> None:
        """Plan rows in `folder`, which all processes must see, that depend on `plan`."""
        self.ids = ids
        plan = {**plan, "format": SHARD_FORMAT, "records": digest(ids)}
        self._pass = ShardedPass(folder, plan, len(ids), shard_size, error=SelectionError)

    def fill(
        self,
        make: Callable[[Sequence[int]], Sequence[Row]],
        *,
        is_redone: Callable[[Row], bool] | None = None,
        rebuild: bool = False,
        processes: Processes | None = None,
        show_progress_bar: bool = True,
    ) -> RecordRows:
        """Make what is missing and return self; a kill loses at most one shard a process.

        Args:
            make: Positions of some records of a shard -> their rows, without `id`.
            is_redone: Stored rows for which it is True are made again.
            rebuild: Make all rows again, whatever is stored.
            processes: `PartialState` or `Accelerator` when several processes share the work.
            show_progress_bar: Show rows done, on the main process.

        Raises:
            SelectionError: If the folder holds rows of another plan, unless `rebuild`, or is in
                use.
        """

        def make_shard(number: int, positions: Sequence[int], progress: Progress) -> None:
            rows = self._read(number)
            for start in range(0, len(positions), RECORDS_PER_STEP):
                step = positions[start : start + RECORDS_PER_STEP]
                rows |= zip(step, make(step), strict=True)
                progress(len(step))
            lines = [{"id": self.ids[p], **rows[p]} for p in self._pass.ranges[number]]
            text = [json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in lines]
            write_text(self._pass.path(number, ".jsonl"), "".join(text))

        with self._pass.opened(rebuild=rebuild, processes=processes):
            todo = {n: self._todo(n, is_redone) for n in range(len(self._pass.ranges))}
            make_shards(
                {number: positions for number, positions in todo.items() if positions},
                make_shard,
                description=self._pass.folder.name,
                unit="record",
                num_shards=len(todo),
                processes=processes,
                show_progress_bar=show_progress_bar,
            )
        return self

    def __iter__(self) -> Iterator[Row]:
        """Yield the rows of all records in order.

        Raises:
            SelectionError: If shards are missing or damaged.
        """
        for number, positions in enumerate(self._pass.ranges):
            rows = self._read(number)
            if not rows:
                raise SelectionError(
                    f"{self._pass.path(number, '.jsonl')} is missing or damaged; expected a "
                    "finished shard; run the same command again, which makes only what is missing"
                )
            yield from (rows[position] for position in positions)

    def _todo(self, number: int, is_redone: Callable[[Row], bool] | None) -> Sequence[int]:
        rows = self._read(number)
        if not rows:
            return self._pass.ranges[number]
        return [p for p, row in rows.items() if is_redone is not None and is_redone(row)]

    def _read(self, number: int) -> dict[int, Row]:
        """Return position -> row, or nothing if the shard is absent, cut short or damaged."""
        positions = self._pass.ranges[number]
        try:
            text = self._pass.path(number, ".jsonl").read_text(encoding="utf-8")
            rows = [json.loads(line) for line in text.split("\n")[:-1]]
        except (OSError, ValueError):
            return {}
        if [row.get("id") for row in rows] != [self.ids[p] for p in positions]:
            return {}
        return dict(zip(positions, rows, strict=True))
