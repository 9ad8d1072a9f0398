"""What a task is once it is read: queries, targets, who is whose candidate. Knows no files.

Targets are held by what makes them, not opened: a page of a corpus is read when it is embedded.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

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

    def number(self, key: str) -> int | None:
        """Return the number of a target, None if there is none of this key."""
        return self._places.get(key)

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


def local_query(
    name: str,
    item: Item,
    candidates: Iterable[tuple[str, Item]],
    positives: Iterable[str],
    targets: ItemTargets,
) -> TaskQuery:
    """Return a query that is ranked among its own candidates, which are added to `targets`.

    Candidates with the same key count once: the official scorer would give a repeated one two
    positions, which changes hit@5 and hit@10 but never hit@1.

    Raises:
        RecordError: If there are no candidates, or a positive is not among them.
    """
    keys = {key: targets.add(key, target) for key, target in candidates}
    wanted = list(positives)
    missing = [key for key in wanted if key not in keys]
    if not keys or not wanted or missing:
        raise RecordError(
            f"query {name!r}: positives {[key[:80] for key in missing or wanted]} not among its "
            f"{len(keys)} candidates {[key[:40] for key in list(keys)[:5]]}; expected every "
            "positive to be one of them; correct the row",
            reason="missing_positive",
        )
    relevant = {keys[key]: 1.0 for key in wanted}
    return TaskQuery(name, item, relevant, np.array(list(keys.values()), dtype=np.int64))


def refuse_mixed_media(item: Item) -> Item:
    """Return the item, unless it holds both pictures and a video.

    Raises:
        RecordError: If it does.
    """
    if item.images and item.video:
        raise RecordError(
            f"row has {len(item.images)} images and {len(item.video)} frames of a video; expected "
            "one of them, as no MMEB-V2 input has both; remove the other",
            reason="mixed_media",
        )
    return item
