"""Nearest vectors of one file to those of another: FAISS or an exact product.

Scores are inner products, cosines for the unit vectors that `encode_files` writes. Both ways read
the index block by block from its memory map, so neither needs it in memory.
"""

import importlib
import logging
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from tqdm.auto import tqdm

from twn_rl.inference.vector_files import StoredVectors
from twn_rl.runtime.whole_files import write_json_lines

logger = logging.getLogger(__name__)

Backend = Literal["auto", "faiss", "exact"]
Hits = tuple[NDArray[np.float32], NDArray[np.int64]]
# (Q, D) queries, (M, D) block, k <= M -> scores and columns (Q, k), best first.
BlockSearch = Callable[[NDArray[np.float32], NDArray[np.float32], int], Hits]

QUERY_BLOCK_ROWS = 512
INDEX_BLOCK_ROWS = 16_384
SHOWN_LINES = 3


def top_k(scores: NDArray[Any], k: int) -> tuple[NDArray[Any], NDArray[np.int64]]:
    """Return the k largest scores of each row, best first, and their columns (N, k).

    Among equal scores the lower column wins, also for the last places.

    >>> top_k(np.array([[0.5, 0.9, 0.5, 0.5]]), 3)[1].tolist()
    [[1, 0, 2]]

    Args:
        scores: (N, M) without NaN, M >= k.
        k: How many.
    """
    count = scores.shape[1]
    if k < count:
        # The k-th largest value; of its equals only the first ones that still fit are kept.
        least = np.partition(scores, count - k, axis=1)[:, count - k, None]
        is_above, is_equal = scores > least, scores == least
        left = k - is_above.sum(1, keepdims=True)
        kept = is_above | (is_equal & (is_equal.cumsum(1) <= left))
        columns = np.nonzero(kept)[1].reshape(len(scores), k)
    else:
        columns = np.broadcast_to(np.arange(count), scores.shape)
    values = np.take_along_axis(scores, columns, axis=1)
    order = np.argsort(-values, axis=1, kind="stable")
    return np.take_along_axis(values, order, 1), np.take_along_axis(columns, order, 1)


def exact_block(queries: NDArray[np.float32], block: NDArray[np.float32], k: int) -> Hits:
    """Return the k best of a block for each query by a matrix product.

    In float64, rounded to float32: equal vectors then get equal scores wherever they stand, which
    a float32 product does not promise.
    """
    scores = (queries.astype(np.float64) @ block.astype(np.float64).T).astype(np.float32)
    return top_k(scores, k)


def faiss_block(faiss: Any) -> BlockSearch:
    """Return the block search of FAISS, whose order among equals is made ours within its k."""
    # A folder of that name on the path is imported as an empty package: say so now.
    knn, metric = faiss.knn, faiss.METRIC_INNER_PRODUCT

    def search(queries: NDArray[np.float32], block: NDArray[np.float32], k: int) -> Hits:
        scores, columns = knn(queries, block, k, metric=metric)
        order = np.lexsort((columns, -scores))
        return np.take_along_axis(scores, order, 1), np.take_along_axis(columns, order, 1)

    return search


def choose_backend(backend: Backend) -> tuple[str, BlockSearch]:
    """Return the name and the block search of a backend; "auto" is FAISS where it is installed.

    Raises:
        ValueError: If FAISS is asked for and cannot be used.
    """
    if backend not in ("auto", "faiss", "exact"):
        raise ValueError(f"backend = {backend!r}; expected 'auto', 'faiss' or 'exact'; change it")
    if backend == "exact":
        return "exact", exact_block
    try:
        return "faiss", faiss_block(importlib.import_module("faiss"))
    except (ImportError, AttributeError) as error:
        if backend == "faiss":
            raise ValueError(
                f"backend = 'faiss' cannot be used ({error}); expected FAISS installed; install "
                "faiss-cpu or use the exact backend"
            ) from error
        logger.info("FAISS cannot be used (%s): the search is an exact product", error)
        return "exact", exact_block


def search(
    queries: NDArray[np.float32],
    index: NDArray[np.float32],
    *,
    k: int,
    is_usable: NDArray[np.bool_] | None = None,
    block_search: BlockSearch = exact_block,
    query_block_rows: int = QUERY_BLOCK_ROWS,
    index_block_rows: int = INDEX_BLOCK_ROWS,
    show_progress_bar: bool = False,
) -> Hits:
    """Return the best scores (Q, k) and their rows of `index` (Q, k), best first.

    Args:
        queries: (Q, D), finite.
        index: (M, D), a memory map or an array.
        k: Hits a query; fewer if fewer rows are usable.
        is_usable: (M,) bool; other rows are never hits. None uses all.
        block_search: How one block is searched.
        query_block_rows: Queries at a time.
        index_block_rows: Rows of the index at a time.
        show_progress_bar: Show blocks done.

    Raises:
        ValueError: For differing widths, k < 1, vectors that are not finite, or no usable row.
    """
    usable = np.ones(len(index), dtype=bool) if is_usable is None else is_usable
    _check(queries, index, k, usable)
    k = min(k, int(usable.sum()))
    scores = np.full((len(queries), k), -np.inf, dtype=np.float32)
    rows = np.full((len(queries), k), -1, dtype=np.int64)
    starts = range(0, len(index), index_block_rows)
    for first in tqdm(
        starts, desc="searching", unit="block", disable=not show_progress_bar or None
    ):
        numbers = first + np.flatnonzero(usable[first : first + index_block_rows])
        if not len(numbers):
            continue
        block = np.ascontiguousarray(index[numbers], dtype=np.float32)
        _check_finite(block, numbers, "index")
        for start in range(0, len(queries), query_block_rows):
            part = slice(start, start + query_block_rows)
            wanted = np.ascontiguousarray(queries[part], dtype=np.float32)
            found, columns = block_search(wanted, block, min(k, len(numbers)))
            # What stands before has lower rows, so that `top_k` settles ties across blocks too.
            merged = np.concatenate([scores[part], found], axis=1)
            places = np.concatenate([rows[part], numbers[columns]], axis=1)
            scores[part], best = top_k(merged, k)
            rows[part] = np.take_along_axis(places, best, axis=1)
    return scores, rows


def search_files(
    queries: StoredVectors,
    index: StoredVectors,
    output: str | Path,
    *,
    top_k: int = 10,
    backend: Backend = "auto",
    show_progress_bar: bool = True,
) -> list[dict[str, Any]]:
    """Write the hits of every query as JSON lines; return the first few lines.

    A line is `id` and `row` of the query and `hits`, each `id`, `row` and `score`; a query without
    a vector has no hits and `"error": true`.

    Args:
        queries: What to search for.
        index: Where; failed and unwritten rows are never hits.
        output: The .jsonl file, written whole or not at all.
        top_k: Hits a query.
        backend: "faiss", "exact", or "auto".
        show_progress_bar: Show blocks done.

    Raises:
        ValueError: As `search`; also if the two files were made by different embedding models.
    """
    if None not in (queries.space, index.space) and queries.space != index.space:
        raise ValueError(
            f"{queries.path} was embedded by {str(queries.space)[:12]}, {index.path} by "
            f"{str(index.space)[:12]}; expected one model: their vectors cannot be compared; "
            "encode one of them again"
        )
    for name, stored in (("queries", queries), ("index", index)):
        if stored.failed_rows or stored.unwritten_rows:
            logger.warning(
                "%s %s: left out %d failed rows and %d not encoded yet",
                *(name, stored.path, stored.failed_rows, stored.unwritten_rows),
            )
    chosen, block_search = choose_backend(backend)
    logger.info(
        "backend %s: %d queries, %d of %d rows of the index",
        *(chosen, queries.is_usable.sum(), index.is_usable.sum(), len(index.vectors)),
    )
    wanted = np.flatnonzero(queries.is_usable)
    hits = search(
        queries.vectors[wanted],
        index.vectors,
        k=top_k,
        is_usable=index.is_usable,
        block_search=block_search,
        show_progress_bar=show_progress_bar,
    )
    write_json_lines(Path(output), _hit_lines(queries, index, wanted, hits))
    return list(islice(_hit_lines(queries, index, wanted, hits), SHOWN_LINES))


def show_hits(lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the best hits as text, one query a line, for people."""
    for line in lines:
        found = [f"{hit['id']} ({hit['score']:.3f})" for hit in line["hits"][:3]]
        yield f"{line['id']}: {', '.join(found) or 'no vector'}"


def _hit_lines(
    queries: StoredVectors, index: StoredVectors, wanted: NDArray[np.int64], hits: Hits
) -> Iterator[dict[str, Any]]:
    place = {int(row): i for i, row in enumerate(wanted)}
    for row in range(len(queries.vectors) - queries.unwritten_rows):
        line: dict[str, Any] = {"id": queries.ids[row], "row": row, "hits": []}
        if row in place:
            scores, rows = (part[place[row]].tolist() for part in hits)
            line["hits"] = [
                {"id": index.ids[hit], "row": hit, "score": round(score, 6) or 0.0}
                for hit, score in zip(rows, scores, strict=True)
            ]
        else:
            line["error"] = True
        yield line


def _check(
    queries: NDArray[np.float32], index: NDArray[np.float32], k: int, usable: NDArray[np.bool_]
) -> None:
    if queries.ndim != 2 or index.ndim != 2 or queries.shape[1] != index.shape[1]:
        raise ValueError(
            f"queries = {queries.shape}, index = {index.shape}; expected (Q, D) and (M, D) of one "
            "width; encode both with the same model"
        )
    if k < 1:
        raise ValueError(f"top_k = {k}; expected >= 1; change it")
    for name, count in (("query", len(queries)), ("row of the index", int(usable.sum()))):
        if not count:
            raise ValueError(f"no usable {name}; expected at least one; check the details files")
    _check_finite(queries, np.arange(len(queries)), "queries")


def _check_finite(vectors: NDArray[Any], numbers: NDArray[np.int64], name: str) -> None:
    is_bad = ~np.isfinite(vectors).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{name}: rows {numbers[is_bad][:5].tolist()} ({int(is_bad.sum())} here) hold NaN or "
            "infinity; expected finite vectors; encode them again"
        )
