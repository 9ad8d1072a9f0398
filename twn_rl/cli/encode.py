"""`twn-rl encode`: the items of a file -> a memory-mapped file of vectors."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from pathlib import Path

from twn_rl.cli.model_arguments import add_model_arguments, encode_settings, load_embedder
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.item_rows import ItemFile
from twn_rl.inference.vector_meta import details_path

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare input, output and how a row becomes an item."""
    parser.add_argument("--input", required=True, help="rows, .jsonl or .parquet")
    parser.add_argument("--output", required=True, help="vectors, .npy; details stand beside it")
    parser.add_argument(
        "--side",
        choices=("query", "document"),
        default="document",
        help="encode as queries or documents; of records, their query or their positive",
    )
    parser.add_argument(
        "--field",
        nargs="+",
        default=[],
        metavar="[PART=]NAME",
        help="field that holds the text or item; or parts, as id=sku text=title image=photo",
    )
    parser.add_argument(
        "--on_bad_row",
        choices=("skip", "raise"),
        default="skip",
        help="skip: zero vector, error in the details; raise: stop",
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encode the file; return 1 if no row could be encoded, 0 otherwise."""
    settings = encode_settings(arguments, on_bad_row=arguments.on_bad_row)
    source = ItemFile(
        arguments.input,
        side=arguments.side,
        fields=named_fields(arguments.field),
        data_root=arguments.data_root,
        limit=arguments.limit,
    )
    report = encode_file(
        load_embedder(arguments),
        source,
        arguments.output,
        settings,
        overwrite=arguments.overwrite,
    )
    logger.info("%s: %s", arguments.output, report)
    if report.failed_rows:
        logger.warning(
            "%d of %d rows have a zero vector; their errors are in %s",
            *(report.failed_rows, report.rows, details_path(Path(arguments.output))),
        )
    return int(report.failed_rows == report.rows)


def named_fields(words: Sequence[str]) -> dict[str, str]:
    """Return part -> name of the words of `--field`."""
    return dict(_part(word) for word in words)


def _part(field: str) -> tuple[str, str]:
    """Return ("text", "title") of "text=title", and ("item", "title") of "title"."""
    part, is_named, name = field.partition("=")
    return (part, name) if is_named else ("item", part)
