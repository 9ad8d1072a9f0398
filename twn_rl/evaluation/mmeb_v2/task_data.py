"""What a task is once it is read: queries, targets, and who is whose candidate.

Targets are held by what makes them, not opened: a page of a corpus is read when it is embedded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.record import Item, RecordError


@dataclass(frozen=True)
class TaskQuery:
    """One query.

    Attributes:
        id: Its name in the results.
        item: What to embed.
        relevant: Target -> gain, above 0.
        candidates: Targets it is ranked among; None: all of them.
    """

    id: str
    item: Item
    relevant: Mapping[int, float]
    candidates: NDArray[np.int64] | None = None


class TaskRow(NamedTuple):
    """What a row of annotations says: a query, its candidates by key, and which are right."""

    query: Item
    candidates: Sequence[tuple[str, Item]]
    positives: Sequence[str]


class Targets(Protocol):
    """The candidates of a task, numbered."""

    keys: list[str]

    def read(self, start: int, stop: int) -> Sequence[Item | RecordError]:
        """Return the items of some of them, or what is wrong with one."""
        ...

    def name(self, number: int) -> str:
        """Return what errors call one: its key, and where it stands if it is in a file."""
        ...


@dataclass
class ItemTargets:
    """Targets whose items are in memory; a key that comes again keeps its first item."""

    keys: list[str] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    _places: dict[str, int] = field(default_factory=dict)

    def add(self, key: str, item: Item) -> int:
        """Return the number of a target, which is new unless its key is known."""
        place = self._places.setdefault(key, len(self.keys))
        if place == len(self.keys):
            self.keys.append(key)
            self.items.append(item)
        return place

    def query(self, name: str, row: TaskRow, *, is_local: bool) -> TaskQuery:
        """Return the query of a row, whose candidates are added to the targets.

        Candidates with the same key count once: the official scorer would give a repeated one two
        positions, which changes hit@5 and hit@10 but never hit@1.

        Args:
            name: Of the query.
            row: What its row says.
            is_local: Whether it is ranked among its own candidates, not among all targets.

        Raises:
            RecordError: If there are no candidates, or a positive is not among them.
        """
        numbers = {key: self.add(key, target) for key, target in row.candidates}
        missing = [key for key in row.positives if key not in numbers]
        if not numbers or not row.positives or missing:
            raise RecordError(
                f"query {name!r}: positives {[key[:80] for key in missing or row.positives]} not "
                f"among its {len(numbers)} candidates {[key[:40] for key in list(numbers)[:5]]}; "
                "expected every positive to be one of them; correct the row",
                reason="missing_positive",
            )
        candidates = np.array(list(numbers.values()), dtype=np.int64) if is_local else None
        return TaskQuery(name, row.query, {numbers[key]: 1.0 for key in row.positives}, candidates)

    def read(self, start: int, stop: int) -> Sequence[Item | RecordError]:
        """Return the items of some targets."""
        return self.items[start:stop]

    def name(self, number: int) -> str:
        """Return the key of a target."""
        return self.keys[number]


@dataclass
class TaskData:
    """A task that can be embedded and scored.

    Attributes:
        queries: In the order of the annotations.
        targets: All candidates of all queries, each once.
        warnings: What makes its score differ from an official one.
    """

    queries: list[TaskQuery]
    targets: Targets
    warnings: list[str] = field(default_factory=list)


def query_item(
    instruction: str | None, text: str | None, images: Sequence[str], video: Sequence[str]
) -> Item:
    """Return the item of a query.

    Raises:
        RecordError: If it has both pictures and a video.
    """
    if images and video:
        raise RecordError(
            f"row has {len(images)} images and {len(video)} frames of a video; expected one of "
            "them, as no MMEB-V2 input has both; remove the other",
            reason="mixed_media",
        )
    return Item(instruction, text, tuple(images), tuple(video))
