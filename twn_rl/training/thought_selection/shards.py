"""JSON rows about records, written shard by shard so that a killed pass goes on; knows no model."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.sharded_pass import ShardedPass
from twn_rl.runtime.whole_files import digest, write_text

SHARD_FORMAT = 1
# Records between two signs of progress; a shard may take minutes.
RECORDS_PER_STEP = 64
Row = dict[str, Any]


class SelectionError(ValueError):
    """Candidates, scores or settings that cannot be used: what is wrong, what was expected."""


class RecordShards:
    """One row a record, in files of `shard_size` rows; several processes share the files.

    Attributes:
        folder: Where `plan.json` (see `ShardedPass`) and `000000.jsonl`, ... are; all processes
            must see the same one.
        ids: Ids of the records in order; row i is about record i and carries its id.
    """

    def __init__(
        self, folder: str | Path, ids: Sequence[str], plan: Row, *, shard_size: int = 256
    ) -> None:
        self.folder, self.ids = Path(folder), ids
        own = {"format": SHARD_FORMAT, "records": digest(ids)}
        self._pass = ShardedPass(
            folder, {**plan, **own}, len(ids), shard_size, error=SelectionError
        )

    def fill(
        self,
        make: Callable[[list[int]], list[Row]],
        *,
        is_redone: Callable[[Row], bool] | None = None,
        rebuild: bool = False,
        processes: Processes | None = None,
        show_progress_bar: bool = True,
    ) -> RecordShards:
        """Make what is missing and return self; a kill loses at most one shard a process.

        Args:
            make: Positions of some records of a shard -> their rows, without `id`.
            is_redone: Stored rows for which it is True are made again.
            rebuild: Make all rows again, whatever is stored.
            processes: `PartialState` or `Accelerator` when several processes share the work.
            show_progress_bar: Show rows done, on the main process.

        Raises:
            SelectionError: If the folder holds rows of another plan, unless `rebuild`.
        """
        self._pass.open(self._clear, rebuild=rebuild, processes=processes)
        todo = {number: self._todo(number, is_redone) for number in self._pass.numbers}
        missing = [number for number, positions in todo.items() if positions]
        mine = self._pass.share(missing, processes)
        with tqdm(
            total=sum(len(todo[number]) for number in mine),
            desc=self.folder.name,
            unit="record",
            disable=not (show_progress_bar and is_main(processes)),
        ) as bar:
            for number in mine:
                rows = self._read(number)
                for start in range(0, len(todo[number]), RECORDS_PER_STEP):
                    positions = todo[number][start : start + RECORDS_PER_STEP]
                    rows |= zip(positions, make(positions), strict=True)
                    bar.update(len(positions))
                self._write(number, rows)
        wait(processes)
        return self

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all records in order.

        Raises:
            SelectionError: If shards are missing or damaged.
        """
        for number in self._pass.numbers:
            rows = self._read(number)
            if not rows:
                raise SelectionError(
                    f"{self._path(number)} is missing or damaged; expected a finished shard; run "
                    "the same command again, which makes only what is missing"
                )
            yield from (rows[position] for position in sorted(rows))

    def _todo(self, number: int, is_redone: Callable[[Row], bool] | None) -> list[int]:
        rows = self._read(number)
        again = [p for p, row in rows.items() if is_redone is not None and is_redone(row)]
        return again if rows else list(self._pass.ranges[number])

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def _read(self, number: int) -> dict[int, Row]:
        """Return position -> row, or nothing if the shard is absent, cut short or damaged."""
        positions = self._pass.ranges[number]
        try:
            lines = self._path(number).read_text(encoding="utf-8").split("\n")[:-1]
            rows = [json.loads(line) for line in lines]
        except (OSError, ValueError):
            return {}
        if [row.get("id") for row in rows] != [self.ids[p] for p in positions]:
            return {}
        return dict(zip(positions, rows, strict=True))

    def _write(self, number: int, rows: dict[int, Row]) -> None:
        lines = [
            json.dumps({"id": self.ids[p], **rows[p]}, ensure_ascii=False, allow_nan=False) + "\n"
            for p in self._pass.ranges[number]
        ]
        write_text(self._path(number), "".join(lines))

    def _clear(self) -> None:
        for path in self.folder.glob("[0-9]" * 6 + ".jsonl"):
            path.unlink()
