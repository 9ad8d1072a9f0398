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
from typing import Any

from twn_rl.data.formats.conversion import Conversion, Outcome, as_list, build_each, text_of
from twn_rl.data.formats.corpus import Corpus, first_id, open_corpus
from twn_rl.data.formats.layout import SUFFIXES, DataFile, find_files
from twn_rl.data.formats.rows import Row, read_rows
from twn_rl.data.record import Item, Record, RecordError

_IDS = ("positive_document_ids", "negative_document_ids")
_PASSAGES = ("positive_passages", "negative_passages")
_MODALITIES = ("text", "image", "video", "audio")


def convert_tevatron(conversion: Conversion) -> Iterator[Outcome]:
    """Yield a record for each positive document of each row."""
    corpus = _corpus_files(conversion)
    paths = {file.path for file in corpus}
    files = [file for file in conversion.files() if file.path not in paths]
    if not corpus:
        return build_each(read_rows(files), partial(_records, corpus=None, conversion=conversion))
    return _convert(files, corpus, conversion)


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
        id_of=partial(first_id, names=("docid", "_id")),
        item_of=partial(_corpus_item, conversion=conversion),
        needed=needed,
        tally=conversion.tally,
    ) as corpus:
        build = partial(_records, corpus=corpus, conversion=conversion)
        yield from build_each(read_rows(files), build)


def _records(
    row: Row, data: Mapping[str, Any], *, corpus: Corpus | None, conversion: Conversion
) -> Iterator[Record]:
    query_id = first_id(data, ("query_id",))
    positives, negatives = (
        _passages(data, conversion) if "positive_passages" in data else _documents(data, corpus)
    )
    query = _item(
        {
            **{kind: data.get(f"query_{kind}") for kind in _MODALITIES},
            **({"text": data["query"]} if "query" in data else {}),
        },
        "query",
        conversion,
    )
    used = ("query_id", "query", *(f"query_{kind}" for kind in _MODALITIES), *_IDS, *_PASSAGES)
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


def _documents(
    data: Mapping[str, Any], corpus: Corpus | None
) -> tuple[dict[str, Item], dict[str, Item]]:
    """Return positives and negatives by id, looked up in the corpus."""
    names = [[str(name) for name in as_list(data.get(field))] for field in _IDS]
    _refuse_overlap(*names)
    if corpus is None:
        raise RecordError(
            "rows name their documents by id but there is no corpus; expected corpus.jsonl beside "
            "the rows; pass the corpus",
            reason="missing_document",
        )
    positives, negatives = ({name: corpus[name] for name in listed} for listed in names)
    return positives, negatives


def _passages(
    data: Mapping[str, Any], conversion: Conversion
) -> tuple[dict[str, Item], dict[str, Item]]:
    """Return positives and negatives by id, as the row holds them."""
    items: list[dict[str, Item]] = []
    for field in _PASSAGES:
        passages = as_list(data.get(field))
        if not all(isinstance(passage, Mapping) for passage in passages):
            raise RecordError(
                f"value = {passages!r:.80}; expected objects with docid, title and text; "
                "correct it",
                reason="bad_type",
                field=field,
            )
        for passage in passages:
            known = ("docid", "title", "text", "score")
            conversion.metadata(passage, used=known, prefix=f"{field}.")
        items.append(
            {
                first_id(passage, ("docid",)): _item(passage, f"{field}[{i}]", conversion)
                for i, passage in enumerate(passages)
            }
        )
    positives, negatives = items
    _refuse_overlap([*positives], [*negatives])
    return positives, negatives


def _refuse_overlap(positives: list[str], negatives: list[str]) -> None:
    if not positives:
        raise RecordError(
            "positives = 0; expected one document at least; leave the row out",
            reason="no_positive",
        )
    both = sorted(set(positives) & set(negatives))
    if both:
        raise RecordError(
            f"documents {both} are positive and negative; expected one of both; remove them",
            reason="positive_in_negatives",
        )


def _corpus_item(data: Mapping[str, Any], *, conversion: Conversion) -> Item:
    known = [*_MODALITIES, *(f"document_{kind}" for kind in _MODALITIES)]
    conversion.metadata(data, used=("docid", "_id", "title", *known), prefix="corpus.")
    fields = {kind: data.get(kind, data.get(f"document_{kind}")) for kind in _MODALITIES}
    item = _item({**fields, "title": data.get("title")}, "document", conversion)
    return Item.from_dict(item.to_dict())


def _item(data: Mapping[str, Any], field: str, conversion: Conversion) -> Item:
    if data.get("audio"):
        raise RecordError(
            "item has audio; expected text, image or video; leave the row out",
            reason="audio",
            field=field,
        )
    parts = [text_of(data, name, where=f"{field}.") for name in ("title", "text")]
    pictures = conversion.pictures
    return Item(
        text=" ".join(part for part in parts if part) or None,
        images=pictures.paths(data.get("image"), field=f"{field}.image"),
        video=pictures.frames(data.get("video"), field=f"{field}.video"),
    )


def _corpus_files(conversion: Conversion) -> list[DataFile]:
    """Return the files of the corpus; none where rows are to hold their documents themselves."""
    if conversion.corpus is not None:
        return find_files(conversion.corpus)
    folder = conversion.input if conversion.input.is_dir() else conversion.input.parent
    places: list[Path] = [folder / "corpus", *(folder / f"corpus{suffix}" for suffix in SUFFIXES)]
    return next((find_files(place) for place in places if place.exists()), [])
