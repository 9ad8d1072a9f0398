"""What a query is ranked against: distinct targets in pools; knows no vectors and no models."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from twn_rl.records import Item, Record

CandidateScope = Literal["pool", "local"]


@dataclass(frozen=True)
class Candidates:
    """Distinct target items and, for each record, which of them compete.

    Attributes:
        items: M distinct items; equal content is one candidate.
        keys: Their content keys, shortened.
        positive: Per record the index of its positive.
        competing: Per record the indices of all its candidates, its positive among them.
    """

    items: list[Item]
    keys: list[str]
    positive: list[int]
    competing: list[list[int]]

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return key -> text and picture paths of every candidate, for a report."""
        return {key: describe_item(item) for key, item in zip(self.keys, self.items, strict=True)}


def collect_candidates(
    records: Sequence[Record],
    *,
    scope: CandidateScope = "pool",
    data_root: str | Path | None = None,
) -> Candidates:
    """Return the candidates of each record.

    Args:
        records: N records.
        scope: "pool": every positive and negative of all records with an equal
            `metadata["pool"]` (records without one share a pool). "local": the record's own
            positive and negatives.
        data_root: Folder that relative picture paths are relative to.
    """
    catalogue = _Catalogue(data_root)
    positive = [catalogue.index(record.positive) for record in records]
    negatives = [[catalogue.index(item) for item in record.negatives] for record in records]
    # A dict keeps the order of first appearance, which makes results independent of hash seeds.
    own = [dict.fromkeys([p, *ns]) for p, ns in zip(positive, negatives, strict=True)]
    if scope == "local":
        competing = [list(indices) for indices in own]
    else:
        pools: dict[str, dict[int, None]] = {}
        names = [str(record.metadata.get("pool")) for record in records]
        for name, indices in zip(names, own, strict=True):
            pools.setdefault(name, {}).update(indices)
        columns = {name: list(indices) for name, indices in pools.items()}
        competing = [columns[name] for name in names]
    return Candidates(catalogue.items, catalogue.keys, positive, competing)


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

    def __init__(self, data_root: str | Path | None) -> None:
        self.items: list[Item] = []
        self.keys: list[str] = []
        self._data_root = data_root
        self._by_key: dict[str, int] = {}
        self._by_item: dict[Item, int] = {}  # spares decoding one picture for each of its uses

    def index(self, item: Item) -> int:
        has_paths_only = not any(isinstance(p, Image.Image) for p in (*item.images, *item.video))
        if has_paths_only and item in self._by_item:
            return self._by_item[item]
        key = item.content_key(self._data_root)[:16]
        if key not in self._by_key:
            self._by_key[key] = len(self.items)
            self.items.append(item)
            self.keys.append(key)
        if has_paths_only:
            self._by_item[item] = self._by_key[key]
        return self._by_key[key]
