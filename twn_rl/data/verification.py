"""What is verified of a row besides its types: ids, paths, negatives, pictures decoded once."""

from __future__ import annotations

import hashlib
import multiprocessing
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack, suppress
from pathlib import Path
from stat import S_ISREG
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from twn_rl.data.images import (
    ImageError,
    ImageFacts,
    ask_about_images,
    forget_images,
    image_facts,
    remember_images,
    remembered_facts,
    resolve_inside,
)
from twn_rl.data.jsonl import Row, RowFile, Thoughts
from twn_rl.data.markup import Markup
from twn_rl.data.record import Record, RecordError, named_in_errors, refuse_in_thought
from twn_rl.data.verified_blocks import PictureTable, VerifiedBlock, picture_columns
from twn_rl.runtime.whole_files import digest

_THREADS = 8
_PATHS_PER_JOB = 32


class ThoughtSource(Protocol):
    """Records whose thoughts are read without all else; `RecordSet` is one, `Mixture` another."""

    def __len__(self) -> int: ...

    def thoughts(self, positions: range) -> Iterator[Thoughts]:
        """Yield the thoughts of consecutive records, in any order."""
        ...


def refuse_markup_in_thoughts(
    records: Sequence[Record] | ThoughtSource, markup: Markup, part: range | None = None
) -> None:
    """Refuse records whose thoughts hold markup of the model they are to teach.

    Args:
        records: The records.
        markup: What means something to the model.
        part: Positions to look at; None is all.

    Raises:
        RecordError: For the first one; it names the record and the field.
    """
    positions = range(len(records)) if part is None else part
    read = getattr(records, "thoughts", None)
    thoughts = read(positions) if read else _thoughts(records, positions)
    progress = tqdm(
        thoughts, "Reading thoughts", len(positions), unit="record", delay=5.0, disable=None
    )
    for name, *cots in progress:
        for field, cot in zip(Thoughts._fields[1:], cots, strict=True):
            try:
                refuse_in_thought(cot, field, markup)
            except RecordError as error:
                detail = f"record {name!r}: {error.detail}"
                raise RecordError(detail, reason=error.reason, field=field) from error


def _thoughts(records: Any, positions: range) -> Iterator[Thoughts]:
    for position in positions:
        record = records[position]
        yield Thoughts(record.id, record.query_cot, record.positive_cot)


def digests_of(records: Iterable[Record]) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Return beginnings (n,) of the sha256 of ids, and the sha256 (n, 32) of all content.

    Pictures count by their pixels, as in `Item.content_key`, wherever they lie.
    """
    ids, contents = [], []
    for record in records:
        items = [item.content_key() for item in record.items()]
        thoughts = [record.query_cot, record.positive_cot]
        metadata = {key: str(value) for key, value in sorted(record.metadata.items())}
        ids.append(hashlib.sha256(record.id.encode()).digest()[:8])
        content = digest([record.id, record.source, items, thoughts, metadata])
        contents.append(bytes.fromhex(content))
    return (
        np.frombuffer(b"".join(ids), dtype=">u8").astype(np.uint64),
        np.frombuffer(b"".join(contents), np.uint8).reshape(-1, 32),
    )


class RowChecks:
    """Verifies blocks of rows, each for itself; ids are compared by who has all blocks.

    Enter it to let go of its workers in the end.
    """

    def __init__(
        self,
        rows: RowFile,
        root: Path,
        *,
        is_strict: bool,
        known: PictureTable,
        workers: int = 0,
    ) -> None:
        """Prepare to verify.

        Args:
            rows: The file.
            root: Data root.
            is_strict: Stop at the first bad row of a block.
            known: Pictures that need not be decoded again; those of verified blocks are added.
            workers: Processes that decode pictures; 0 decodes in threads of this process.
        """
        self.rows, self.root, self.is_strict, self.known = rows, root, is_strict, known
        self._workers, self._exit = workers, ExitStack()
        self._pool: Executor | None = None
        self._names: dict[str, str] = {}
        self._paths = _PathsInside(root)
        ask_about_images(str(rows.path.absolute()), known)

    def __enter__(self) -> RowChecks:
        return self

    def __exit__(self, *exception: Any) -> None:
        self._exit.close()

    def verify(
        self, block: range, progress: Callable[[float], object] = lambda share: None
    ) -> VerifiedBlock:
        """Return what is usable of the rows of a block and what is wrong with the others.

        Args:
            block: Places, see `RowFile.blocks`.
            progress: Told the share of the work that has been done since, in [0, 1].
        """
        parsed, errors = list[tuple[int, Record]](), list[tuple[int, RecordError]]()
        fields, count = Counter[str](), 0
        self._names = {}
        for _, place, data in self.rows.scan(block):
            count += 1
            try:
                parsed.append((place, self._parse(data)))
            except RecordError as error:
                errors.append((place, error))
                if self.is_strict:
                    break
                continue
            fields.update(set(data) - _FIELDS)  # pyright: ignore[reportArgumentType]
        if errors and self.is_strict:
            parsed = []  # their rows come before it, but nothing is trained on them
        problems, facts = self._examine(sorted(set(self._names.values())), progress)
        good = list[tuple[int, Record]]()
        for place, record in parsed:
            try:
                _refuse_untrainable(record, problems)
            except RecordError as error:
                errors.append((place, error))
                if self.is_strict:
                    break
                continue
            good.append((place, record))
        ids, contents = digests_of(record for _, record in good)
        forget_images(facts)
        self.rows.check()
        found = VerifiedBlock(
            places=np.array([place for place, _ in good], dtype=np.int64),
            ids=ids,
            contents=contents,
            rows=count,
            errors=sorted(errors, key=lambda pair: pair[0]),
            metadata_fields=fields,
            is_final=not problems
            and not (errors and self.is_strict)
            and not any(error.reason in _MENDED_OUTSIDE for _, error in errors),
            **picture_columns(facts, self.rows.path.parent.resolve()),
        )
        self.known.add(found)
        return found

    def _parse(self, data: Row) -> Record:
        if isinstance(data, RecordError):
            raise data
        return Record.from_dict(data).with_paths(self._resolve)

    def _resolve(self, name: str) -> str:
        if name not in self._names:
            self._names[name] = self._paths.resolve(name)
        return self._names[name]

    def _examine(
        self, paths: list[str], progress: Callable[[float], object]
    ) -> tuple[dict[str, ImageError], dict[str, ImageFacts]]:
        """Return what is wrong with pictures that cannot be used, and the facts of the others."""
        facts = {path: found for path in paths if (found := remembered_facts(path)) is not None}
        unknown = [path for path in paths if path not in facts]
        problems: dict[str, ImageError] = {}
        for path, finding in zip(unknown, self._examine_all(unknown), strict=True):
            if isinstance(finding, ImageError):
                problems[path] = finding
            else:
                facts[path] = finding
            progress(1 / len(unknown))
        if not unknown:
            progress(1)
        remember_images(facts)
        return problems, facts

    def _examine_all(self, paths: list[str]) -> Iterator[ImageFacts | ImageError]:
        if not paths:
            return
        if self._pool is None:
            self._pool = self._exit.enter_context(self._start())
        try:
            jobs = [paths[i : i + _PATHS_PER_JOB] for i in range(0, len(paths), _PATHS_PER_JOB)]
            for findings in self._pool.map(_examine, jobs):
                yield from findings
        except BrokenProcessPool as error:
            self._pool = None
            raise RuntimeError(
                f"a worker of {self._workers} died while verifying images ({error}); expected all "
                "to finish; start fewer workers if memory ran out, or 0 to find the picture"
            ) from error

    def _start(self) -> Executor:
        if self._workers:
            # Not forked: a fork of a process that runs threads can hang.
            return ProcessPoolExecutor(self._workers, multiprocessing.get_context("spawn"))
        return ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1))


# Fields of a record; others go to its metadata.
_FIELDS = frozenset(Record.__dataclass_fields__)
# Somebody may put the picture where it should be, and the file of the rows stays what it is.
_MENDED_OUTSIDE = {"missing_image", "unreadable_image", "path_outside_root"}


def _refuse_untrainable(record: Record, problems: dict[str, ImageError]) -> None:
    """Refuse unreadable images, and a positive that is among the negatives."""
    for name, source in record.sources():
        if str(source) in problems:
            with named_in_errors(name):
                raise problems[str(source)]
    record.refuse_positive_as_negative()


def _examine(paths: list[str]) -> list[ImageFacts | ImageError]:
    findings: list[ImageFacts | ImageError] = []
    for path in paths:
        try:
            findings.append(image_facts(path))
        except ImageError as error:
            findings.append(error)
    return findings


class _PathsInside:
    """`resolve_inside` for many files in few folders: each folder is looked up once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._folders: dict[str, str | None] = {}

    def resolve(self, name: str) -> str:
        """Return the absolute path of a file inside the root; raise as `resolve_inside` does."""
        folder, _, last = name.rpartition("/")
        is_plain = not name.startswith("/") and ":" not in name and last not in ("", ".", "..")
        if is_plain and (inside := self._folder(folder)):
            path = f"{inside}/{last}"
            with suppress(OSError, ValueError):
                if S_ISREG(os.lstat(path).st_mode):  # no link, which might lead outside
                    return path
        return str(resolve_inside(name, self._root))

    def _folder(self, name: str) -> str | None:
        """Return the absolute path of a folder inside the root, None if it is none."""
        if name not in self._folders:
            path = None
            with suppress(OSError, ValueError, RuntimeError):
                path = (self._root / name).resolve()
            is_inside = path is not None and path.is_relative_to(self._root)
            self._folders[name] = str(path).rstrip("/") if is_inside else None
        return self._folders[name]
