"""Vectors of a task's queries and targets: in parts on disk, shared by processes, resumable.

A part is a fixed number of rows, whoever makes it: with any number of processes the same rows meet
in the same call, and their vectors are the same.
"""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from twn_rl.data.record import Item, RecordError
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemRow, Side
from twn_rl.inference.shard_maker import Embedder
from twn_rl.inference.vector_files import open_vectors
from twn_rl.inference.vector_meta import read_details
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.sharded_pass import Progress, deal, make_shards, shard_ranges
from twn_rl.runtime.whole_files import read_json, write_json

Fingerprints = Mapping[Side, Mapping[str, str | None]]


@dataclass(frozen=True)
class EncodedTask:
    """What scoring needs.

    Attributes:
        queries: (N, D) unit vectors.
        targets: (M, D) unit vectors.
        details: Of each query: `thought`, `gate_probability`, `think_tokens`, `problem`.
        seconds: Spent on queries and on targets, summed over processes.
    """

    queries: NDArray[np.float32]
    targets: NDArray[np.float32]
    details: list[dict[str, Any]]
    seconds: Mapping[Side, float]


class _Part:
    """Some rows of one side, as `encode_file` reads them."""

    def __init__(
        self, side: Side, name: str, ids: Sequence[str], items: Sequence[Item | RecordError]
    ) -> None:
        self.side: Side = side
        self.path, self.data_root = Path(name), Path()
        self.fields: dict[str, str] = {}
        self.ignored_fields: Counter[str] = Counter()
        self._rows = [
            ItemRow(key, None, item) if isinstance(item, RecordError) else ItemRow(key, item)
            for key, item in zip(ids, items, strict=True)
        ]

    def rows(self, start: int = 0) -> Iterator[ItemRow]:
        return iter(self._rows[start:])

    def describe(self, known: Mapping[str, Any] | None = None) -> dict[str, Any]:
        return {"rows": len(self._rows), "sha256": self._digest}

    @cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for row in self._rows:
            digest.update(json.dumps([row.id, *_description(row.item)]).encode())
        return digest.hexdigest()


class TaskEncoder:
    """Embeds one task after another into folders."""

    def __init__(
        self,
        embedder: Embedder,
        settings: EncodeSettings,
        fingerprints: Fingerprints,
        *,
        variant: str = "",
        processes: Processes | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        """Keep what all tasks share.

        Args:
            embedder: A `ThinkingEmbedder`.
            settings: How queries think; targets never do. `shard_size` is the rows of a part.
            fingerprints: Of the model, by side.
            variant: Name of a second way of thinking whose query vectors lie beside the first's;
                both have the same targets.
            processes: `PartialState` when several share the work.
            show_progress_bar: Show rows done, on the main process.
        """
        self.embedder, self.fingerprints, self.variant = embedder, fingerprints, variant
        self.processes = processes
        self.index = processes.process_index if processes else 0
        self.count = processes.num_processes if processes else 1
        self.settings: dict[Side, EncodeSettings] = {
            "query": replace(settings, on_bad_row="raise"),
            "document": replace(
                settings, think="never", think_threshold=None, think_rate=None, on_bad_row="raise"
            ),
        }
        self.shows_progress = show_progress_bar and self.index == 0

    def encode_share(self, data: TaskData, folder: Path, *, overwrite: bool = False) -> None:
        """Embed this process's parts of a task; those that are done stay.

        Raises:
            RecordError: For an item that cannot be embedded.
            VectorFileError: If parts were made with another model or other settings.
        """
        parts = deal(self._parts(data), self.processes)

        def make(number: int, rows: Sequence[int], progress: Progress) -> None:
            self._encode(data, folder, *parts[number], overwrite)
            progress(len(rows))

        # No waiting here: a process whose data is bad stops, and the others hear of it afterwards.
        make_shards(
            {number: range(start, stop) for number, (_, _, start, stop) in enumerate(parts)},
            make,
            description=folder.name,
            show_progress_bar=self.shows_progress,
        )

    def read(self, data: TaskData, folder: Path) -> EncodedTask:
        """Return what all processes have made of a task."""
        vectors: dict[Side, list[NDArray[np.float32]]] = {"query": [], "document": []}
        details: list[dict[str, Any]] = []
        seconds: dict[Side, float] = {"query": 0.0, "document": 0.0}
        for side, number, start, stop in self._parts(data):
            path = self._path(folder, side, number)
            stored = open_vectors(path)
            if len(stored.vectors) != stop - start or not stored.is_usable.all():
                raise RecordError(
                    f"{len(stored.vectors)} rows, {stored.failed_rows} failed, "
                    f"{stored.unwritten_rows} missing; expected {stop - start} whole ones; run "
                    "again with --overwrite true",
                    reason="bad_file",
                    file=path,
                )
            vectors[side].append(np.array(stored.vectors))
            seconds[side] += (read_json(_seconds_path(path)) or {}).get("seconds", 0.0)
            if side == "query":
                details += read_details(path)
        return EncodedTask(
            np.concatenate(vectors["query"]), np.concatenate(vectors["document"]), details, seconds
        )

    def _parts(self, data: TaskData) -> list[tuple[Side, int, int, int]]:
        """Return side, number, first row and end of every part."""
        size = self.settings["query"].shard_size
        counts: dict[Side, int] = {"query": len(data.queries), "document": len(data.targets.keys)}
        return [
            (side, number, rows.start, rows.stop)
            for side, count in counts.items()
            for number, rows in enumerate(shard_ranges(count, size))
        ]

    def _path(self, folder: Path, side: Side, number: int) -> Path:
        variant = f"-{self.variant}" if self.variant and side == "query" else ""
        return folder / f"{side}{variant}-{number:05d}.npy"

    def _encode(
        self,
        data: TaskData,
        folder: Path,
        side: Side,
        number: int,
        start: int,
        stop: int,
        overwrite: bool,
    ) -> None:
        if side == "query":
            ids = [query.id for query in data.queries[start:stop]]
            items: Sequence[Item | RecordError] = [q.item for q in data.queries[start:stop]]
        else:
            ids = [data.targets.name(number) for number in range(start, stop)]
            items = data.targets.read(start, stop)
        path = self._path(folder, side, number)
        part = _Part(side, f"{folder.name}/{path.stem}", ids, items)
        began = time.perf_counter()
        report = encode_file(
            self.embedder,
            part,
            path,
            self.settings[side],
            overwrite=overwrite,
            show_progress_bar=False,
            model_fingerprints=self.fingerprints[side],
        )
        if report.resumed_rows < report.rows:
            write_json(_seconds_path(path), {"seconds": time.perf_counter() - began})


def _seconds_path(path: Path) -> Path:
    return path.with_suffix(".seconds.json")


def _description(item: Item | None) -> list[Any]:
    """Return what an item is, without decoding its pictures."""
    if item is None:
        return []
    pictures = [[_picture(source) for source in part] for part in (item.images, item.video)]
    return [item.instruction, item.text, *pictures]


def _picture(source: Any) -> list[Any]:
    if isinstance(source, Image.Image):
        content = getattr(getattr(source, "fp", None), "getvalue", None)
        # Undecoded pages are still backed by their bytes.
        data = content() if content else source.tobytes()
        return [hashlib.sha256(data).hexdigest()]
    path = Path(source)
    return [path.parent.name, path.name, path.stat().st_size]
