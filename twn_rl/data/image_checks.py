"""Which pictures can be used: each decoded once, in threads or processes. Knows no records."""

import json
import logging
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from twn_rl.data.images import (
    ImageError,
    ImageFacts,
    image_facts,
    remember_images,
    remembered_facts,
)
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)

CACHE_SUFFIX = ".images.cache"
_CACHE_FORMAT = 1
_CACHE_FROM_IMAGES = 1000
_THREADS = 8
_PATHS_PER_JOB = 32


def check_images(
    paths: Iterable[str],
    *,
    workers: int = 0,
    cache: Path | None = None,
    label: str = "Verifying images",
    show_progress_bar: bool = True,
) -> dict[str, ImageError]:
    """Return what is wrong with each picture that cannot be used; the others are remembered.

    Args:
        paths: Absolute paths, each decoded once.
        workers: Processes that decode; 0 decodes in threads of this process.
        cache: File that keeps what was found, so that the next run decodes only pictures whose
            size or time of change differs. Written from a thousand pictures on.
        label: Name of the progress bar.
        show_progress_bar: Show pictures done.

    Raises:
        RuntimeError: If a worker process dies.
    """
    distinct = sorted(set(paths))
    cached = {} if cache is None else _read_cache(cache)
    remember_images(cached)
    # Threads look the known ones up themselves; a worker process would decode them.
    unknown = [p for p in distinct if not workers or remembered_facts(p) is None]
    problems: dict[str, ImageError] = {}
    found: dict[str, ImageFacts] = {}
    progress = tqdm(
        _examine_all(unknown, workers),
        desc=label,
        unit="image",
        total=len(unknown),
        disable=not show_progress_bar,
    )
    for path, finding in zip(unknown, progress, strict=True):
        if isinstance(finding, ImageError):
            problems[path] = finding
        elif cached.get(path) != finding:
            found[path] = finding
    if workers:
        remember_images(found)
    if cache is not None and found and len(distinct) >= _CACHE_FROM_IMAGES:
        _write_cache(cache, cached | found)
    return problems


def _read_cache(path: Path) -> dict[str, ImageFacts]:
    """Return facts by absolute path; a cache that cannot be read costs time, not the run."""
    facts: dict[str, ImageFacts] = {}
    folder = path.parent.resolve()
    try:
        with path.open(encoding="utf-8") as file:
            if json.loads(file.readline()) != {"format": _CACHE_FORMAT}:
                raise ValueError(f"expected format {_CACHE_FORMAT}")
            for line in file:
                name, digest, *numbers = json.loads(line)
                width, height, size_bytes, modified_ns = map(int, numbers)
                entry = ImageFacts(str(digest), width, height, size_bytes, modified_ns)
                facts[os.path.normpath(folder / name)] = entry
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError) as error:
        logger.warning("Image cache %s is not usable (%s); verifying all images", path, error)
        return {}
    return facts


def _write_cache(path: Path, facts: Mapping[str, ImageFacts]) -> None:
    """Write facts by path relative to the cache, so that data can move as a whole."""
    folder = path.parent.resolve()
    try:
        with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"format": _CACHE_FORMAT}) + "\n")
            for name, fact in facts.items():
                file.write(json.dumps([os.path.relpath(name, folder), *fact]) + "\n")
    except OSError as error:
        logger.warning("Image cache %s cannot be written (%s); going on without", path, error)


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
