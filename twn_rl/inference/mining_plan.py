"""What is embedded for mining, and which candidates a query may take. Knows no vectors.

Distinct queries and candidates go to files of items as they are met, so that only their keys stay
in memory. What a query may not take is what `false_negatives` says, read without instructions: a
mined negative stays in the data, and another prompt makes no other content.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from twn_rl.data.images import ImageError
from twn_rl.data.record import Item, pool_of
from twn_rl.data.record_files import RecordSet
from twn_rl.inference.item_rows import ItemFile
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)


class DistinctItems:
    """A file of items being written, each content once.

    Attributes:
        path: The file; it appears when all is written.
        row_of: Content key -> row of the file.
        rows_of_content: Content without instruction -> rows.
    """

    def __init__(self, path: Path, file: TextIO, data_root: Path) -> None:
        self.path, self._file, self._root = path, file, data_root
        self.row_of: dict[str, int] = {}
        self.rows_of_content: dict[str, list[int]] = {}

    @classmethod
    @contextmanager
    def written_to(cls, path: Path, data_root: Path) -> Iterator["DistinctItems"]:
        """Write a file while the body runs; paths in it are relative to `data_root`."""
        with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
            yield cls(path, file, data_root)

    def __len__(self) -> int:
        return len(self.row_of)

    def add(self, item: Item) -> int:
        """Return the row of an item, a new one if no equal item was added before.

        Raises:
            ImageError: If a picture cannot be decoded.
        """
        key = item.content_key()
        if key not in self.row_of:
            row = self.row_of[key] = len(self.row_of)
            self.rows_of_content.setdefault(content_of(item), []).append(row)
            line = {"id": key, **item.to_dict()}
            for kind in ("images", "video"):
                line[kind] = [os.path.relpath(path, self._root) for path in line[kind]]
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
        return self.row_of[key]


class MiningPlan:
    """Candidates of every record, from files written to a folder.

    Attributes:
        queries: Distinct queries.
        candidates: Distinct candidates, and positives that are none.
        query: Per record the row of its query.
        positive: Per record the row of its positive.
        pools: Pool name -> sorted rows of its candidates.
        pool: Per record the pool it competes in.
    """

    def __init__(
        self,
        records: RecordSet,
        folder: Path,
        *,
        corpus: str | Path | None = None,
        show_progress_bar: bool = True,
    ) -> None:
        """Write `query.jsonl` and `document.jsonl` into `folder`.

        Args:
            records: Verified records.
            folder: Where to write.
            corpus: File of items that are the candidates; without one, all positives and negatives.
            show_progress_bar: Show records read.
        """
        root = records.data_root
        self.query: list[int] = []
        self.positive: list[int] = []
        self.pool: list[str] = []
        self._known: list[list[int]] = []
        self._reserved: list[set[str]] = []
        self._members: dict[str, dict[int, None]] = {}
        with (
            DistinctItems.written_to(folder / "query.jsonl", root) as self.queries,
            DistinctItems.written_to(folder / "document.jsonl", root) as self.candidates,
        ):
            has_pools = corpus is None or self._read_corpus(corpus, root)
            self._read_records(records, corpus is None, has_pools, show_progress_bar)
        self.pools = {name: np.array(sorted(rows)) for name, rows in self._members.items()}
        self._report_pools()

    def excluded(self, record: int) -> dict[str, Collection[int]]:
        """Return reason -> rows that are never negatives of a record."""
        same = {
            row
            for content in self._reserved[self.query[record]]
            for row in self.candidates.rows_of_content.get(content, ())
        }
        return {"equal to the query or a positive": same, "already a negative": self._known[record]}

    def items(self, rows: Collection[int]) -> dict[int, Item]:
        """Return the candidates of some rows, read from their file."""
        wanted = set(rows)
        found: dict[int, Item] = {}
        with self.candidates.path.open(encoding="utf-8") as file:
            for row, line in enumerate(file):
                if row in wanted:
                    fields: dict[str, Any] = json.loads(line)
                    del fields["id"]
                    found[row] = Item.from_dict(fields)
        return found

    def _read_corpus(self, path: str | Path, root: Path) -> bool:
        """Add the items of a corpus; return whether any of them names a pool."""
        bad, unnamed, named = 0, dict[int, None](), False
        for row in tqdm(ItemFile(path, side="document", data_root=root), desc="corpus", unit="row"):
            try:
                if row.item is None:
                    raise row.error or ValueError(f"row {row.id} has no item")
                number = self.candidates.add(row.item)
            except (ImageError, ValueError) as error:
                bad += 1
                if bad == 1:
                    logger.warning("first bad row of the corpus: %s", error)
                continue
            named |= row.pool is not None
            rows = unnamed if row.pool is None else self._members.setdefault(row.pool, {})
            rows[number] = None
        if bad:
            logger.warning("%s: left out %d bad rows", path, bad)
        if not len(self.candidates):
            raise ValueError(f"{path} has no usable row; expected candidates; correct the file")
        if unnamed:
            self._members.setdefault("", {}).update(unnamed)
        return named

    def _read_records(
        self, records: RecordSet, are_candidates: bool, has_pools: bool, show_progress_bar: bool
    ) -> None:
        for record in tqdm(records, desc="reading", unit="record", disable=not show_progress_bar):
            query, positive = self.queries.add(record.query), self.candidates.add(record.positive)
            self.query.append(query)
            self.positive.append(positive)
            self.pool.append(pool_of(record) if has_pools else "")
            if are_candidates:
                known = [self.candidates.add(item) for item in record.negatives]
                members = self._members.setdefault(self.pool[-1], {})
                members.update(dict.fromkeys([positive, *known]))
            else:
                keys = [item.content_key() for item in record.negatives]
                known = [self.candidates.row_of[k] for k in keys if k in self.candidates.row_of]
            self._known.append(known)
            if query == len(self._reserved):
                self._reserved.append({content_of(record.query)})
            self._reserved[query].add(content_of(record.positive))

    def _report_pools(self) -> None:
        sizes = {name: len(rows) for name, rows in self.pools.items()}
        logger.info("candidates: %d in %d pools", sum(sizes.values()), len(sizes))
        empty = sorted(set(self.pool) - set(sizes))
        if empty:
            logger.warning("pools without candidates: %s of %s", empty[:10], sorted(sizes)[:10])


def content_of(item: Item) -> str:
    """Return the content key without the instruction: a prompt makes no other content."""
    return replace(item, instruction=None, text=(item.text or "").strip() or None).content_key()


def columns_of(rows: NDArray[np.int64], wanted: Collection[int]) -> list[int]:
    """Return the places of the wanted rows in sorted `rows`, leaving out those not there."""
    values = np.fromiter(wanted, dtype=np.int64, count=len(wanted))
    places = np.searchsorted(rows, values)
    is_there = places < len(rows)
    is_there[is_there] = rows[places[is_there]] == values[is_there]
    return places[is_there].tolist()


def by_pool(pools: list[str]) -> Iterator[tuple[str, NDArray[np.int64]]]:
    """Yield each pool with the positions that name it."""
    members: dict[str, list[int]] = {}
    for position, name in enumerate(pools):
        members.setdefault(name, []).append(position)
    for name, positions in members.items():
        yield name, np.array(positions)
