"""A file of vectors made by actors of Ray Data, over as many machines as a cluster has.

Every actor holds the model and makes whole shards; the caller appends them in order. The file, its
folder and the pictures must be on a disk that all machines see. Knows no command line.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from twn_rl.inference.encode_file import EncodeJob, plan_job
from twn_rl.inference.encode_settings import EncodeReport, EncodeSettings
from twn_rl.inference.shard_maker import Embedder, ItemSource, ShardMaker
from twn_rl.inference.shared_shards import SharedShards
from twn_rl.runtime.extras import extra

# What a batch of Ray Data holds here: column -> one value a shard.
Batch = dict[str, Any]


@dataclass(frozen=True)
class RayActors:
    """Who works.

    Attributes:
        number: Actors, each with a model of its own.
        gpus: GPUs of one actor; 0 keeps it on the CPU.
        cpus: CPU cores of one actor.
    """

    number: int = 1
    gpus: float = 0.0
    cpus: float = 1.0

    def __post_init__(self) -> None:
        """Refuse no actors, and shares below zero."""
        if self.number < 1 or self.gpus < 0 or self.cpus < 0:
            raise ValueError(f"{self}; expected number >= 1 and no share of a machine below 0")


class ShardActor:
    """Makes the shards it is told the rows of, and leaves them beside the file."""

    def __init__(
        self, load: Callable[[], Embedder], source: ItemSource, job: EncodeJob, start: int
    ) -> None:
        """Load the model."""
        self._maker = ShardMaker(load(), source, job.shape, job.settings, start)
        self._shards = shards_of(job)

    def __call__(self, batch: Batch) -> Batch:
        """Make each shard of a batch; return their numbers and how many rows they have."""
        made = [len(self._shards.ranges[number]) for number in batch["shard"]]
        for number in map(int, batch["shard"]):
            self._shards.add(number, *self._maker.make(self._shards.ranges[number]))
        return {"shard": batch["shard"], "rows": made}


def shards_of(job: EncodeJob) -> SharedShards:
    """Return the shards of a file, as the caller and every actor know them."""
    return SharedShards(
        *(job.output, job.plan, job.shape[0], job.settings.shard_size), None, has_helpers=True
    )


def encode_with_ray(
    load: Callable[[], Embedder],
    source: ItemSource,
    output: str | Path,
    settings: EncodeSettings | None = None,
    *,
    actors: RayActors | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> EncodeReport:
    """Write the bytes that `encode_file` would, by actors of Ray Data.

    It goes on where an earlier run stopped, whoever made that. `RAY_ADDRESS` names a cluster;
    without it Ray starts on this machine alone, without a dashboard.

    Args:
        load: Loads the `ThinkingEmbedder`; called once here, to know what the rows depend on, and
            once in every actor.
        source: Rows to encode, by an absolute path: actors may run in other folders.
        output: The .npy file.
        settings: How to encode.
        actors: Who works.
        overwrite: Start anew whatever is in `output`.
        show_progress_bar: Show rows done and the time left.

    Raises:
        ModuleNotFoundError: Without the extra `ray`.
        VectorFileError: If `output` was made otherwise, is damaged or in use.
        RecordError: For a bad row, if `on_bad_row` is "raise"; Ray wraps it.
    """
    with extra("ray"):
        import ray.data  # pyright: ignore[reportMissingImports]
    actors, output = actors or RayActors(), Path(output).absolute()
    job = plan_job(load(), source, output, settings, overwrite=overwrite)
    work, rows = shards_of(job), job.shape[0]
    with work.opened(partial(job.open_writer, overwrite=overwrite), anew=overwrite):
        resumed, missing = work.done_rows, work.missing()
        if missing:
            start_ray()
            made = ray.data.from_items(
                [{"shard": number} for number in missing], override_num_blocks=len(missing)
            ).map_batches(
                ShardActor,  # pyright: ignore[reportArgumentType]
                fn_constructor_args=(load, source, job, resumed),
                batch_size=1,
                concurrency=actors.number,
                num_gpus=actors.gpus,
                num_cpus=actors.cpus,
            )
            done = rows - sum(map(len, missing.values()))
            with tqdm(
                total=rows, initial=done, unit="row", disable=not show_progress_bar or None
            ) as bar:
                for shard in made.iter_rows():
                    bar.update(int(shard["rows"]))
                    work.append_rest()
        work.append_rest()
    return EncodeReport(rows, resumed, work.counts)


def start_ray() -> None:
    """Join the cluster of RAY_ADDRESS, or start one on this machine; once a process."""
    with extra("ray"):
        import ray  # pyright: ignore[reportMissingImports]
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to anybody
    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        ray.init(address=address) if address else ray.init(include_dashboard=False)
