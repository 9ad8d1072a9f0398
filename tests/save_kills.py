"""Ends a process inside a save, at the n-th time that it touches a file there, as SIGKILL does.

The interpreter announces what it opens, renames, links, makes and removes; each of these is a point
at which a machine may go away. Knows no trainer.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

_PATHS = {"open": 1, "os.rename": 2, "os.link": 2, "os.mkdir": 1, "os.remove": 1, "os.rmdir": 1}
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class KillPoints:
    """Counts the points of a save and ends the process at one of them."""

    def __init__(
        self, folder: Path, begin: str, *, point: int | None, is_torn: bool = False
    ) -> None:
        """Count from the first path below `folder` that holds `begin`.

        Args:
            folder: What is saved to.
            begin: Part of a path, such as "checkpoint-4"; "" counts from the start.
            point: Where to end, from 0; None only counts.
            is_torn: Lose half of the file that was opened last, before the end.
        """
        self.folder, self.begin, self.point, self.is_torn = str(folder), begin, point, is_torn
        self.seen, self.is_on, self.last = 0, False, ""
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _PATHS:
            return
        if event == "open" and not arguments[2] & _WRITING:
            return
        paths = [str(path) for path in arguments[: _PATHS[event]] if isinstance(path, str | Path)]
        inside = [path for path in paths if path.startswith(self.folder)]
        self.is_on = self.is_on or any(self.begin in path for path in inside)
        if not inside or not self.is_on:
            return
        if self.seen == self.point:
            self.point = None  # what follows is heard, too
            self._end()
        self.seen += 1
        if event == "open":
            self.last = inside[0]

    def _end(self) -> None:
        if self.is_torn and os.path.isfile(self.last):
            os.truncate(self.last, os.path.getsize(self.last) // 2)
        os.kill(os.getpid(), signal.SIGKILL)
