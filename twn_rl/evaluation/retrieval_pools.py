"""What a query is ranked against: distinct targets in pools.

Further positives of a query, and the query itself, are no rivals: see `false_negatives`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from PIL import Image

from twn_rl.data.record import Item, Record, pool_of
from twn_rl.metrics.negatives import FalseNegatives

CandidateScope = Literal["pool", "local"]


@dataclass(frozen=True)
class Candidates:
    """Distinct target items and, for each record, which of them compete.

    Attributes:
        items: M distinct items; equal content is one candidate.
        keys: Their content keys, shortened.
        positive: Per record the index of its positive.
        pools: Per record the indices of its pool; records of a pool share one list.
        barred: Per record those of them that are neither its positive nor rivals.
    """

    items: list[Item]
    keys: list[str]
    positive: list[int]
    pools: list[list[int]]
    barred: list[frozenset[int]]

    def competing(self, index: int) -> list[int]:
        """Return the indices of all candidates of a record: its positive and its rivals."""
        pool, barred = self.pools[index], self.barred[index]
        return [row for row in pool if row not in barred] if barred else pool

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return key -> text and picture paths of every candidate, for a report."""
        return {key: describe_item(item) for key, item in zip(self.keys, self.items, strict=True)}


def collect_candidates(
    records: Sequence[Record],
    *,
    scope: CandidateScope = "pool",
) -> Candidates:
    """Return the candidates of each record.

    Args:
        records: N records.
        scope: "pool": every positive and negative of all records of the same `pool_of`. "local":
            the record's own positive and negatives. Less what is no negative of the query.
    """
    catalogue = _Catalogue()
    positive = [catalogue.index(record.positive) for record in records]
    negatives = [[catalogue.index(item) for item in record.negatives] for record in records]
    # A dict keeps the order of first appearance, which makes results independent of hash seeds.
    own = [dict.fromkeys([p, *ns]) for p, ns in zip(positive, negatives, strict=True)]
    if scope == "local":
        competing = [list(indices) for indices in own]
    else:
        pools: dict[str, dict[int, None]] = {}
        names = [pool_of(record) for record in records]
        for name, indices in zip(names, own, strict=True):
            pools.setdefault(name, {}).update(indices)
        columns = {name: list(indices) for name, indices in pools.items()}
        competing = [columns[name] for name in names]
    queries = [catalogue.key(record.query) for record in records]
    own_keys = [catalogue.keys[index] for index in positive]
    known = FalseNegatives(zip(queries, own_keys, strict=True))
    rows = catalogue.row_of
    barred = [
        frozenset(rows[key] for key in known.of(query) if key in rows and key != own)
        for query, own in zip(queries, own_keys, strict=True)
    ]
    return Candidates(catalogue.items, catalogue.keys, positive, competing, barred)


def describe_item(item: Item) -> dict[str, Any]:
    """Return instruction, text and picture paths of an item; opened pictures have no path."""
    pictures = [*item.images, *item.video]
    return {
        "instruction": item.instruction,
        "text": item.text,
        "images": [str(p) for p in pictures if not isinstance(p, Image.Image)],
    }


class _Catalogue:
    """Distinct items in order of first appearance."""

    def __init__(self) -> None:
        self.items: list[Item] = []
        self.keys: list[str] = []
        self.row_of: dict[str, int] = {}
        self._key_of: dict[Item, str] = {}  # spares decoding one picture for each of its uses

    def key(self, item: Item) -> str:
        """Return the shortened content key of an item, a candidate or not."""
        has_paths_only = not any(isinstance(p, Image.Image) for p in (*item.images, *item.video))
        if has_paths_only and item in self._key_of:
            return self._key_of[item]
        key = item.content_key()[:16]
        if has_paths_only:
            self._key_of[item] = key
        return key

    def index(self, item: Item) -> int:
        """Return the index of an item among the candidates, a new one if it is not there yet."""
        key = self.key(item)
        if key not in self.row_of:
            self.row_of[key] = len(self.items)
            self.items.append(item)
            self.keys.append(key)
        return self.row_of[key]
