"""Long work over rows, cut into shards that processes share; a killed run makes what is missing.

What a row is and how a shard is stored is the caller's: a shard appears whole or not at all, and
the caller tells which ones are there.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

from tqdm.auto import tqdm

from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.whole_files import owned, read_json, write_json

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"
Progress = Callable[[int], object]
T = TypeVar("T")


class ShardedPass:
    """A folder of shards, `000000.*` and so on; its `plan.json` says what they depend on.

    Attributes:
        folder: All processes must see the same one.
        plan: What the rows depend on, as JSON; shards of another plan are never mixed in.
        ranges: Positions of the rows of each shard.
    """

    def __init__(
        self,
        folder: str | Path,
        plan: Mapping[str, Any],
        count: int,
        shard_size: int,
        *,
        error: type[ValueError] = ValueError,
        rebuild_flag: str = "--rebuild",
    ) -> None:
        """Plan a pass.

        Args:
            folder: Where the shards are.
            plan: What the rows depend on.
            count: Number of rows.
            shard_size: Rows between two writes; a kill loses at most one shard a process.
            error: What is raised for another plan, or another run in the same folder.
            rebuild_flag: Flag its message names.
        """
        self.folder = Path(folder)
        self.plan: dict[str, Any] = json.loads(json.dumps({**plan, "shard_size": shard_size}))
        self.ranges = shard_ranges(count, shard_size)
        self._error, self._rebuild_flag = error, rebuild_flag

    def path(self, number: int, suffix: str) -> Path:
        """Return where a shard is."""
        return self.folder / f"{number:06d}{suffix}"

    def is_planned(self) -> bool:
        """Return whether the folder is about this plan."""
        return read_json(self.folder / PLAN_FILE) == self.plan

    @contextmanager
    def opened(
        self,
        *,
        rebuild: bool = False,
        belongings: Sequence[Path] = (),
        processes: Processes | None = None,
    ) -> Iterator[None]:
        """Keep what an earlier run of the same plan left, or clear the folder.

        Every process enters; no other run may, until the body ends.

        Args:
            rebuild: Clear, whatever is stored.
            belongings: Further folders that are cleared with the shards; nothing else is touched.
            processes: `PartialState` or `Accelerator` when several processes share the pass.

        Raises:
            ValueError: As the class's `error`, if the folder is about another plan or in use.
        """
        stored = None if rebuild else read_json(self.folder / PLAN_FILE)
        if stored is not None and stored != self.plan:
            changed = "; ".join(differences(stored, self.plan))
            raise self._error(
                f"{self.folder} is about something else: {changed}; expected the same model, "
                f"records and settings; pass rebuild ({self._rebuild_flag} true) to start anew, or "
                "use another folder"
            )
        wait(processes)  # every process has looked before the first one changes the folder
        with owned(self.folder, self._error) if is_main(processes) else nullcontext():
            if is_main(processes) and stored is None:
                (self.folder / PLAN_FILE).unlink(missing_ok=True)
                for path in self.folder.glob("[0-9]" * 6 + ".*"):
                    path.unlink()
                for folder in belongings:
                    shutil.rmtree(folder, ignore_errors=True)
                write_json(self.folder / PLAN_FILE, self.plan)
            wait(processes)
            yield


def shard_ranges(count: int, shard_size: int) -> list[range]:
    """Return the positions of the rows of each shard.

    >>> shard_ranges(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    starts = range(0, count, shard_size)
    return [range(start, min(start + shard_size, count)) for start in starts]


def deal(shards: Sequence[T], processes: Processes | None) -> Sequence[T]:
    """Return this process's shards: they are dealt in turn, whole."""
    if processes is None:
        return shards
    return shards[processes.process_index :: processes.num_processes]


def make_shards(
    missing: Mapping[int, Sequence[int]],
    make: Callable[[int, Sequence[int], Progress], object],
    *,
    description: str,
    unit: str = "row",
    num_shards: int | None = None,
    idle: Callable[[], object] | None = None,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> None:
    """Make the missing shards, each by one process; all wait for each other, however long it takes.

    Args:
        missing: Number of a shard -> its rows to be made, the same on every process.
        make: Makes and stores rows (number, rows) and says how many more are done.
        description: What the progress bar and the log call the work.
        unit: What the bar calls a row.
        num_shards: All shards, to log that a run goes on.
        idle: Called in place of `make` where no shard is left while others have one.
        processes: `PartialState` or `Accelerator` when several processes share the work.
        show_progress_bar: Show rows done and the time left, on the main process.
    """
    wait(processes)  # all have listed before the first new shard appears
    if num_shards and 0 < len(missing) < num_shards:
        logger.info("%s: going on, %d of %d shards to do", description, len(missing), num_shards)
    mine = deal(list(missing), processes)
    with tqdm(
        total=sum(len(missing[number]) for number in mine),
        desc=description,
        unit=unit,
        disable=not (show_progress_bar and is_main(processes)) or None,
    ) as bar:
        for number in mine:
            make(number, missing[number], bar.update)
    others = 1 if processes is None else processes.num_processes
    if idle is not None and len(mine) * others < len(missing):
        idle()
    wait(processes)


def differences(stored: Any, wanted: Any, name: str = "") -> list[str]:
    """Return what differs between two plans, a phrase each.

    >>> differences({"model": {"side": "query"}}, {"model": {"side": "document"}, "rows": 3})
    ['model.side = query, now document', 'rows = None, now 3']
    """
    if isinstance(stored, dict) and isinstance(wanted, dict):
        return [
            difference
            for key in {**wanted, **stored}
            for difference in differences(
                stored.get(key), wanted.get(key), f"{name}.{key}" if name else key
            )
        ]
    return [] if stored == wanted else [f"{name} = {str(stored)[:60]}, now {str(wanted)[:60]}"]
