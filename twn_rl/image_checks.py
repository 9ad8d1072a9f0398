"""Which pictures can be used: each decoded once, in threads or processes. Knows no records."""

import multiprocessing
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from tqdm import tqdm

from twn_rl.images import ImageError, ImageFacts, image_facts, remember_images

_THREADS = 8
_PATHS_PER_JOB = 32


def check_images(
    paths: Iterable[str],
    *,
    workers: int = 0,
    label: str = "Verifying images",
    show_progress_bar: bool = True,
) -> dict[str, ImageError]:
    """Return what is wrong with each picture that cannot be used; the others are remembered.

    Args:
        paths: Absolute paths, each decoded once.
        workers: Processes that decode; 0 decodes in threads of this process.
        label: Name of the progress bar.
        show_progress_bar: Show pictures done.

    Raises:
        RuntimeError: If a worker process dies.
    """
    distinct = sorted(set(paths))
    problems: dict[str, ImageError] = {}
    facts: dict[str, ImageFacts] = {}
    progress = tqdm(
        _examine_all(distinct, workers),
        desc=label,
        unit="image",
        total=len(distinct),
        disable=not show_progress_bar,
    )
    for path, finding in zip(distinct, progress, strict=True):
        if isinstance(finding, ImageFacts):
            facts[path] = finding
        else:
            problems[path] = finding
    if workers:
        remember_images(facts)
    return problems


def _examine_all(paths: list[str], workers: int) -> Iterator[ImageFacts | ImageError]:
    pool: Executor
    workers = min(workers, -(-len(paths) // _PATHS_PER_JOB))  # no process without a job
    if workers:
        # Not forked: a fork of a process that runs threads can hang.
        pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"))
    else:
        pool = ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))
    with pool:
        try:
            yield from pool.map(_examine, paths, chunksize=_PATHS_PER_JOB)
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"a worker of {workers} died while verifying images ({error}); expected all to "
                "finish; start fewer workers if memory ran out, or 0 to find the picture"
            ) from error


def _examine(path: str) -> ImageFacts | ImageError:
    try:
        return image_facts(path)
    except ImageError as error:
        return error
