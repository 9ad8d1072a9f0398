"""Everything verified about a row besides its types: JSON, ids, paths, pictures, negatives.

Knows no file formats and no models; `records` feeds it rows.
"""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from twn_rl.image_checks import check_images
from twn_rl.images import ImageError, ImageSource, resolve_inside
from twn_rl.record_schema import Item, Record, RecordError

logger = logging.getLogger(__name__)

_PROGRESS_FROM_IMAGES = 1000


class RecordChecks:
    """Verifies rows one after the other: raises at a bad one, or keeps count of it."""

    def __init__(self, path: Path, root: Path, *, is_strict: bool) -> None:
        """Check rows of the file `path` against the data root `root`; raise if `is_strict`."""
        self.path, self.root, self.is_strict = path, root, is_strict
        self.skipped: list[tuple[int, RecordError]] = []
        self.metadata_fields: Counter[str] = Counter()
        self._row_of_id: dict[str, int] = {}
        self._resolved: dict[str, str | ImageError] = {}
        self._problems: dict[str, ImageError] = {}

    def parse(self, row: int, data: Mapping[str, Any] | RecordError) -> Record | None:
        """Return the record of a row with absolute paths, or None if it is bad."""
        try:
            if isinstance(data, RecordError):
                raise data
            record = self._resolve(Record.from_dict(data))
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
        self.metadata_fields.update(set(data) - set(Record.__dataclass_fields__))
        return record

    def decode_images(self, records: Iterable[Record], *, workers: int = 0) -> None:
        """Decode each distinct image once and remember what is wrong with it."""
        paths = {str(s) for record in records for _, s in _sources_of(record)}
        self._problems = check_images(
            paths,
            workers=workers,
            label=f"Verifying images of {self.path.name}",
            show_progress_bar=len(paths) >= _PROGRESS_FROM_IMAGES,
        )

    def is_trainable(self, row: int, record: Record) -> bool:
        """Return whether all images are readable and the positive is not among the negatives."""
        for name, source in _sources_of(record):
            problem = self._problems.get(str(source))
            if problem is not None:
                self._bad(row, RecordError(str(problem), reason=problem.reason, field=name))
                return False
        positive = record.positive.content_key() if record.negatives else ""
        for i, negative in enumerate(record.negatives):
            if negative.content_key() == positive:
                self._bad(
                    row,
                    RecordError(
                        f"negatives[{i}] has the content of positive; expected items that must not "
                        "be found; remove it",
                        reason="positive_in_negatives",
                        field=f"negatives[{i}]",
                    ),
                )
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

    def _resolve(self, record: Record) -> Record:
        for name, source in _sources_of(record):
            key = str(source)
            if key not in self._resolved:
                try:
                    self._resolved[key] = str(resolve_inside(key, self.root))
                except ImageError as error:
                    self._resolved[key] = error
            found = self._resolved[key]
            if isinstance(found, ImageError):
                raise RecordError(str(found), reason=found.reason, field=name)

        def absolute(item: Item) -> Item:
            return replace(
                item,
                images=tuple(str(self._resolved[str(source)]) for source in item.images),
                video=tuple(str(self._resolved[str(source)]) for source in item.video),
            )

        return record.map_items(absolute)

    def _bad(self, row: int, error: RecordError) -> None:
        located = error.at(file=self.path, row=row)
        if self.is_strict:
            raise located
        self.skipped.append((row, located))


def parse_json(text: str | bytes, *, field: str | None) -> Any:
    """Return the value of a JSON text, or the RecordError that says why there is none."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:  # ValueError covers bad UTF-8 as well
        return RecordError(
            f"no valid JSON ({error}); expected one object without NaN or Infinity; correct it",
            reason="bad_json",
            field=field,
        )


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _sources_of(record: Record) -> Iterator[tuple[str, ImageSource]]:
    """Yield the dotted field name and the source of every picture of `record`."""
    names = ["query", "positive", *(f"negatives[{i}]" for i in range(len(record.negatives)))]
    for name, item in zip(names, record.items(), strict=True):
        for kind, sources in (("images", item.images), ("video", item.video)):
            for i, source in enumerate(sources):
                yield f"{name}.{kind}[{i}]", source
