"""Hard negatives for a file of records: embed, compare, write; `negative_choice` says which.

Distinct queries and candidates are written to a cache folder as they are met, so that only their
keys stay in memory, and embedded there by `encode_file`: a killed run goes on, and another margin
costs no embedding. What a query may not take is what `metrics.negatives` says, read without
instructions: a mined negative stays in the data, and another prompt makes no other content.
"""

import json
import logging
import os
from collections.abc import Collection, Iterator, Set
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from twn_rl.data.images import ImageError
from twn_rl.data.record import Item, pool_of
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile, Side
from twn_rl.inference.negative_choice import MiningReport, MiningSettings, select_negatives
from twn_rl.inference.shard_maker import Embedder
from twn_rl.inference.vector_files import StoredVectors, open_vectors
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)

_SCORE_BYTES = 1 << 28
_COLUMN_BLOCK = 16_384


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

    def add(self, item: Item) -> int:
        """Return the row of an item, a new one if no equal item was added before.

        Raises:
            ImageError: If a picture cannot be decoded.
        """
        key = item.content_key()
        if key not in self.row_of:
            row = self.row_of[key] = len(self.row_of)
            self.rows_of_content.setdefault(content_of(item), []).append(row)
            inside = item.map_sources(lambda path: os.path.relpath(str(path), self._root))
            line = {"id": key, **inside.to_dict()}
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
        records_of: Pool name -> the records that compete in it.
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
        self.records_of: dict[str, list[int]] = {}
        self._known: list[list[int]] = []
        self._reserved: dict[int, set[str]] = {}
        self._members: dict[str, dict[int, None]] = {}
        with (
            DistinctItems.written_to(folder / "query.jsonl", root) as self.queries,
            DistinctItems.written_to(folder / "document.jsonl", root) as self.candidates,
        ):
            has_pools = corpus is None or self._read_corpus(corpus, root)
            self._read_records(records, corpus is None, has_pools, show_progress_bar)
        self.pools = {name: np.array(sorted(rows)) for name, rows in self._members.items()}
        sizes = {name: len(rows) for name, rows in self.pools.items()}
        logger.info("candidates: %d in %d pools", sum(sizes.values()), len(sizes))
        if empty := sorted(set(self.records_of) - set(sizes)):
            logger.warning("pools without candidates: %s of %s", empty[:10], sorted(sizes)[:10])

    def excluded(self, record: int) -> dict[str, Collection[int]]:
        """Return reason -> rows that are never negatives of a record."""
        same = {
            row
            for content in self._reserved[self.query[record]]
            for row in self.candidates.rows_of_content.get(content, ())
        }
        return {"equal to the query or a positive": same, "already a negative": self._known[record]}

    def items(self, rows: Set[int]) -> dict[int, Item]:
        """Return the candidates of some rows, read from their file."""
        with self.candidates.path.open(encoding="utf-8") as file:
            found = {row: json.loads(line) for row, line in enumerate(file) if row in rows}
        for fields in found.values():
            del fields["id"]
        return {row: Item.from_dict(fields) for row, fields in found.items()}

    def _read_corpus(self, path: str | Path, root: Path) -> bool:
        """Add the items of a corpus; return whether any of them names a pool."""
        bad, named = 0, False
        for row in tqdm(
            ItemFile(path, side="document", data_root=root), desc="corpus", unit="row", disable=None
        ):
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
            self._members.setdefault(row.pool or "", {})[number] = None
        if bad:
            logger.warning("%s: left out %d bad rows", path, bad)
        if not self.candidates.row_of:
            raise ValueError(f"{path} has no usable row; expected candidates; correct the file")
        return named

    def _read_records(
        self, records: RecordSet, are_candidates: bool, has_pools: bool, show_progress_bar: bool
    ) -> None:
        for record in tqdm(
            records, desc="reading", unit="record", disable=not show_progress_bar or None
        ):
            query, positive = self.queries.add(record.query), self.candidates.add(record.positive)
            pool = pool_of(record) if has_pools else ""
            self.records_of.setdefault(pool, []).append(len(self.query))
            self.query.append(query)
            self.positive.append(positive)
            if are_candidates:
                known = [self.candidates.add(item) for item in record.negatives]
                self._members.setdefault(pool, {}).update(dict.fromkeys([positive, *known]))
            else:
                keys = [item.content_key() for item in record.negatives]
                known = [self.candidates.row_of[k] for k in keys if k in self.candidates.row_of]
            self._known.append(known)
            own, right = content_of(record.query), content_of(record.positive)
            self._reserved.setdefault(query, {own}).add(right)


def content_of(item: Item) -> str:
    """Return the content key without the instruction: a prompt makes no other content."""
    return replace(item, instruction=None, text=(item.text or "").strip() or None).content_key()


def mine_file(
    embedder: Embedder,
    source: str | Path,
    output: str | Path,
    settings: MiningSettings | None = None,
    *,
    corpus: str | Path | None = None,
    data_root: str | Path | None = None,
    cache: str | Path | None = None,
    encoding: EncodeSettings | None = None,
    limit: int | None = None,
    overwrite: bool = False,
    show_progress_bar: bool = True,
) -> MiningReport:
    """Write the records of `source` with mined negatives added to those they have.

    Candidates of a query are the distinct items of its pool. Never among its negatives: the query,
    the positives of all records with the same query, whatever equals one of these but for the
    instruction, and negatives it has already.

    Args:
        embedder: A `ThinkingEmbedder`.
        source: File of records; bad ones are left out and counted.
        output: File of records to write, image paths relative to the data root.
        settings: Which candidates become negatives.
        corpus: File of items to mine from; all positives and negatives of the records if None. If
            none of its rows names a `pool`, it is the pool of every record.
        data_root: Folder of all images; the folder of `source` if None.
        cache: Folder of the vectors; `OUTPUT.cache` if None.
        encoding: How queries are embedded; documents never think.
        limit: Read this many records only.
        overwrite: Embed anew whatever is in the cache.
        show_progress_bar: Show rows and records done.

    Raises:
        ValueError: If no record is usable, or the cache was made otherwise.
    """
    settings, encoding = settings or MiningSettings(), encoding or EncodeSettings()
    output = Path(output)
    folder = output.with_suffix(".cache") if cache is None else Path(cache)
    folder.mkdir(parents=True, exist_ok=True)
    records = load_records(source, data_root=data_root, on_bad_record="skip", limit=limit)
    plan = MiningPlan(records, folder, corpus=corpus, show_progress_bar=show_progress_bar)

    def embed(side: Side, how: EncodeSettings) -> StoredVectors:
        rows = ItemFile(folder / f"{side}.jsonl", side=side, data_root=records.data_root)
        path = folder / f"{side}.npy"
        bar = show_progress_bar
        made = encode_file(embedder, rows, path, how, overwrite=overwrite, show_progress_bar=bar)
        logger.info("vectors of side %s: %s", side, made)
        return open_vectors(path)

    queries = embed("query", encoding)
    candidates = embed(
        "document", replace(encoding, think="never", think_rate=None, keep="thought")
    )
    report = MiningReport(len(records), left_out=sum(records.skipped.values()))
    chosen = _mine(plan, queries, candidates, settings, report, show_progress_bar)
    items = plan.items({int(row) for rows in chosen.values() for row in rows})
    mined = (
        replace(record, negatives=(*record.negatives, *(items[int(r)] for r in chosen.get(i, ()))))
        for i, record in enumerate(records)
    )
    write_records(output, mined, data_root=records.data_root)
    report.failed_records = len(records) - len(chosen)
    return report


def _mine(
    plan: MiningPlan,
    queries: StoredVectors,
    candidates: StoredVectors,
    settings: MiningSettings,
    report: MiningReport,
    show_progress_bar: bool,
) -> dict[int, NDArray[np.int64]]:
    """Return record -> rows of its negatives; records without vectors are absent."""
    chosen: dict[int, NDArray[np.int64]] = {}
    query, positive = np.array(plan.query), np.array(plan.positive)
    has_vectors = queries.is_usable[query] & candidates.is_usable[positive]
    with tqdm(
        total=len(query), desc="mining", unit="record", disable=not show_progress_bar or None
    ) as bar:
        for pool, members in plan.records_of.items():
            records = np.array(members)
            rows = plan.pools.get(pool, np.empty(0, dtype=np.int64))
            rows = rows[candidates.is_usable[rows]]
            usable = records[has_vectors[records]]
            size = max(1, _SCORE_BYTES // (4 * max(1, len(rows))))
            for block in np.split(usable, range(size, len(usable), size)):
                vectors = queries.vectors[query[block]]
                scores = _scores(vectors, candidates.vectors, rows)
                own = np.einsum("nd,nd->n", vectors, candidates.vectors[positive[block]])
                for record, row_scores, own_score in zip(block, scores, own, strict=True):
                    barred = plan.excluded(int(record)).items()
                    columns = select_negatives(
                        row_scores,
                        float(own_score),
                        {reason: _columns(rows, barred_rows) for reason, barred_rows in barred},
                        settings,
                        report,
                        stream=int(record),
                    )
                    chosen[int(record)] = rows[columns]
            bar.update(len(records))
    return chosen


def _scores(
    queries: NDArray[np.float32], vectors: NDArray[np.float32], rows: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Return (Q, len(rows)) similarities, reading the memory map block by block."""
    scores = np.empty((len(queries), len(rows)), dtype=np.float32)
    for start in range(0, len(rows), _COLUMN_BLOCK):
        part = slice(start, start + _COLUMN_BLOCK)
        np.matmul(queries, vectors[rows[part]].T, out=scores[:, part])
    return scores


def _columns(rows: NDArray[np.int64], wanted: Collection[int]) -> list[int]:
    """Return the places of the wanted rows in sorted `rows`, leaving out those not there."""
    values = np.fromiter(wanted, dtype=np.int64, count=len(wanted))
    places = np.searchsorted(rows, values)
    is_there = places < len(rows)
    is_there[is_there] = rows[places[is_there]] == values[is_there]
    return places[is_there].tolist()
