"""Shards of a file of vectors, made in any order by several processes and appended in order.

`NAME.parts/` holds shards whose turn has not come: the main process appends them to the file as
soon as all before them are there. Alone, a process appends at once. Knows no items and no model.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.inference.vector_files import VectorWriter
from twn_rl.inference.vector_meta import VectorFileError
from twn_rl.runtime.processes import Processes, gather_objects, is_main
from twn_rl.runtime.sharded_pass import ShardedPass
from twn_rl.runtime.whole_files import map_file, read_json, write_array, write_json

PARTS_SUFFIX = ".parts"


class SharedShards:
    """The shards of one file of vectors, see the module.

    Attributes:
        ranges: Rows of each shard.
        processes: Who shares the work; None for one process.
        done_rows: Rows that an earlier run has appended; known once the file is open, as the next.
        counts: What was counted over the rows that are appended; at the end, on every process.
    """

    def __init__(
        self,
        output: str | Path,
        plan: Mapping[str, Any],
        rows: int,
        shard_size: int,
        processes: Processes | None,
        *,
        has_helpers: bool = False,
    ) -> None:
        """Plan the work on `output`; `plan` says what the rows depend on.

        Args:
            output: The .npy file.
            plan: What the rows depend on, as JSON.
            rows: Rows of the file.
            shard_size: Rows of a shard.
            processes: Who shares the work.
            has_helpers: Programs that are none of `processes` add shards, too: each by an object of
                this class that it never opens.
        """
        is_alone = processes is None or processes.num_processes == 1
        self.processes = None if is_alone else processes
        self._has_helpers = has_helpers
        self.done_rows, self.counts = 0, dict[str, int]()
        self._path, self._rows = Path(output), rows
        self._pass = ShardedPass(
            self._path.with_suffix(PARTS_SUFFIX), plan, rows, shard_size, error=VectorFileError
        )
        self.ranges = self._pass.ranges
        self._writer: VectorWriter | None = None

    @contextmanager
    def opened(self, open_writer: Callable[[], VectorWriter], *, anew: bool) -> Iterator[None]:
        """Open the file on the main process, and keep what earlier runs of the same plan left.

        Args:
            open_writer: Opens the file.
            anew: Nothing that is there counts.

        Raises:
            Exception: On every process, what `open_writer` raised.
        """
        with ExitStack() as held:
            problem: Exception | None = None
            if is_main(self.processes):
                try:
                    self._writer = held.enter_context(open_writer())
                except (ValueError, OSError) as error:
                    problem = error
            self._tell_everyone(problem)
            is_shared = self._has_helpers or self.processes is not None
            has_parts = is_shared or self._pass.folder.is_dir()
            if has_parts:
                anew = anew or not self._pass.is_planned()
                held.enter_context(self._pass.opened(rebuild=anew, processes=self.processes))
            if self._writer is not None:
                self._append_parts()
            self._tell_everyone(None)
            yield
            if self._writer is not None and self._writer.done_rows < self._rows:
                raise VectorFileError(
                    f"{self._pass.folder} lacks the shard of row {self._writer.done_rows}; "
                    "expected all that the other processes have made; give every process the "
                    "same disk"
                )
            self._tell_everyone(None)
            if has_parts and is_main(self.processes):
                shutil.rmtree(self._pass.folder, ignore_errors=True)

    def missing(self) -> dict[int, range]:
        """Return number and rows of the shards that nobody has made."""
        todo = {n: rows for n, rows in enumerate(self.ranges) if rows.start >= self.done_rows}
        if not self._pass.folder.is_dir():
            return todo
        return {number: rows for number, rows in todo.items() if self._part(number) is None}

    def add(
        self,
        number: int,
        vectors: NDArray[np.float32],
        details: Sequence[Mapping[str, Any]],
        counts: Mapping[str, int],
    ) -> None:
        """Store a shard; it is lost no more when this returns."""
        if self._writer is not None and self.ranges[number].start == self._writer.done_rows:
            self._append(vectors, details, counts)
        else:
            write_array(self._pass.path(number, ".npy"), vectors)
            # Last: it says that the shard is there.
            told = {"details": list(details), "counts": dict(counts)}
            write_json(self._pass.path(number, ".json"), told)
        if self._writer is not None:
            self._append_parts()

    def append_rest(self) -> None:
        """Append what the others have made; all processes call it once all shards are made."""
        if self._writer is not None:
            self._append_parts()

    def _tell_everyone(self, problem: Exception | None) -> None:
        """Let every process know what the main process knows."""
        known = problem, self.done_rows, self.counts
        if self._writer is not None:
            known = problem, self._writer.done_rows, dict(self._writer.counts)
        if self.processes is not None:
            known = gather_objects(known)[0]
        problem, self.done_rows, self.counts = known
        if problem is not None:
            raise problem

    def _part(self, number: int) -> tuple[NDArray[np.float32], dict[str, Any]] | None:
        """Return vectors and what is told of them, None if the shard is absent or damaged."""
        told = read_json(self._pass.path(number, ".json"))
        rows = len(self.ranges[number])
        vectors = map_file(self._pass.path(number, ".npy"), (rows, None))
        is_whole = isinstance(told, dict) and len(told.get("details", ())) == rows
        return (vectors, told) if is_whole and vectors is not None else None

    def _append_parts(self) -> None:
        """Append the shards whose turn has come."""
        writer = self._writer
        assert writer is not None
        while writer.done_rows < self._rows and self._pass.folder.is_dir():
            number = writer.done_rows // len(self.ranges[0])
            part = self._part(number)
            if part is None:
                return
            self._append(part[0], part[1]["details"], part[1]["counts"])
            for suffix in (".json", ".npy"):
                self._pass.path(number, suffix).unlink()

    def _append(
        self,
        vectors: NDArray[np.float32],
        details: Sequence[Mapping[str, Any]],
        counts: Mapping[str, int],
    ) -> None:
        writer = self._writer
        assert writer is not None
        try:
            writer.append(vectors, details, counts)
        except OSError as error:
            raise OSError(
                error.errno,
                f"{error.strerror}: cannot write rows from {writer.done_rows} on of "
                f"{writer.rows} to {writer.path}; expected room on the disk; free some and "
                f"run the same command again: the first {writer.done_rows} rows are kept",
            ) from error
