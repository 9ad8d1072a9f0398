"""What is verified of a row besides its types: ids, paths, negatives, pictures decoded once."""

import json
import logging
import multiprocessing
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

import msgspec
from tqdm import tqdm

from twn_rl.data.images import (
    ImageError,
    ImageFacts,
    image_facts,
    remember_images,
    remembered_facts,
    resolve_inside,
)
from twn_rl.data.jsonl import Row
from twn_rl.data.markup import Markup
from twn_rl.data.record import Record, RecordError, named_in_errors, refuse_in_thought
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)

CACHE_SUFFIX = ".images.cache"
_CACHE_FORMAT = 1
_CACHE_FROM_IMAGES = 1000
_PROGRESS_FROM_IMAGES = 1000
_THREADS = 8
_PATHS_PER_JOB = 32


def refuse_markup_in_thoughts(records: Iterable[Record], markup: Markup) -> None:
    """Refuse records whose thoughts hold markup of the model they are to teach.

    Raises:
        RecordError: For the first one; it names the record and the field.
    """
    for record in tqdm(records, desc="Reading thoughts", unit="record", delay=5.0):
        for name in ("query_cot", "positive_cot"):
            try:
                refuse_in_thought(getattr(record, name), name, markup)
            except RecordError as error:
                detail = f"record {record.id!r}: {error.detail}"
                raise RecordError(detail, reason=error.reason, field=name) from error


class RecordChecks:
    """Verifies rows one after the other: raises at a bad one, or keeps count of it."""

    def __init__(self, path: Path, root: Path, *, is_strict: bool) -> None:
        """Check rows of the file `path` against the data root `root`; raise if `is_strict`."""
        self.path, self.root, self.is_strict = path, root, is_strict
        self.skipped: list[tuple[int, RecordError]] = []
        self.metadata_fields: Counter[str] = Counter()
        self._row_of_id: dict[str, int] = {}
        self._resolved: dict[str, str] = {}
        self._problems: dict[str, ImageError] = {}

    def parse(self, row: int, data: Row) -> Record | None:
        """Return the record of a row with absolute paths, or None if it is bad."""
        try:
            record = self.parse_again(data)
            if record.id in self._row_of_id:
                raise RecordError(
                    f"id = {record.id!r} was used in row {self._row_of_id[record.id]}; expected "
                    "unique ids; rename one or remove the copy",
                    reason="duplicate_id",
                    field="id",
                )
        except RecordError as error:
            return self._bad(row, error)
        self._row_of_id[record.id] = row
        assert not isinstance(data, RecordError)
        self.metadata_fields.update(set(data) - set(Record.__dataclass_fields__))
        return record

    def decode_images(self, *, workers: int = 0) -> None:
        """Decode each distinct image of the parsed rows and remember what is wrong with it."""
        cache = self.path.with_name(f"{self.path.name}{CACHE_SUFFIX}")
        self._problems = _unusable(sorted(set(self._resolved.values())), workers, cache)

    def parse_again(self, data: Row) -> Record:
        """Return the record of a row that `parse` has accepted."""
        if isinstance(data, RecordError):
            raise data
        return Record.from_dict(data).with_paths(self._resolve)

    def is_trainable(self, row: int, record: Record) -> bool:
        """Return whether all images are readable and the positive is not among the negatives."""
        try:
            for name, source in record.sources():
                if str(source) in self._problems:
                    with named_in_errors(name):
                        raise self._problems[str(source)]
            record.refuse_positive_as_negative()
        except RecordError as error:
            self._bad(row, error)
            return False
        return True

    def report(self, *, usable: int, total: int) -> None:
        """Log what was left out and where unknown fields went; refuse a file without records."""
        if self.metadata_fields:
            logger.info("%s: kept in metadata: %s", self.path, dict(self.metadata_fields))
        if self.skipped:
            counts = dict(Counter(error.reason for _, error in self.skipped))
            logger.warning(
                "%s: skipped %d of %d rows %s, first: %s",
                *(self.path, len(self.skipped), total, counts, self.skipped[0][1]),
            )
        if not usable:
            first = f"; first problem: {self.skipped[0][1]}" if self.skipped else ""
            raise RecordError(
                f"usable records = 0 of {total} rows; expected at least one; correct the file"
                + first,
                reason="no_records",
                file=self.path,
            )

    def _resolve(self, name: str) -> str:
        if name not in self._resolved:
            self._resolved[name] = str(resolve_inside(name, self.root))
        return self._resolved[name]

    def _bad(self, row: int, error: RecordError) -> None:
        located = error.at(file=self.path, row=row)
        if self.is_strict:
            raise located
        self.skipped.append((row, located))


def _unusable(paths: list[str], workers: int, cache: Path) -> dict[str, ImageError]:
    """Return what is wrong with each picture that cannot be used; the others are remembered.

    Args:
        paths: Absolute paths, each decoded once.
        workers: Processes that decode; 0 decodes in threads of this process.
        cache: File that keeps what was found, so that the next run decodes only pictures whose
            size or time of change differs. Written from a thousand pictures on.
    """
    cached = _read_cache(cache)
    remember_images(cached)
    # Threads look the known ones up themselves; a worker process would decode them.
    unknown = [path for path in paths if not workers or remembered_facts(path) is None]
    problems: dict[str, ImageError] = {}
    found: dict[str, ImageFacts] = {}
    progress = tqdm(
        _examine_all(unknown, workers),
        desc=f"Verifying images of {cache.name.removesuffix(CACHE_SUFFIX)}",
        unit="image",
        total=len(unknown),
        disable=len(paths) < _PROGRESS_FROM_IMAGES or None,
    )
    for path, finding in zip(unknown, progress, strict=True):
        if isinstance(finding, ImageError):
            problems[path] = finding
        elif cached.get(path) != finding:
            found[path] = finding
    remember_images(found)
    if found and len(paths) >= _CACHE_FROM_IMAGES:
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
                name, *fact = json.loads(line)
                facts[os.path.normpath(folder / name)] = msgspec.convert(fact, ImageFacts)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, msgspec.DecodeError) as error:
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
