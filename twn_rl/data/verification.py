"""Everything verified about a row besides its types: ids, paths, pictures, negatives.

Knows no file formats and no models; `records` feeds it rows.
"""

import logging
from collections import Counter
from pathlib import Path

from twn_rl.data.image_checks import CACHE_SUFFIX, check_images
from twn_rl.data.images import ImageError, resolve_inside
from twn_rl.data.jsonl import Row, sources_of, with_absolute_paths
from twn_rl.data.record import Record, RecordError

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

    def parse(self, row: int, data: Row) -> Record | None:
        """Return the record of a row with absolute paths, or None if it is bad."""
        try:
            if isinstance(data, RecordError):
                raise data
            record = with_absolute_paths(Record.from_dict(data), self._resolve)
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

    def decode_images(self, *, workers: int = 0) -> None:
        """Decode each distinct image of the parsed rows and remember what is wrong with it."""
        paths = {found for found in self._resolved.values() if isinstance(found, str)}
        self._problems = check_images(
            paths,
            workers=workers,
            cache=self.path.with_name(f"{self.path.name}{CACHE_SUFFIX}"),
            label=f"Verifying images of {self.path.name}",
            show_progress_bar=len(paths) >= _PROGRESS_FROM_IMAGES,
        )

    def parse_again(self, data: Row) -> Record:
        """Return the record of a row that `parse` has accepted."""
        if isinstance(data, RecordError):
            raise data
        return with_absolute_paths(Record.from_dict(data), self._resolve)

    def is_trainable(self, row: int, record: Record) -> bool:
        """Return whether all images are readable and the positive is not among the negatives."""
        for name, source in sources_of(record):
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

    def _resolve(self, name: str) -> str:
        if name not in self._resolved:
            try:
                self._resolved[name] = str(resolve_inside(name, self.root))
            except ImageError as error:
                self._resolved[name] = error
        found = self._resolved[name]
        if isinstance(found, ImageError):
            raise ImageError(str(found), reason=found.reason)
        return found

    def _bad(self, row: int, error: RecordError) -> None:
        located = error.at(file=self.path, row=row)
        if self.is_strict:
            raise located
        self.skipped.append((row, located))
