"""BEIR and ViDoRe folders: `--from beir`.

`corpus.jsonl` (`_id, title, text`), `queries.jsonl` (`_id, text`) and `qrels/SPLIT.tsv`
(`query-id, corpus-id, score`), or the hub's folders `corpus`, `queries` and `qrels` of Parquet
files with the ids of ViDoRe (`corpus-id, image`; `query-id, query`) or of mteb (`id`). Title and
text are joined by a blank, as BEIR's own models read them. Each positive judgement becomes a
record; documents judged below `min_score` (1 unless given) are its hard negatives. The judgements
are held in memory, the corpus is not.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Outcome, build_each, text_of
from twn_rl.data.formats.corpus import Corpus, first_id, open_corpus
from twn_rl.data.formats.layout import find_files
from twn_rl.data.formats.rows import Row, read_rows
from twn_rl.data.record import Item, Record, RecordError

_QUERY_IDS = ("_id", "query-id", "query_id", "id")
_CORPUS_IDS = ("_id", "corpus-id", "corpus_id", "id", "docid")

Judgements = dict[str, dict[str, float]]


def convert_beir(conversion: Conversion) -> Iterator[Outcome]:
    """Yield a record for each positive judgement of a split, in the order of the queries.

    Raises:
        RecordError: If a part is missing or the judgements cannot be read.
    """
    folder = conversion.input
    if not folder.is_dir():
        raise RecordError(
            f"input = {str(folder)!r} is no folder; expected one with corpus, queries and qrels; "
            "name the folder",
            reason="bad_file",
        )
    qrels = _read_qrels(folder, conversion.split)
    queries = read_rows(_part(folder, "queries", conversion.split))
    documents = read_rows(_part(conversion.corpus or folder, "corpus", conversion.split))
    return _convert(conversion, qrels, queries, documents)


def _convert(
    conversion: Conversion, qrels: Judgements, queries: Iterable[Row], documents: Iterable[Row]
) -> Iterator[Outcome]:
    needed = {document for judged in qrels.values() for document in judged}
    seen: set[str] = set()
    with open_corpus(
        documents,
        id_of=partial(first_id, names=_CORPUS_IDS),
        item_of=partial(_document, conversion=conversion),
        needed=needed,
        tally=conversion.tally,
    ) as corpus:
        build = partial(_records, qrels=qrels, corpus=corpus, seen=seen, conversion=conversion)
        yield from build_each(queries, build)
    for query in sorted(qrels.keys() - seen):
        error = RecordError(
            f"query = {query!r} is judged but has no text; expected every judged query among the "
            "queries; add it or remove its judgements",
            reason="missing_query",
        )
        yield Outcome(conversion.input, 0, error)


def _records(
    row: Row,
    data: Mapping[str, Any],
    *,
    qrels: Judgements,
    corpus: Corpus,
    seen: set[str],
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
    name = "query" if "query" in data else "text"
    images = conversion.pictures.paths(data.get("image"), field="image")
    query = Item(text=text_of(data, name), images=images)
    metadata = conversion.metadata(
        data, used=(*_QUERY_IDS, name, "image"), kept=("metadata", "language"), prefix="queries."
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


def _document(data: Mapping[str, Any], *, conversion: Conversion) -> Item:
    conversion.metadata(
        data, used=(*_CORPUS_IDS, "title", "text", "image", "metadata"), prefix="corpus."
    )
    parts = [text_of(data, name) for name in ("title", "text")]
    item = Item(
        text=" ".join(part for part in parts if part) or None,
        images=conversion.pictures.paths(data.get("image"), field="image"),
    )
    return Item.from_dict(item.to_dict())


def _part(folder: Path, name: str, split: str | None) -> Any:
    """Return the files of the corpus or the queries: a file, or a folder with any split."""
    if folder.is_file():
        return find_files(folder)
    for suffix in (".jsonl", ".parquet", ".json"):
        if (folder / f"{name}{suffix}").is_file():
            return find_files(folder / f"{name}{suffix}")
    if not (folder / name).is_dir():
        raise RecordError(
            f"{name} is missing; expected {name}.jsonl or a folder {name} in it; add it",
            reason="bad_file",
            file=folder,
        )
    files = find_files(folder / name, any_split=True)
    return [file for file in files if file.split == split] or files


def _read_qrels(folder: Path, split: str | None) -> Judgements:
    """Return the score of each judged document, by query.

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
        raise RecordError(
            "qrels is missing; expected qrels/SPLIT.tsv or a folder of Parquet files; add it",
            reason="bad_file",
            file=folder,
        )
    rows = _tsv_rows(chosen[0]) if tables else _file_rows(folder / "qrels", split)
    judgements: Judgements = {}
    for path, number, query, document, score in rows:
        judged = judgements.setdefault(query, {})
        if judged.setdefault(document, score) != score:
            raise RecordError(
                f"query {query!r} and document {document!r} have the scores {judged[document]} "
                f"and {score}; expected one; remove the wrong row",
                reason="bad_file",
                file=path,
                row=number,
            )
    return judgements


def _tsv_rows(path: Path) -> Iterator[tuple[Path, int, str, str, float]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        cells_of_rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
        for number, cells in enumerate(cells_of_rows, start=1):
            if not cells or (number == 1 and cells[-1].strip().lower() == "score"):
                continue
            # Four columns are trec's own: query, iteration, document, score.
            if len(cells) not in (3, 4):
                raise _bad_judgement(path, number, cells)
            yield path, number, cells[0], cells[-2], _score(path, number, cells[-1])


def _file_rows(folder: Path, split: str | None) -> Iterator[tuple[Path, int, str, str, float]]:
    for row in read_rows(find_files(folder, split=split)):
        if isinstance(row.data, RecordError):
            raise row.data.at(file=row.file, row=row.number)
        try:
            query = first_id(row.data, ("query-id", "query_id"))
            document = first_id(row.data, ("corpus-id", "corpus_id"))
        except RecordError as error:
            raise error.at(file=row.file, row=row.number) from error
        score = _score(row.file, row.number, row.data.get("score"))
        yield row.file, row.number, query, document, score


def _score(path: Path, number: int, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise _bad_judgement(path, number, value) from error


def _bad_judgement(path: Path, number: int, value: Any) -> RecordError:
    return RecordError(
        f"judgement = {value!r:.80}; expected query-id, corpus-id and a number as score; correct "
        "the row",
        reason="bad_file",
        file=path,
        row=number,
    )
