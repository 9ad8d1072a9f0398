"""Weighted mixtures of record files, and the order their records are drawn in.

A mixture is a YAML file:

    sources:
      - {path: shoes.jsonl, weight: 2}
      - {path: docs/pages.parquet, weight: 1, limit: 10000, data_root: docs, name: pages}
    one_source_per_batch: true

Paths are relative to that file. A source is drawn with probability weight / sum of weights.
"""

import logging
import sys
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence, Sized
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Any, Literal, overload

import msgspec
import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from twn_rl.data.jsonl import Thoughts
from twn_rl.data.record import Record, RecordError, checked_fields
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.reading import load_yaml

logger = logging.getLogger(__name__)

MIXTURE_SUFFIXES = (".yaml", ".yml")


class SourceSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One entry of `sources`.

    Attributes:
        path: File of records, relative to the mixture file.
        weight: How often it is drawn, relative to the other sources.
        limit: Read at most this many rows; None reads all.
        data_root: Folder of its images, relative to the mixture file; its own folder when None.
        name: What logs and errors call it; the stem of `path` when None.
    """

    path: str
    weight: Annotated[float, msgspec.Meta(gt=0, le=sys.float_info.max)] = 1.0
    limit: Annotated[int, msgspec.Meta(ge=1)] | None = None
    data_root: str | None = None
    name: str | None = None

    @property
    def label(self) -> str:
        """What logs and errors call it."""
        return self.name or Path(self.path).stem


class _MixtureFile(msgspec.Struct, forbid_unknown_fields=True):
    sources: Annotated[list[Any], msgspec.Meta(min_length=1)]
    one_source_per_batch: bool = True


class Mixture(Sequence[Record]):
    """The records of several files, one file after the other.

    Attributes:
        sources: The files' records.
        weights: How often each is drawn, relative to the others.
        names: What logs call them.
        one_source_per_batch: Whether a batch is drawn from one source at a time, so that its
            in-batch negatives are of one kind, hence hard.
    """

    def __init__(
        self,
        sources: Sequence[RecordSet],
        weights: Sequence[float],
        *,
        names: Sequence[str],
        one_source_per_batch: bool = True,
    ) -> None:
        """Hold loaded sources, each with at least one record, and positive weights."""
        self.sources, self.weights, self.names = list(sources), list(weights), list(names)
        self.one_source_per_batch = one_source_per_batch
        self._starts = list(accumulate((len(source) for source in sources), initial=0))

    def __len__(self) -> int:
        """Return the number of records of all sources."""
        return self._starts[-1]

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        """Return a record with absolute image paths, or a list of those of a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"index = {index}; expected less than {len(self)} records")
        source = self.source_of(position)
        return self.sources[source][position - self._starts[source]]

    def digests(self, positions: range) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
        """Return `digests_of` consecutive records, as they were when they were verified."""
        parts = [source.digests(part) for source, part in self._parts(positions)]
        ids, contents = zip(*parts, strict=True)
        return np.concatenate(ids), np.concatenate(contents)

    def thoughts(self, positions: range) -> Iterator[Thoughts]:
        """Yield the thoughts of consecutive records, each source's in the order of its file."""
        for source, part in self._parts(positions):
            yield from source.thoughts(part)

    def _parts(self, positions: range) -> Iterator[tuple[RecordSet, range]]:
        """Yield the sources that have some of the positions, and which of their own these are."""
        for source, start, end in zip(self.sources, self._starts, self._starts[1:], strict=False):
            first, last = max(positions.start, start), min(positions.stop, end)
            if first < last:
                yield source, range(first - start, last - start)

    def source_of(self, position: int) -> int:
        """Return the number of the source that holds the record at `position`, counted from 0."""
        return bisect_right(self._starts, position) - 1

    def positions(self, source: int) -> range:
        """Return the positions of a source's records."""
        return range(self._starts[source], self._starts[source + 1])


def is_mixture(path: str | Path) -> bool:
    """Tell by the suffix whether a file describes a mixture."""
    return Path(path).suffix in MIXTURE_SUFFIXES


def load_mixture(
    path: str | Path,
    *,
    data_root: str | Path | None = None,
    on_bad_record: Literal["raise", "skip"] = "raise",
    workers: int = 0,
    sharers: Sequence[Processes] = (),
) -> Mixture:
    """Return the verified records of every source of a mixture file.

    Args:
        path: YAML file.
        data_root: Of the sources that name none; each file's folder when None.
        on_bad_record: As for `load_records`.
        workers: As for `load_records`.
        sharers: As for `load_records`.

    Raises:
        ValueError: For an unreadable file or settings that cannot work, all named together, before
            any record is read.
        RecordError: For bad records, and for a source without usable ones.
        FileNotFoundError: If there is no such YAML file.
    """
    path = Path(path)
    settings, one_source_per_batch = _read_settings(path)
    sources = [
        load_records(
            path.parent / source.path,
            data_root=data_root if source.data_root is None else path.parent / source.data_root,
            on_bad_record=on_bad_record,
            limit=source.limit,
            workers=workers,
            sharers=sharers,
        )
        for source in settings
    ]
    total = sum(source.weight for source in settings)
    for source, records in zip(settings, sources, strict=True):
        share = 100 * source.weight / total
        logger.info("%s: %s, %d records, %.1f %%", path.name, source.label, len(records), share)
    return Mixture(
        sources,
        [source.weight for source in settings],
        names=[source.label for source in settings],
        one_source_per_batch=one_source_per_batch,
    )


def _read_settings(path: Path) -> tuple[list[SourceSettings], bool]:
    wanted = "expected sources: [{path: ..., weight: ...}]"
    try:
        data = load_yaml(path)
    except ValueError as error:
        raise ValueError(f"mixture {error}; {wanted}") from error
    if not isinstance(data, dict) or not isinstance(data.get("sources"), list):
        raise ValueError(f"mixture {path} holds no list of sources; {wanted}; add it")
    problems, settings = Problems(), list[SourceSettings]()
    with problems.told(RecordError):
        checked_fields(data, _MixtureFile, None)
    for number, entry in enumerate(data["sources"]):
        where = f"sources[{number}]"
        with problems.told(RecordError):
            source = checked_fields(entry, SourceSettings, where)
            problems.unless(
                (path.parent / source.path).is_file() and not is_mixture(source.path),
                f"{where}.path = {source.path!r}, expected a file of records under {path.parent}, "
                "not another mixture",
            )
            settings.append(source)
    labels = [source.label for source in settings]
    repeated = sorted({label for label in labels if labels.count(label) > 1})
    problems.unless(not repeated, f"name = {repeated} are used twice, expected one name a source")
    problems.refuse(f"mixture {path}", "change these entries")
    return settings, data.get("one_source_per_batch", True)


class MixtureSampler(Sampler[int]):
    """Positions of a mixture in drawing order; the same on every process, for a seed and an epoch.

    With `one_source_per_batch`, each run of `batch_size` positions is from one source. A record
    comes again only when all others of its source that fill whole batches have been drawn. An epoch
    has as many batches as fit the number of records, whatever the weights.
    """

    def __init__(
        self,
        mixture: Mixture,
        *,
        batch_size: int,
        seed: int,
        epoch: Callable[[], int] = lambda: 0,
    ) -> None:
        """Prepare to draw.

        Args:
            mixture: What to draw from.
            batch_size: Records of one batch, of all processes together.
            seed: Decides the order, with the epoch.
            epoch: Asked at the start of each iteration; counted from 0.
        """
        self.mixture, self.batch_size, self.seed, self.epoch = mixture, batch_size, seed, epoch
        for name, source in zip(mixture.names, mixture.sources, strict=True):
            if mixture.one_source_per_batch and len(source) < batch_size:
                logger.warning(
                    "source %s has %d records, fewer than a batch of %d: its batches repeat some",
                    *(name, len(source), batch_size),
                )

    def __len__(self) -> int:
        """Return the number of positions of an epoch, a multiple of `batch_size`."""
        return max(1, len(self.mixture) // self.batch_size) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        """Yield the positions of the epoch that is asked for now."""
        size = self.batch_size if self.mixture.one_source_per_batch else 1
        chooser, *shufflers = (
            np.random.default_rng([self.seed, self.epoch(), number])
            for number in range(1 + len(self.mixture.sources))
        )
        draws = [
            _blocks(self.mixture.positions(source), size, shuffler)
            for source, shuffler in enumerate(shufflers)
        ]
        weights = np.array(self.mixture.weights, dtype=np.float64)
        chosen = chooser.choice(len(draws), size=len(self) // size, p=weights / weights.sum())
        for source in chosen:
            yield from next(draws[source])


def _blocks(positions: range, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Yield blocks of `size` positions for ever, from one shuffled pass after the other."""
    while True:
        order = positions.start + rng.permutation(len(positions))
        if len(order) < size:
            order = np.resize(order, size)  # repeats from the start
        # The rest that fills no block waits for another pass: no block then repeats a record.
        for first in range(0, len(order) - size + 1, size):
            yield order[first : first + size].tolist()


class ReorderedSampler(Sampler[int]):
    """What a sampler of places yields, each place replaced by what an order has there.

    It puts TRL's scheme of repeated prompts on top of a mixture's order.
    """

    def __init__(self, places: Sampler[int], order: MixtureSampler) -> None:
        """Hold both; `places` must yield numbers below `len(order)`."""
        self.places, self.order = places, order

    def __len__(self) -> int:
        """Return how many positions are yielded."""
        sized: Sized = self.places  # pyright: ignore[reportAssignmentType]
        return len(sized)

    def __iter__(self) -> Iterator[int]:
        """Yield positions of the mixture."""
        order = list(self.order)
        return (order[place] for place in self.places)
