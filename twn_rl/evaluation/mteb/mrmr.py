"""MRMR (arXiv 2510.09510) from the official files on disk, as five tasks.

`DIR/<set>/<config>/test-*.parquet`, as in the repositories MRMRbenchmark/<set>, with the configs
corpus, query and qrels. Pictures stay in the files until they are embedded.

Queries and documents interleave texts and up to twelve pictures: columns "image 1", "image 2", ...,
named in the text as <image 1>. Our renderer puts pictures first, in this order, and the text keeps
their names. Rows without numbered pictures have "image".
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from twn_rl.data.formats.marks import strip_marks
from twn_rl.data.images import ImageError, image_of_bytes, open_image
from twn_rl.evaluation.mteb.tasks import HIT, NDCG, Entry, OwnRetrieval, SplitData, own_metadata

logger = logging.getLogger(__name__)

NAME = "mrmr"
NEGATION = "negation"
# Set -> official instruction of its queries.
INSTRUCTIONS = {
    "knowledge": "Retrieve relevant documents that help answer the question.",
    "theorem": "Retrieve relevant theorems that are involved in solving the problem.",
    NEGATION: "Given an image, retrieve descriptions that have contradictory information with "
    "the image.",
    "design": "Given a vehicle design, retrieve the design requirements that it violates.",
    "traffic": "Given a traffic case, retrieve the driving rule documents that it violates.",
}
_NUMBERED = re.compile(r"image (\d+)")


def mrmr_tasks(data_root: str | Path | None, names: Sequence[str] | None = None) -> list[Any]:
    """Return the sets of MRMR as mteb tasks, nDCG@10 each, hit@1 among four for Negation.

    Args:
        data_root: Folder with one folder a set.
        names: Task names (`MRMRKnowledge`, ...) to take; all five if None.

    Raises:
        FileNotFoundError: If a set or one of its configs is missing.
    """
    if data_root is None:
        raise FileNotFoundError(
            "data_root = None; expected the folder with MRMR's sets (DIR/knowledge/corpus/"
            "test-*.parquet, ...); pass --data_root DIR"
        )
    wanted = [name for name in INSTRUCTIONS if names is None or task_name(name) in names]
    missing = [
        f"{name}/{config}"
        for name in wanted
        for config in ("corpus", "query", "qrels")
        if not _shards(Path(data_root) / name, config)
    ]
    if missing:
        raise FileNotFoundError(
            f"{data_root} has no parquet files in {', '.join(missing)}; expected "
            "DIR/<set>/<config>/test-*.parquet, as in the repositories MRMRbenchmark/<set>; "
            "download them, or name other tasks with --tasks"
        )
    return [_task(name, Path(data_root) / name) for name in wanted]


def task_name(name: str) -> str:
    """Return the task of a set.

    >>> task_name("knowledge")
    'MRMRKnowledge'
    """
    return f"MRMR{name.capitalize()}"


def _task(name: str, folder: Path) -> OwnRetrieval:
    metadata = own_metadata(
        task_name(name),
        revision=_revision(folder),
        main_score=HIT if name == NEGATION else NDCG,
        description=f"MRMR, set {name}: reasoning-intensive retrieval of interleaved documents.",
        reference="https://arxiv.org/abs/2510.09510",
        prompt={"query": INSTRUCTIONS[name]},
    )
    reader = partial(read_set, folder, has_candidates=name == NEGATION)
    return OwnRetrieval(metadata, {"test": reader}, _ParquetPictures(folder))


def read_set(folder: Path, *, has_candidates: bool = False) -> SplitData:
    """Return queries, documents and relevance of one set.

    Args:
        folder: Folder of the set.
        has_candidates: Rank query `q` among the documents `q_1`, `q_2`, ... only (Negation).

    Raises:
        ValueError: For missing columns, equal ids, qrels of unknown ids, and queries whose
            candidates lack a relevant document; with file and row.
    """
    corpus, _ = _entries(folder, "corpus")
    queries, groups = _entries(folder, "query")
    relevant = _relevance(folder, {e.id for e in queries}, {e.id for e in corpus})
    unjudged = [(row, entry.id) for row, entry in enumerate(queries) if entry.id not in relevant]
    if unjudged:
        logger.warning(
            "%s: %d of %d queries have no relevant document and are left out, as in the official "
            "scoring (first: row %d, id %r)",
            *(folder / "query", len(unjudged), len(queries), *unjudged[0]),
        )
    judged = [entry for entry in queries if entry.id in relevant]
    candidates = None
    if has_candidates:
        candidates = {entry.id: [] for entry in judged}
        for document in corpus:
            candidates.get(document.id.rpartition("_")[0], []).append(document.id)
        for query, names in candidates.items():
            if not set(relevant[query]) <= set(names):
                raise ValueError(
                    f"{folder / 'corpus'}: query {query!r} has candidates {names} without its "
                    f"relevant {sorted(set(relevant[query]) - set(names))}; expected documents "
                    f"named {query}_1, {query}_2, ...; restore the file"
                )
    return SplitData(judged, corpus, relevant, candidates, groups)


def _entries(folder: Path, config: str) -> tuple[list[Entry], dict[str, str]]:
    """Return the rows of a config, and id -> category where there is such a column."""
    entries: list[Entry] = []
    groups: dict[str, str] = {}
    seen: set[str] = set()
    for index, path in enumerate(_shards(folder, config)):
        for row, cells in enumerate(_text_rows(path)):
            name = str(cells["id"])
            if cells["id"] is None or name in seen:
                raise ValueError(
                    f"{path} row {row}: id = {cells['id']!r}; expected a name that no earlier row "
                    "has; restore the file"
                )
            seen.add(name)
            numbered = [c for c in cells["pictures"] if c != "image"]
            numbered.sort(key=lambda column: int(column.removeprefix("image ")))
            columns = numbered or cells["pictures"]
            pictures = tuple(f"{config}:{index}:{row}:{column}" for column in columns)
            text = cells["text"] or ""
            if pictures:
                stripped = strip_marks(text, has_pictures=True, notes=Counter(), field="text")
                text = stripped or ""
            entries.append(Entry(name, text, pictures))
            if cells.get("category"):
                groups[name] = str(cells["category"])
    if not entries:
        raise ValueError(f"{folder / config} has no rows; expected some; download the files again")
    return entries, groups


def _text_rows(path: Path) -> list[dict[str, Any]]:
    """Return id, text and category of a file's rows and which pictures they have, unread."""
    file = _open(path)
    names = file.schema_arrow.names
    missing = {"id", "text"} - set(names)
    if missing:
        raise ValueError(
            f"{path} has columns {names}; expected {sorted(missing)} too; restore the file"
        )
    texts = [name for name in ("id", "text", "category") if name in names]
    pictures = [name for name in names if name == "image" or _NUMBERED.fullmatch(name)]
    # Of a picture's two parts the path is read: small, and null where the picture is.
    with _naming(path):
        rows = file.read(columns=[*texts, *(f"{name}.path" for name in pictures)]).to_pylist()
    for row in rows:
        row["pictures"] = [name for name in pictures if row[name] is not None]
    return rows


def _relevance(folder: Path, queries: set[str], corpus: set[str]) -> dict[str, dict[str, int]]:
    """Return query -> document -> score above 0; sets spell the columns with - or _."""
    relevant: dict[str, dict[str, int]] = {}
    for path in _shards(folder, "qrels"):
        with _naming(path):
            table = _open(path).read()
        names = [name.replace("_", "-") for name in table.column_names]
        if not {"query-id", "corpus-id", "score"} <= set(names):
            raise ValueError(
                f"{path} has columns {table.column_names}; expected query_id, corpus_id and score; "
                "restore the file"
            )
        for row, cells in enumerate(table.rename_columns(names).to_pylist()):
            query, document = str(cells["query-id"]), str(cells["corpus-id"])
            if query not in queries or document not in corpus:
                is_query = query not in queries
                name = f"query-id = {query!r}" if is_query else f"corpus-id = {document!r}"
                raise ValueError(
                    f"{path} row {row}: {name} is in no row of {folder}; expected a known id; "
                    "download all files of one revision"
                )
            if int(cells["score"]) > 0:
                relevant.setdefault(query, {})[document] = int(cells["score"])
    if not relevant:
        raise ValueError(
            f"{folder / 'qrels'} judges nothing relevant; expected scores above 0; download the "
            "files again"
        )
    return relevant


@dataclass
class _ParquetPictures:
    """Opens the pictures of a set by reference; rows near each other are read together."""

    folder: Path

    def __call__(self, reference: str) -> Image.Image:
        config, shard, row, column = reference.split(":")
        path = _shards(self.folder, config)[int(shard)]
        cell = _cell(path, column, int(row))
        data = (cell or {}).get("bytes")
        try:
            return open_image(image_of_bytes(data or b""))
        except ImageError as error:
            raise ImageError(
                f"{path} row {row}: {column} cannot be decoded ({error}); expected the bytes of a "
                "complete picture; download the file again",
                reason="unreadable_image",
            ) from error


def _cell(path: Path, column: str, row: int) -> dict[str, Any] | None:
    file = _open(path)
    for group in range(file.num_row_groups):
        size = file.metadata.row_group(group).num_rows
        if row < size:
            with _naming(path):
                return _column(file, column, group)[row].as_py()
        row -= size
    raise IndexError(f"{path} has no row {row}")


@lru_cache(maxsize=16)  # of one row group each, for the few columns that neighbours have
def _column(file: pq.ParquetFile, column: str, group: int) -> Any:
    return file.read_row_group(group, columns=[column]).column(column)


def _open(path: Path) -> pq.ParquetFile:
    facts = path.stat()  # changes when a file is replaced, so that nothing of the old one is used
    with _naming(path):
        return _opened(path, facts.st_mtime_ns, facts.st_size)


@lru_cache(maxsize=64)
def _opened(path: Path, modified_ns: int, size: int) -> pq.ParquetFile:
    return pq.ParquetFile(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, pa.ArrowInvalid) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); expected a whole parquet file; download it again"
        ) from error


def _shards(folder: Path, config: str) -> list[Path]:
    return sorted((folder / config).glob("test-*.parquet"))


def _revision(folder: Path) -> str:
    """Return a hash of the files' sizes and footers: large files are not read for it."""
    digest = sha256()
    for config in ("corpus", "query", "qrels"):
        for path in _shards(folder, config):
            size = path.stat().st_size
            with path.open("rb") as file:
                file.seek(max(0, size - (1 << 16)))
                digest.update(f"{config}/{path.name} {size}".encode() + file.read())
    return digest.hexdigest()[:16]
