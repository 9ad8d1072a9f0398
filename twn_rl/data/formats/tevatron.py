"""tevatron's training data: `--from tevatron`.

Rows are `query_id, query_text, query_image, query_video, positive_document_ids,
negative_document_ids` beside a corpus of `docid, text, image, video` (also `document_text, ...`),
or the older `query, positive_passages, negative_passages`, which hold their documents themselves.
The corpus is the file or folder given, else `corpus.jsonl` or a folder `corpus` beside the rows.
Each positive becomes a record, as tevatron trains on one of them at a time. Title and text are
joined by a blank.
"""

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path

from twn_rl.data.formats.conversion import Conversion, Fields, Outcome, fields_of
from twn_rl.data.formats.corpus import Corpus, open_corpus
from twn_rl.data.formats.input_files import (
    SUFFIXES,
    DataFile,
    Row,
    as_list,
    find_files,
    first_id,
    read_rows,
)
from twn_rl.data.record import Item, Record, RecordError

_IDS = ("positive_document_ids", "negative_document_ids")
_PASSAGES = ("positive_passages", "negative_passages")
_CORPUS_IDS = ("docid", "_id")

# Positives and negatives by id.
Documents = list[dict[str, Item]]


def convert_tevatron(conversion: Conversion) -> Iterator[Outcome]:
    """Yield a record for each positive document of each row."""
    corpus = _corpus_files(conversion)
    paths = {file.path for file in corpus}
    files = [file for file in conversion.files() if file.path not in paths]
    if not corpus:
        return conversion.records(read_rows(files), partial(_records, None))
    return _convert(files, corpus, conversion)


def _corpus_files(conversion: Conversion) -> list[DataFile]:
    """Return the files of the corpus; none where rows are to hold their documents themselves."""
    if conversion.corpus is not None:
        return find_files(conversion.corpus)
    folder = conversion.input if conversion.input.is_dir() else conversion.input.parent
    places: list[Path] = [folder / "corpus", *(folder / f"corpus{suffix}" for suffix in SUFFIXES)]
    return next((find_files(place) for place in places if place.exists()), [])


def _convert(
    files: list[DataFile], corpus_files: list[DataFile], conversion: Conversion
) -> Iterator[Outcome]:
    # Two passes over the rows: the ids first, so that only their documents are kept.
    needed = {
        str(document)
        for row in read_rows(files)
        if not isinstance(row.data, RecordError)
        for name in _IDS
        for document in as_list(row.data.get(name))
    }
    with open_corpus(
        read_rows(corpus_files),
        id_names=_CORPUS_IDS,
        item_of=partial(_document, conversion),
        needed=needed,
        tally=conversion.tally,
    ) as corpus:
        yield from conversion.records(read_rows(files), partial(_records, corpus))


def _document(conversion: Conversion, data: Fields) -> Item:
    def name(kind: str) -> str:
        return kind if kind in data else f"document_{kind}"

    item = _item(data, "document.", conversion, "title", *map(name, _MODALITIES))
    conversion.metadata(data, used=[f"document_{kind}" for kind in _MODALITIES], prefix="corpus.")
    return item


_MODALITIES = ("text", "image", "video", "audio")


def _item(
    data: Mapping[str, object], where: str, conversion: Conversion, title: str, text: str,
    image: str, video: str, audio: str,
) -> Item:  # fmt: skip
    if data.get(audio):
        raise RecordError(
            "item has audio; expected text, image or video; leave the row out",
            reason="audio",
            field=where.strip("."),
        )
    return conversion.item(data, text=(title, text), image=image, video=video, where=where)


def _records(
    corpus: Corpus | None, row: Row, data: Fields, conversion: Conversion
) -> Iterator[Record]:
    query_id = first_id(data, ("query_id",))
    positives, negatives = (
        _passages(data, conversion) if "positive_passages" in data else _documents(data, corpus)
    )
    if not positives:
        raise RecordError(
            "positives = 0; expected one document at least; leave the row out",
            reason="no_positive",
        )
    if both := sorted(set(positives) & set(negatives)):
        raise RecordError(
            f"documents {both} are positive and negative; expected one of both; remove them",
            reason="positive_in_negatives",
        )
    names = [f"query_{kind}" for kind in _MODALITIES]
    if "query" in data:
        names[0] = "query"
    query = _item(data, "", conversion, "", *names)
    used = (*_IDS, *_PASSAGES, "query_text")
    metadata = conversion.metadata(data, used=used, kept=("source", "answers", "answer"))
    kept = conversion.first_negatives([*negatives.values()])
    for document, positive in positives.items():
        yield Record(
            id=f"{query_id} -> {document}",
            source=row.subset,
            query=query,
            positive=positive,
            negatives=kept,
            metadata={**metadata, "query_id": query_id, "document_id": document},
        )


def _documents(data: Fields, corpus: Corpus | None) -> Documents:
    """Return the documents of a row, looked up in the corpus."""
    if corpus is None:
        raise RecordError(
            "rows name their documents by id but there is no corpus; expected corpus.jsonl beside "
            "the rows; pass the corpus",
            reason="missing_document",
        )
    return [{str(name): corpus[str(name)] for name in as_list(data.get(ids))} for ids in _IDS]


def _passages(data: Fields, conversion: Conversion) -> Documents:
    """Return the documents that a row holds itself."""
    sides: Documents = []
    for field in _PASSAGES:
        items: dict[str, Item] = {}
        for i, passage in enumerate(as_list(data.get(field))):
            where = f"{field}[{i}]"
            fields = fields_of(passage, "an object with docid, title and text", where)
            item = _item(fields, f"{where}.", conversion, "title", *_MODALITIES)
            items[first_id(fields, ("docid",))] = item
            conversion.metadata(fields, used=("score",), prefix=f"{field}.")
        sides.append(items)
    return sides
