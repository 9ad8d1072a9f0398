"""Embedding in several processes: each holds the model on its device and takes chunks of inputs.

Knows neither modes nor vectors: a chunk is one call of the embedder.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import multiprocessing
from tqdm.auto import tqdm

from twn_rl.inference.details import EncodeDetails
from twn_rl.inference.inputs import InputError, as_list, is_single
from twn_rl.inference.options import EncodeOptions, Side
from twn_rl.inference.vector_forms import as_asked
from twn_rl.runtime.sharded_pass import shard_ranges

if TYPE_CHECKING:
    from twn_rl.inference.embedder import ThinkingEmbedder

# As sentence-transformers: ten chunks a process even out their loads, and none grows too large.
_CHUNKS_PER_PROCESS = 10
_LARGEST_CHUNK = 5000


@dataclass(frozen=True)
class EncodePool:
    """Processes that embed, from `start_multi_process_pool` to `stop_multi_process_pool`.

    Attributes:
        executor: Runs the calls.
        devices: Where they run, one process each.
    """

    executor: ProcessPoolExecutor
    devices: tuple[str, ...]

    def stop(self) -> None:
        """End the processes; calls that have not begun are dropped."""
        self.executor.shutdown(cancel_futures=True)


def start_pool(
    embedder: ThinkingEmbedder, devices: Sequence[str | torch.device] | None
) -> EncodePool:
    """Return a pool with the embedder in each process; its model stays on the CPU, shared.

    Args:
        embedder: What embeds.
        devices: One process for each; None takes all GPUs, or the CPU four times without one.
    """
    if devices is None:
        count = torch.cuda.device_count()
        devices = [f"cuda:{index}" for index in range(count)] or ["cpu"] * 4
    names = tuple(map(str, devices))
    if not names:
        raise ValueError(
            "target_devices is empty; expected at least one device; name one, or pass None"
        )
    embedder.to("cpu").model.share_memory()
    context = multiprocessing.get_context("spawn")
    places = context.SimpleQueue()
    for name in names:
        places.put(name)
    threads = max(1, torch.get_num_threads() // len(names))
    executor = ProcessPoolExecutor(
        len(names), context, initializer=_settle, initargs=(embedder, places, threads)
    )
    return EncodePool(executor, names)


def encode_in_pool(
    embedder: ThinkingEmbedder, inputs: Any, side: Side, options: EncodeOptions
) -> EncodeDetails:
    """Return the details of one call whose inputs several processes embed.

    Args:
        embedder: What embeds; without `options.pool`, a pool is started for this call.
        inputs: N inputs, or one.
        side: Whose gate is asked.
        options: How to embed; lists about single inputs are cut like the inputs.

    Raises:
        InputError: For an input that cannot be embedded, with its position.
        RuntimeError: If a process died.
    """
    values, places = as_list(inputs), options.device
    plain = replace(
        options, pool=None, device=None, chunk_size=None, show_progress_bar=False,
        convert_to_numpy=True, convert_to_tensor=False,
    )  # fmt: skip
    plain.per_input(len(values))  # says now what no process could tell
    nothing = embedder.encode_ways([], {"": plain.of_rows([])}, side=side)[""]
    pool = options.pool or start_pool(embedder, places if isinstance(places, list) else None)
    try:
        parts = _chunks(pool, values, side, plain, options)
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process of the pool on {', '.join(pool.devices)} died; expected all to live; look "
            "for its message above (often no memory), stop the pool and start a smaller one"
        ) from error
    finally:
        if options.pool is None:
            pool.stop()
    details = EncodeDetails.joined([nothing, *parts])
    asked = {"options": options, "device": embedder.device}
    details.embeddings = as_asked(details.embeddings, is_single=is_single(inputs), **asked)
    details.thought_embeddings = [as_asked(rows, **asked) for rows in details.thought_embeddings]
    return details


def _chunks(
    pool: EncodePool, values: list[Any], side: Side, plain: EncodeOptions, options: EncodeOptions
) -> list[EncodeDetails]:
    """Return the details of consecutive chunks."""
    share = math.ceil(len(values) / len(pool.devices) / _CHUNKS_PER_PROCESS)
    size = options.chunk_size or max(1, min(share, _LARGEST_CHUNK))
    chunks = shard_ranges(len(values), size)
    jobs = [
        pool.executor.submit(_encode, [values[row] for row in rows], side, plain.of_rows(rows))
        for rows in chunks
    ]
    parts = []
    try:
        for job in tqdm(jobs, desc="chunks", disable=not options.show_progress_bar or None):
            parts.append(job.result())
    except InputError as error:
        raise InputError(chunks[len(parts)][error.position], error.problem) from error
    finally:
        for job in jobs:
            job.cancel()
    return parts


# The embedder of this process.
_settled: list[ThinkingEmbedder] = []


def _settle(embedder: ThinkingEmbedder, places: Any, threads: int) -> None:
    """Take a place in a new process."""
    torch.set_num_threads(threads)
    _settled.append(embedder.to(places.get()))


def _encode(inputs: list[Any], side: Side, options: EncodeOptions) -> EncodeDetails:
    """Embed a chunk in this process."""
    return _settled[0].encode_ways(inputs, {"only": options}, side=side, logs=False)["only"]
