"""JSON rows about records, written shard by shard so that a killed pass goes on; knows no model."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from twn_rl.bank_building import Processes, read_json, wait, write_json
from twn_rl.evaluation.results import write_text

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
SHARD_FORMAT = 1
Row = dict[str, Any]


class SelectionError(ValueError):
    """Candidates, scores or settings that cannot be used: what is wrong, what was expected."""


class RecordShards:
    """One row a record, in files of `shard_size` rows; several processes share the files.

    Attributes:
        folder: Where `plan.json` and `000000.jsonl`, ... are; all processes must see the same one.
        ids: Ids of the records in order; row i is about record i and carries its id.
        plan: What the rows depend on; rows of another plan are never mixed in.
    """

    def __init__(
        self, folder: str | Path, ids: Sequence[str], plan: Row, *, shard_size: int = 256
    ) -> None:
        self.folder, self.ids, self.shard_size = Path(folder), ids, shard_size
        own = {"format": SHARD_FORMAT, "shard_size": shard_size, "records": digest(ids)}
        self.plan = json.loads(json.dumps({**plan, **own}))
        self._numbers = range(-(-len(ids) // shard_size))

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
            make: Positions of records -> their rows, without `id`.
            is_redone: Stored rows for which it is True are made again.
            rebuild: Make all rows again, whatever is stored.
            processes: `PartialState` or `Accelerator` when several processes share the work.
            show_progress_bar: Show rows done, on the main process.

        Raises:
            SelectionError: If the folder holds rows of another plan, unless `rebuild`.
        """
        stored = None if rebuild else read_json(self.folder / PLAN_FILE)
        if stored is not None and stored != self.plan:
            self._refuse(stored)
        wait(processes)  # every process has looked before the first one changes the folder
        index, count = (processes.process_index, processes.num_processes) if processes else (0, 1)
        if index == 0 and stored is None:
            self._clear()
        wait(processes)
        todo = {number: self._todo(number, is_redone) for number in self._numbers}
        missing = [number for number, positions in todo.items() if positions]
        if missing and sum(map(len, todo.values())) < len(self.ids):
            logger.info("%s: going on, %d shards to do", self.folder, len(missing))
        wait(processes)  # all have listed before the first new shard appears
        mine = missing[index::count]
        with tqdm(
            total=sum(len(todo[number]) for number in mine),
            desc=self.folder.name,
            unit="record",
            disable=not show_progress_bar or index != 0,
        ) as bar:
            for number in mine:
                rows = dict(zip(todo[number], make(todo[number]), strict=True))
                self._write(number, {**self._read(number), **rows})
                bar.update(len(rows))
        wait(processes)
        return self

    def rows(self) -> Iterator[Row]:
        """Yield the rows of all records in order.

        Raises:
            SelectionError: If shards are missing or damaged.
        """
        for number in self._numbers:
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
        return again if rows else list(self._positions(number))

    def _positions(self, number: int) -> range:
        start = number * self.shard_size
        return range(start, min(start + self.shard_size, len(self.ids)))

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.jsonl"

    def _read(self, number: int) -> dict[int, Row]:
        """Return position -> row, or nothing if the shard is absent, cut short or damaged."""
        positions = self._positions(number)
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
            for p in self._positions(number)
        ]
        write_text(self._path(number), "".join(lines))

    def _clear(self) -> None:
        """Remove what an earlier pass wrote, the plan first, and nothing else."""
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / PLAN_FILE).unlink(missing_ok=True)
        for path in self.folder.glob("[0-9]" * 6 + ".jsonl"):
            path.unlink()
        write_json(self.folder / PLAN_FILE, self.plan)

    def _refuse(self, stored: Row) -> None:
        other = [
            f"{name} = {_short(stored.get(name))}, now {_short(self.plan.get(name))}"
            for name in {**self.plan, **stored}
            if stored.get(name) != self.plan.get(name)
        ]
        raise SelectionError(
            f"{self.folder} is about something else: {'; '.join(other)}; expected the same records "
            "and settings; pass rebuild (--rebuild true) to start anew, or use another folder"
        )


def digest(content: Any) -> str:
    """Return the sha256 of anything JSON can hold."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def _short(value: Any) -> str:
    return str(value)[:60]
