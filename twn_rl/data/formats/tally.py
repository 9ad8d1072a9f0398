"""What a conversion counts, and its summary in the log. Knows no format."""

import logging
from collections import Counter
from dataclasses import dataclass, field

from twn_rl.data.record import Record

logger = logging.getLogger(__name__)


@dataclass
class Tally:
    """Everything counted during a conversion.

    Attributes:
        records: Records written.
        images: References to pictures in them, frames of videos included.
        negatives: Hard negatives in them.
        saved_images: Embedded pictures that were saved as files.
        dropped: Rows that became no record, by reason.
        unknown_fields: Rows that had each field nobody knows, and that was left behind.
        notes: How often something was changed, left out or guessed, by what it was.
    """

    records: int = 0
    images: int = 0
    negatives: int = 0
    saved_images: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    unknown_fields: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)
    first_of: dict[str, str] = field(default_factory=dict)

    def note(self, what: str, first: str | None = None) -> None:
        """Count a change or guess; the `first` example of its kind is kept for the summary."""
        self.notes[what] += 1
        if first is not None:
            self.first_of.setdefault(what, first)

    def drop(self, reason: str, first: str | None = None) -> None:
        """Count a row without a record; the `first` message of a reason is kept for the summary."""
        self.dropped[reason] += 1
        if first is not None:
            self.first_of.setdefault(reason, first)

    def add(self, record: Record) -> None:
        """Count what a written record holds."""
        self.records += 1
        self.negatives += len(record.negatives)
        self.images += sum(len(item.images) + len(item.video) for item in record.items())

    def log(self) -> None:
        """Log the summary: counts as information, everything left out as a warning."""
        logger.info(
            "records: %d, images: %d (%d saved from embedded bytes), negatives: %d",
            *(self.records, self.images, self.saved_images, self.negatives),
        )
        counted = [(f"dropped, {reason}", reason, n) for reason, n in self.dropped.most_common()]
        counted += [(what, what, n) for what, n in self.notes.most_common()]
        for shown, what, count in counted:
            first = f"; first: {self.first_of[what]}" if what in self.first_of else ""
            logger.warning("%s: %d%s", shown, count, first)
        if self.unknown_fields:
            logger.warning("unknown fields, not carried over: %s", dict(self.unknown_fields))
