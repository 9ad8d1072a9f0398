"""MMEB-V2's 24 visual document tasks: `queries`, `corpus` and `qrels` as in BEIR, pages as bytes.

Pages stay in their files until they are embedded; a page without bytes in the corpus is looked for
where the official code unpacks it.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from twn_rl.data.formats.input_files import DataFile, Row, read_rows, required
from twn_rl.data.images import image_of_bytes, resolve_inside
from twn_rl.data.record import Item, RecordError, bad_type
from twn_rl.evaluation.mmeb_v2.task_data import TaskData, TaskQuery
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder, located
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

_CORPUS_ID = ("corpus-id", "corpus_id", "_id", "id")
_QUERY_ID = ("query-id", "query_id", "_id", "id")
_LONG_NAME = 50
_ID_ROWS = 4096


@dataclass
class PageCorpus:
    """The pages of a corpus, read one after another from its files.

    Attributes:
        files: Where they are.
        media_root: Where pictures lie that are not in the files.
        instruction: Of every page.
        has_long_names: Whether file names of pictures are cut, as VisRAG's are.
        keys: The id of each page.
    """

    files: list[DataFile]
    media_root: Path
    instruction: str | None
    has_long_names: bool
    keys: list[str] = field(init=False)
    _places: dict[str, tuple[Path, int]] = field(default_factory=dict)
    _rows: Iterator[tuple[int, Row]] | None = None
    _next: int = 0

    def __post_init__(self) -> None:
        """Read all ids."""
        for row in _id_rows(self.files):
            with located(row) as data:
                key = _id(data, _CORPUS_ID)
                if key in self._places:
                    raise RecordError(
                        f"corpus-id = {key!r} comes again; expected each page once; remove one",
                        reason="repeated_id",
                    )
                self._places[key] = row.file, row.number
        self.keys = list(self._places)

    def read(self, start: int, stop: int) -> Sequence[Item | RecordError]:
        """Return the items of some pages; going forward reads no file twice."""
        if self._rows is None or start < self._next:
            self._rows = enumerate(read_rows(self.files))
        items: list[Item | RecordError] = []
        for number, row in self._rows:
            if number >= start:
                items.append(self._item(row))
            if number + 1 >= stop:
                break
        self._next = stop
        return items

    def name(self, number: int) -> str:
        """Return the id of a page, its file and its row."""
        path, row = self._places[self.keys[number]]
        return f"{self.keys[number]} ({path.parent.name}/{path.name}, row {row})"

    def _item(self, row: Row) -> Item | RecordError:
        try:
            with located(row) as data:
                return Item(self.instruction, images=(self._picture(data),))
        except RecordError as error:
            return error

    def _picture(self, data: Mapping[str, Any]) -> Image.Image | str:
        cell = data.get("image")
        content = cell.get("bytes") if isinstance(cell, Mapping) else cell
        if isinstance(content, bytes) and content:
            return image_of_bytes(content)
        key = _id(data, _CORPUS_ID)
        name = f"{key}.png"
        if self.has_long_names:
            suffix = Path(key).suffix
            digest = hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()[:8]
            name = f"{key.removesuffix(suffix)[:_LONG_NAME]}_{digest}{suffix}"
        return str(resolve_inside(name, self.media_root))


def load_documents(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task that finds pages for a question; gains come from the judgements.

    Raises:
        RecordError: If a query has no judgement above 0, or a judged page is not in the corpus.
    """
    corpus = PageCorpus(
        folder.files(task, "corpus"),
        folder.media_root(task),
        task.target_instruction,
        has_long_names=task.parser == "visrag",
    )
    places = {key: number for number, key in enumerate(corpus.keys)}
    judgements = _judgements(task, folder, places)
    queries = []
    for row in folder.rows(task, "queries"):
        with located(row) as data:
            name = _id(data, _QUERY_ID)
            if not judgements.get(name):
                raise RecordError(
                    f"query {name!r} has no judgement above 0 in qrels; expected at least one; "
                    "add it or leave the query out",
                    reason="missing_qrels",
                )
            item = Item(task.query_instruction, str(required(data, "query")))
            queries.append(TaskQuery(name, item, judgements[name]))
    return TaskData(queries, corpus)


def _judgements(
    task: MmebTask, folder: BenchmarkFolder, places: Mapping[str, int]
) -> dict[str, dict[int, float]]:
    """Return page number -> score of each query, scores above 0 only, the highest of repeated."""
    judgements: dict[str, dict[int, float]] = {}
    for row in folder.rows(task, "qrels"):
        with located(row) as data:
            query, page = _id(data, _QUERY_ID[:2]), _id(data, _CORPUS_ID[:2])
            score = required(data, "score")
            if isinstance(score, bool) or not isinstance(score, int | float) or score != score:
                raise bad_type(score, "a number", "score")
            if score <= 0:
                continue
            if page not in places:
                raise RecordError(
                    f"corpus-id = {page!r} of query {query!r} is not among the {len(places)} pages "
                    "of the corpus; expected every relevant page there; complete the corpus",
                    reason="missing_positive",
                )
            scores = judgements.setdefault(query, {})
            scores[places[page]] = max(float(score), scores.get(places[page], 0.0))
    return judgements


def _id_rows(files: Sequence[DataFile]) -> Iterator[Row]:
    """Yield rows with their ids; of Parquet files the pictures are not read."""
    for file in files:
        if file.path.suffix == ".parquet":
            from twn_rl.data.parquet import read_table

            rows = read_table(file.path, batch_rows=_ID_ROWS, columns=_CORPUS_ID)
            for number, data in enumerate(rows, start=1):
                yield Row(file.path, number, file.subset, number, data)
        else:
            yield from read_rows([file])


def _id(data: Mapping[str, Any], names: Sequence[str]) -> str:
    for name in names:
        if data.get(name) not in (None, ""):
            return str(data[name])
    raise RecordError(
        f"{names[0]} is missing among {sorted(map(str, data))}; expected an id; add it",
        reason="missing_field",
        field=names[0],
    )
