"""BEIR and ViDoRe folders: `--from beir`.

`corpus.jsonl` (`_id, title, text`), `queries.jsonl` (`_id, text`) and `qrels/SPLIT.tsv`
(`query-id, corpus-id, score`), or the hub's folders `corpus`, `queries` and `qrels` of Parquet
files with the ids of ViDoRe (`corpus-id, image`; `query-id, query`) or of mteb (`id`). Title and
text are joined by a blank, as BEIR's own models read them. Each positive judgement becomes a
record; documents judged below `min_score` (1 unless given) are its hard negatives. The judgements
are held in memory, the corpus is not.
"""

import csv
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Fields, Outcome
from twn_rl.data.formats.corpus import Corpus, open_corpus
from twn_rl.data.formats.input_files import DataFile, Row, find_files, first_id, read_rows
from twn_rl.data.record import Item, Record, RecordError, bad_file
from twn_rl.runtime.reading import regular_file

_QUERY_IDS = ("_id", "query-id", "query_id", "id")
_CORPUS_IDS = ("_id", "corpus-id", "corpus_id", "id", "docid")

# Score of each judged document, by query.
Judgements = dict[str, dict[str, float]]


def convert_beir(conversion: Conversion) -> Iterator[Outcome]:
    """Yield a record for each positive judgement of a split, in the order of the queries.

    Raises:
        RecordError: If a part is missing or the judgements cannot be read.
    """
    folder, split = conversion.input, conversion.split
    if not folder.is_dir():
        raise bad_file(
            folder, "input is no folder; expected one with corpus, queries and qrels; name it"
        )
    qrels = _read_qrels(folder, split)
    queries = read_rows(_part(folder, "queries", split))
    documents = read_rows(_part(conversion.corpus or folder, "corpus", split))
    return _convert(conversion, qrels, queries, documents)


def _convert(
    conversion: Conversion, qrels: Judgements, queries: Iterable[Row], documents: Iterable[Row]
) -> Iterator[Outcome]:
    seen: set[str] = set()
    with open_corpus(
        documents,
        id_names=_CORPUS_IDS,
        item_of=partial(_document, conversion),
        needed={document for judged in qrels.values() for document in judged},
        tally=conversion.tally,
    ) as corpus:
        yield from conversion.records(queries, partial(_records, qrels, corpus, seen))
    for query in sorted(qrels.keys() - seen):
        error = RecordError(
            f"query = {query!r} is judged but has no text; expected every judged query among the "
            "queries; add it or remove its judgements",
            reason="missing_query",
        )
        yield Outcome(conversion.input, 0, error)


def _document(conversion: Conversion, data: Fields) -> Item:
    item = conversion.item(data, text=("title", "text"), image="image")
    conversion.metadata(data, used=("metadata",), prefix="corpus.")
    return item


def _records(
    qrels: Judgements,
    corpus: Corpus,
    seen: set[str],
    row: Row,
    data: Fields,
    conversion: Conversion,
) -> Iterator[Record]:
    query_id = first_id(data, _QUERY_IDS)
    judged = qrels.get(query_id)
    if judged is None:  # a query of another split
        return
    seen.add(query_id)
    least = 1.0 if conversion.min_score is None else conversion.min_score
    positives = [document for document, score in judged.items() if score >= least]
    if not positives:
        conversion.tally.drop("query_without_positive", f"query {query_id!r}")
        return
    query = conversion.item(data, text="query" if "query" in data else "text", image="image")
    metadata = conversion.metadata(
        data, used=_QUERY_IDS, kept=("metadata", "language"), prefix="queries."
    )
    negatives = conversion.first_negatives(
        [corpus[document] for document, score in judged.items() if score < least]
    )
    for document in positives:
        yield Record(
            id=f"{query_id} -> {document}",
            source=conversion.input.resolve().name,
            query=query,
            positive=corpus[document],
            negatives=negatives,
            metadata={
                **metadata,
                "query_id": query_id,
                "document_id": document,
                "score": judged[document],
            },
        )


def _part(folder: Path, name: str, split: str | None) -> list[DataFile]:
    """Return the files of the corpus or the queries: a file, or a folder with any split."""
    if folder.is_file():
        return find_files(folder)
    for suffix in (".jsonl", ".parquet", ".json"):
        if (folder / f"{name}{suffix}").is_file():
            return find_files(folder / f"{name}{suffix}")
    if not (folder / name).is_dir():
        raise bad_file(
            folder, f"{name} is missing; expected {name}.jsonl or a folder {name} in it; add it"
        )
    files = find_files(folder / name, any_split=True)
    return [file for file in files if file.split == split] or files


def _read_qrels(folder: Path, split: str | None) -> Judgements:
    """Return the judgements of a split.

    Raises:
        RecordError: If there are none, a row is malformed, or two rows contradict each other.
    """
    tables = sorted((folder / "qrels").glob("*.tsv"))
    chosen = [path for path in tables if split in (None, path.stem)]
    if tables and len(chosen) != 1:
        raise RecordError(
            f"split = {split!r}; expected one of {[path.stem for path in tables]}; choose the "
            "split",
            reason="ambiguous_split",
            file=folder / "qrels",
        )
    if not tables and not (folder / "qrels").is_dir():
        raise bad_file(
            folder,
            "qrels is missing; expected qrels/SPLIT.tsv or a folder of Parquet files; add it",
        )
    rows = _tsv_rows(chosen[0]) if tables else _file_rows(folder / "qrels", split)
    judgements: Judgements = {}
    for path, number, query, document, value in rows:
        judged = judgements.setdefault(query, {})
        try:
            score = float(value)
        except (TypeError, ValueError) as error:
            raise _bad_judgement(path, number, value) from error
        if judged.setdefault(document, score) != score:
            raise bad_file(
                path,
                f"query {query!r} and document {document!r} have the scores {judged[document]} "
                f"and {score}; expected one; remove the wrong row",
                number,
            )
    return judgements


def _tsv_rows(path: Path) -> Iterator[tuple[Path, int, str, str, Any]]:
    with regular_file(path).open(encoding="utf-8-sig", newline="") as file:
        cells_of_rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, cells in enumerate(cells_of_rows, start=1):
            if not cells or (number == 1 and cells[-1].strip().lower() == "score"):
                continue
            # Four columns are trec's own: query, iteration, document, score.
            if len(cells) not in (3, 4):
                raise _bad_judgement(path, number, cells)
            yield path, number, cells[0], cells[-2], cells[-1]


def _file_rows(folder: Path, split: str | None) -> Iterator[tuple[Path, int, str, str, Any]]:
    for row in read_rows(find_files(folder, split=split)):
        try:
            if isinstance(row.data, RecordError):
                raise row.data
            query = first_id(row.data, ("query-id", "query_id"))
            document = first_id(row.data, ("corpus-id", "corpus_id"))
        except RecordError as error:
            raise error.at(file=row.file, row=row.number) from error
        yield row.file, row.number, query, document, row.data.get("score")


def _bad_judgement(path: Path, number: int, value: Any) -> RecordError:
    return bad_file(
        path,
        f"judgement = {value!r:.80}; expected query-id, corpus-id and a number as score; correct "
        "the row",
        number,
    )
