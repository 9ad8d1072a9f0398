"""A long pass over rows, cut into shards: several processes share it and a killed run goes on.

Knows neither what a row is nor how a shard is stored.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twn_rl.runtime.processes import Processes, is_main, wait
from twn_rl.runtime.whole_files import read_json, write_json

logger = logging.getLogger(__name__)

PLAN_FILE = "plan.json"


class ShardedPass:
    """The folder of one pass: its `plan.json` says what the shards in it depend on.

    Every process makes one and calls `open`, then `share`.

    Attributes:
        folder: Where the shards are; all processes must see the same one.
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
            error: What is raised for another plan.
            rebuild_flag: Flag its message names.
        """
        self.folder = Path(folder)
        self.plan: dict[str, Any] = json.loads(json.dumps({**plan, "shard_size": shard_size}))
        self.ranges = shard_ranges(count, shard_size)
        self._error, self._rebuild_flag = error, rebuild_flag

    @property
    def numbers(self) -> range:
        """Number of every shard."""
        return range(len(self.ranges))

    def open(
        self,
        clear: Callable[[], None],
        *,
        rebuild: bool = False,
        processes: Processes | None = None,
    ) -> None:
        """Keep what an earlier run of the same plan left, or clear the folder.

        Args:
            clear: Removes what an earlier pass wrote, and nothing else; the plan is gone by then.
            rebuild: Clear, whatever is stored.
            processes: `PartialState` or `Accelerator` when several processes share the pass.

        Raises:
            ValueError: As the class's `error`, if the folder is about another plan.
        """
        stored = None if rebuild else read_json(self.folder / PLAN_FILE)
        if stored is not None and stored != self.plan:
            self._refuse(stored)
        wait(processes)  # every process has looked before the first one changes the folder
        if is_main(processes) and stored is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / PLAN_FILE).unlink(missing_ok=True)
            clear()
            write_json(self.folder / PLAN_FILE, self.plan)
        wait(processes)

    def share(self, missing: Sequence[int], processes: Processes | None = None) -> list[int]:
        """Return which of the missing shards this process makes."""
        wait(processes)  # all have listed before the first new shard appears
        if 0 < len(missing) < len(self.numbers):
            logger.info(
                "%s: going on, %d of %d shards to do", self.folder, len(missing), len(self.numbers)
            )
        if processes is None:
            return list(missing)
        return list(missing[processes.process_index :: processes.num_processes])

    def _refuse(self, stored: Mapping[str, Any]) -> None:
        other = [
            f"{name} = {_short(stored.get(name))}, now {_short(self.plan.get(name))}"
            for name in {**self.plan, **stored}
            if stored.get(name) != self.plan.get(name)
        ]
        raise self._error(
            f"{self.folder} is about something else: {'; '.join(other)}; expected the same model, "
            f"records and settings; pass rebuild ({self._rebuild_flag} true) to start anew, or use "
            "another folder"
        )


def shard_ranges(count: int, shard_size: int) -> list[range]:
    """Return the positions of the rows of each shard.

    >>> shard_ranges(5, 2)
    [range(0, 2), range(2, 4), range(4, 5)]
    """
    starts = range(0, count, shard_size)
    return [range(start, min(start + shard_size, count)) for start in starts]


def _short(value: Any) -> str:
    return str(value)[:60]
