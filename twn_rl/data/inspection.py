"""What a file of records holds, in numbers: sources, shares, duplicates, pictures, problems."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from twn_rl.data.images import image_facts
from twn_rl.data.markup import KNOWN_MARKUP, Markup
from twn_rl.data.record import Record, RecordError, refuse_in_thought
from twn_rl.data.record_files import RecordSet
from twn_rl.runtime.whole_files import write_text

_BINS = 10
_SHOWN_SIZES = 5
_SHOWN_DUPLICATES = 100
_PROGRESS_FROM_RECORDS = 10_000


@dataclass(frozen=True)
class Problem:
    """Something that must be corrected: where it is, a key for counting, and the message."""

    where: str
    reason: str
    message: str


@dataclass(frozen=True)
class Distribution:
    """How whole numbers are spread.

    Attributes:
        count: How many there are.
        minimum: The smallest.
        median: The middle one, the lower of two.
        p95: The smallest that at least 95 % do not exceed.
        maximum: The largest.
        mean: Their mean.
        bins: First value, last value and count of at most ten bins of equal width.
    """

    count: int
    minimum: int
    median: int
    p95: int
    maximum: int
    mean: float
    bins: tuple[tuple[int, int, int], ...]

    @classmethod
    def of(cls, values: Iterable[int]) -> "Distribution | None":
        """Return the distribution of `values`, or None if there are none.

        >>> Distribution.of([3, 1, 2, 12]).bins
        ((1, 2, 2), (3, 4, 1), (5, 6, 0), (7, 8, 0), (9, 10, 0), (11, 12, 1))
        """
        ordered = sorted(values)
        if not ordered:
            return None
        low, high = ordered[0], ordered[-1]
        width = -(-(high - low + 1) // _BINS)
        counts = Counter((value - low) // width for value in ordered)
        return cls(
            count=len(ordered),
            minimum=low,
            median=ordered[(len(ordered) - 1) // 2],
            p95=ordered[-(-95 * len(ordered) // 100) - 1],
            maximum=high,
            mean=sum(ordered) / len(ordered),
            bins=tuple(
                (first, first + width - 1, counts[index])
                for index, first in enumerate(range(low, high + 1, width))
            ),
        )


@dataclass
class RecordReport:
    """What is known about one file.

    Attributes:
        file: Its path.
        rows: How many rows were read.
        usable: How many of them can be trained on.
        left_out: How many cannot, by reason, such as "unreadable_image".
        problems: What must be corrected: rows left out, then what else was found.
        tasks: Usable records by source, then by `metadata["task"]` ("" if there is none).
        shares: Part of the usable records, in [0, 1], with negatives, CoTs, images and videos.
        duplicates: How many records repeat an earlier one in everything but id, source, metadata.
        duplicate_ids: Id of a repeated record and of the earlier one, for the first hundred.
        negatives: Negatives a record.
        frames: Frames a video.
        pictures: How many distinct picture files are used.
        picture_sizes: The five most frequent sizes, "width x height", and their counts.
        picture_sides: Longer side of each distinct picture, in pixels.
        marked_texts: How many items hold markup (special tokens, think markers) in instruction or
            text; a model is shown it as text.
        tokens: Lengths in tokens after rendering, by what was measured; empty without a model.
        token_records: How many records were sampled for them.
    """

    file: str
    rows: int
    usable: int
    left_out: dict[str, int]
    problems: list[Problem]
    tasks: dict[str, dict[str, int]] = field(default_factory=dict)
    shares: dict[str, float] = field(default_factory=dict)
    duplicates: int = 0
    duplicate_ids: list[tuple[str, str]] = field(default_factory=list)
    negatives: Distribution | None = None
    frames: Distribution | None = None
    pictures: int = 0
    picture_sizes: dict[str, int] = field(default_factory=dict)
    picture_sides: Distribution | None = None
    marked_texts: int = 0
    tokens: dict[str, Distribution] = field(default_factory=dict)
    token_records: int = 0

    def save(self, path: str | Path) -> None:
        """Write everything as JSON; the file appears whole or not at all."""
        write_text(Path(path), json.dumps(asdict(self), indent=1, ensure_ascii=False))


def inspect_records(records: RecordSet, file: str | Path) -> RecordReport:
    """Return the report of verified records; their pictures are not decoded again.

    Args:
        records: Loaded with `on_bad_record="skip"`, so that rows left out are reported.
        file: Path to name in the report.
    """
    tasks: dict[str, Counter[str]] = {}
    having: Counter[str] = Counter()
    pictures: set[str] = set()
    negatives, frames, marked = [], [], 0
    repeats = _Repeats()
    progress = tqdm(
        records, desc="Inspecting records", disable=len(records) < _PROGRESS_FROM_RECORDS or None
    )
    for record in progress:
        tasks.setdefault(record.source, Counter())[str(record.metadata.get("task", ""))] += 1
        having.update(trait for trait, has in _TRAITS.items() if has(record))
        negatives.append(len(record.negatives))
        frames += [len(item.video) for item in record.items() if item.video]
        pictures.update(str(s) for item in record.items() for s in (*item.images, *item.video))
        repeats.add(record)
        marked += _count_marked(record, KNOWN_MARKUP)
    facts = [image_facts(path) for path in sorted(pictures)]
    sizes = Counter(f"{fact.width} x {fact.height}" for fact in facts)
    return RecordReport(
        file=str(file),
        rows=len(records) + len(records.skipped_rows),
        usable=len(records),
        left_out=dict(records.skipped.most_common()),
        problems=[
            Problem(f"row {error.row}", error.reason, str(error)) for error in records.errors
        ],
        tasks={source: dict(sorted(counts.items())) for source, counts in sorted(tasks.items())},
        shares={trait: having[trait] / len(records) for trait in _TRAITS},
        duplicates=repeats.count,
        duplicate_ids=[(records[i].id, records[first].id) for i, first in repeats.pairs],
        negatives=Distribution.of(negatives),
        frames=Distribution.of(frames),
        pictures=len(facts),
        picture_sizes=dict(sizes.most_common(_SHOWN_SIZES)),
        picture_sides=Distribution.of(max(fact.width, fact.height) for fact in facts),
        marked_texts=marked,
    )


def add_markup(report: RecordReport, records: Iterable[Record], markup: Markup) -> None:
    """Count texts with markup of a model, and add the thoughts that hold some to the problems.

    Args:
        report: Changed in place.
        records: The records it is about.
        markup: What means something to the model.
    """
    report.marked_texts = 0
    for record in records:
        report.marked_texts += _count_marked(record, markup)
        for name in ("query_cot", "positive_cot"):
            try:
                refuse_in_thought(getattr(record, name), name, markup)
            except RecordError as error:
                where = f"record {record.id!r}"
                report.problems.append(Problem(where, error.reason, f"{where}: {error}"))


def _count_marked(record: Record, markup: Markup) -> int:
    texts = [f"{item.instruction or ''}\n{item.text or ''}" for item in record.items()]
    return sum(bool(markup.found(text)) for text in texts)


_TRAITS: dict[str, Callable[[Record], Any]] = {
    "negatives": lambda record: record.negatives,
    "query CoT": lambda record: record.query_cot is not None,
    "positive CoT": lambda record: record.positive_cot is not None,
    "images": lambda record: any(item.images for item in record.items()),
    "videos": lambda record: any(item.video for item in record.items()),
}


class _Repeats:
    """Finds records that repeat earlier ones, remembering 16 bytes of each."""

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[tuple[int, int]] = []
        self._first: dict[bytes, int] = {}
        self._seen = 0

    def add(self, record: Record) -> None:
        """Look at the next record."""
        parts = [
            record.query.content_key(),
            record.positive.content_key(),
            sorted(item.content_key() for item in record.negatives),
            record.query_cot,
            record.positive_cot,
        ]
        key = hashlib.sha256(json.dumps(parts).encode()).digest()[:16]
        first = self._first.setdefault(key, self._seen)
        if first != self._seen:
            self.count += 1
            if len(self.pairs) < _SHOWN_DUPLICATES:
                self.pairs.append((self._seen, first))
        self._seen += 1
