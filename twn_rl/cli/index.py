"""`twn-rl index`: the items of a file -> a collection to search, for `twn-rl serve`."""

from __future__ import annotations

import argparse
import logging
from typing import Any

from twn_rl.cli.model_arguments import (
    add_model_arguments,
    add_row_arguments,
    encode_settings,
    load_embedder,
    named_fields,
)
from twn_rl.inference.item_rows import ItemFile

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare input, output and how a row becomes an item."""
    add_row_arguments(parser, output="folder of the collection")
    parser.add_argument("--ann_rows", type=int, help="approximate index from so many rows on")
    one = parser.add_mutually_exclusive_group()
    one.add_argument(
        "--distinct", action="store_true", help="keep the first of rows with the same content"
    )
    one.add_argument(
        "--add",
        action="store_true",
        help="add rows to the collection that is there; one whose id is there takes its place",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the collection."""
    from twn_rl.inference.collection_writing import ANN_ROWS, add_to_collection, build_collection

    fields = named_fields(arguments.field)
    source = ItemFile(
        arguments.input,
        side="document",
        # A row that takes another's place must say whose: positions are no names.
        fields={"id": "id", **fields} if arguments.add else fields,
        data_root=arguments.data_root,
        limit=arguments.limit,
    )
    settings: dict[str, Any] = {
        "ann_rows": ANN_ROWS if arguments.ann_rows is None else arguments.ann_rows,
        "overwrite": arguments.overwrite,
    }
    encoding, embedder = encode_settings(arguments), load_embedder(arguments)
    if arguments.add:
        collection = add_to_collection(embedder, source, arguments.output, encoding, **settings)
    else:
        settings["is_distinct"] = arguments.distinct
        collection = build_collection(embedder, source, arguments.output, encoding, **settings)
    how = "approximate" if collection.is_approximate else "exact"
    logger.info("%s: %d rows, %s search", collection.path, collection.rows, how)
    return 0
