"""Hard negatives for a file of records: embed, compare, write. The choosing is in `mining`.

Queries and candidates are written to a cache folder, each distinct one once, and embedded there by
`encode_files`; a killed run goes on, and another margin costs no embedding.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from twn_rl.data.record_files import load_records, write_records
from twn_rl.inference.encode_file import Embedder, encode_file
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile, Side
from twn_rl.inference.mining_plan import MiningPlan, by_pool, columns_of
from twn_rl.inference.negative_choice import MiningCounts, MiningSettings, select_negatives
from twn_rl.inference.stored_vectors import StoredVectors, open_vectors

logger = logging.getLogger(__name__)

_SCORE_BYTES = 1 << 28
_COLUMN_BLOCK = 16_384


@dataclass(frozen=True)
class MiningReport:
    """What mining found.

    Attributes:
        records: Records written.
        left_out: Bad records of the file, which were not written.
        counts: What became of the candidates.
        failed_records: Records whose query or positive has no vector; written as they were.
    """

    records: int
    left_out: int
    counts: MiningCounts
    failed_records: int

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        counts = self.counts
        yield (
            f"{counts.mined} negatives mined for {self.records} records: {counts.short_queries} "
            f"got fewer than asked for, {self.failed_records} could not be embedded, "
            f"{self.left_out} bad rows left out"
        )
        yield f"{counts.candidates} candidates: pairs of a record and an item of its pool"
        for name, dropped in counts.dropped.items():
            share = 100 * dropped / max(counts.candidates, 1)
            yield f"  {name}: {dropped} ({share:.1f} %)"
        for name in ("positive_scores", "negative_scores"):
            if scores := getattr(counts, name):
                low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
                yield f"{name}: median {middle:.3f}, from {low:.3f} (5 %) to {high:.3f} (95 %)"


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
    candidates = embed("document", replace(encoding, think="never", think_rate=None))
    counts = MiningCounts()
    chosen = _mine(plan, queries, candidates, settings, counts, show_progress_bar)
    items = plan.items({int(row) for rows in chosen.values() for row in rows})
    mined = (
        replace(record, negatives=(*record.negatives, *(items[int(r)] for r in chosen.get(i, ()))))
        for i, record in enumerate(records)
    )
    write_records(output, mined, data_root=records.data_root)
    left_out = sum(records.skipped.values())
    return MiningReport(len(records), left_out, counts, len(records) - len(chosen))


def _mine(
    plan: MiningPlan,
    queries: StoredVectors,
    candidates: StoredVectors,
    settings: MiningSettings,
    counts: MiningCounts,
    show_progress_bar: bool,
) -> dict[int, NDArray[np.int64]]:
    """Return record -> rows of its negatives; records without vectors are absent."""
    chosen: dict[int, NDArray[np.int64]] = {}
    query, positive = np.array(plan.query), np.array(plan.positive)
    has_vectors = queries.is_usable[query] & candidates.is_usable[positive]
    with tqdm(total=len(query), desc="mining", unit="record", disable=not show_progress_bar) as bar:
        for pool, records in by_pool(plan.pool):
            rows = plan.pools.get(pool, np.empty(0, dtype=np.int64))
            rows = rows[candidates.is_usable[rows]]
            usable = records[has_vectors[records]]
            size = max(1, _SCORE_BYTES // (4 * max(1, len(rows))))
            for block in np.split(usable, range(size, len(usable), size)):
                vectors = queries.vectors[query[block]]
                scores = _scores(vectors, candidates.vectors, rows)
                own = np.einsum("nd,nd->n", vectors, candidates.vectors[positive[block]])
                for record, row_scores, own_score in zip(block, scores, own, strict=True):
                    excluded = plan.excluded(int(record)).items()
                    columns = select_negatives(
                        *(row_scores, float(own_score)),
                        {reason: columns_of(rows, barred) for reason, barred in excluded},
                        settings,
                        counts,
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
