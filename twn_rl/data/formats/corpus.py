"""Documents looked up by id while rows stream past: on disk, so that millions of them fit."""

import json
import sqlite3
import tempfile
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from twn_rl.data.formats.conversion import Fields, Tally
from twn_rl.data.formats.input_files import Row, first_id
from twn_rl.data.record import Item, RecordError


class Corpus:
    """Items by document id, in a temporary database."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        """Use an open database that `open_corpus` has filled."""
        self._connection = connection

    def __getitem__(self, document_id: str) -> Item:
        """Return the item of a document.

        Raises:
            RecordError: If there is none, or if it could not be read; the message says why.
        """
        found = self._connection.execute(
            "SELECT content FROM documents WHERE id = ?", (document_id,)
        ).fetchone()
        if found is None:
            raise RecordError(
                f"document = {document_id!r} is not in the corpus; expected every judged document; "
                "add it or leave the row out",
                reason="missing_document",
            )
        content = json.loads(found[0])
        if "reason" in content:
            raise RecordError(
                f"document {document_id!r}: {content['detail']}", reason=content["reason"]
            )
        return Item.from_dict(content)


@contextmanager
def open_corpus(
    rows: Iterable[Row],
    *,
    id_names: Sequence[str],
    item_of: Callable[[Fields], Item],
    needed: Container[str],
    tally: Tally,
) -> Iterator[Corpus]:
    """Yield the documents of `rows`; those not `needed` cost neither space nor pictures.

    Args:
        rows: Rows of the corpus.
        id_names: Names a document id may have, the first that is there counts.
        item_of: Returns the item of a row.
        needed: Ids that are going to be asked for.
        tally: Where repeated ids (the first one stays) and unreadable rows are counted.
    """
    with tempfile.TemporaryDirectory(prefix="twn-rl-corpus-") as folder:
        connection = sqlite3.connect(f"{folder}/corpus.sqlite")
        try:
            connection.executescript(
                "PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF;"
                "CREATE TABLE documents (id TEXT PRIMARY KEY, content TEXT) WITHOUT ROWID;"
            )
            for row in tqdm(rows, desc="Reading the corpus", unit=" documents", disable=None):
                try:
                    if isinstance(row.data, RecordError):
                        raise row.data
                    data = Fields(row.data)
                    document_id = first_id(data, id_names)
                except RecordError as error:
                    first = str(error.at(file=row.file, row=row.number))
                    tally.note("corpus rows that cannot be read", first)
                    continue
                if document_id in needed:
                    data.asked.update(id_names)
                    content = json.dumps(_content(row, data, item_of))
                    done = connection.execute(
                        "INSERT OR IGNORE INTO documents VALUES (?, ?)", (document_id, content)
                    )
                    if done.rowcount == 0:
                        tally.note("repeated document ids, the first one stays", document_id)
            yield Corpus(connection)
        finally:
            connection.close()


def _content(row: Row, data: Fields, item_of: Callable[[Fields], Item]) -> dict[str, Any]:
    """Return the item as it is stored, or what is wrong with it: told when it is asked for."""
    try:
        item = item_of(data).to_dict()
        Item.from_dict(item)
        return item
    except RecordError as error:
        return {"reason": error.reason, "detail": f"{row.file}, row {row.number}: {error}"}
