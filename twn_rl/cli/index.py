"""`twn-rl index`: the items of a file -> a collection to search, for `twn-rl serve`."""

from __future__ import annotations

import argparse
import logging

from twn_rl.cli.encode import named_fields
from twn_rl.cli.model_arguments import add_model_arguments, encode_settings, load_embedder
from twn_rl.inference.item_rows import ItemFile

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare input, output and how a row becomes an item."""
    parser.add_argument("--input", required=True, help="rows, .jsonl or .parquet")
    parser.add_argument("--output", required=True, help="folder of the collection")
    parser.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="[PART=]NAME",
        help="field that holds the text or item; or parts, as id=sku text=title image=photo",
    )
    parser.add_argument("--ann_rows", type=int, help="approximate index from so many rows on")
    parser.add_argument(
        "--distinct", action="store_true", help="keep the first of rows with the same content"
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Build the collection."""
    from twn_rl.inference.collection import ANN_ROWS, build_collection

    source = ItemFile(
        arguments.input,
        side="document",
        fields=named_fields(arguments.field),
        data_root=arguments.data_root,
        limit=arguments.limit,
    )
    collection = build_collection(
        load_embedder(arguments),
        source,
        arguments.output,
        encode_settings(arguments),
        ann_rows=ANN_ROWS if arguments.ann_rows is None else arguments.ann_rows,
        is_distinct=arguments.distinct,
        overwrite=arguments.overwrite,
    )
    logger.info(
        "%s: %d rows, %s search",
        *(
            collection.path,
            collection.rows,
            "approximate" if collection.is_approximate else "exact",
        ),
    )
    return 0
