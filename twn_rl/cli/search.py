"""`twn-rl search`: the vectors of a file, or rows of a collection, nearest to those of another."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import Any

from twn_rl.inference.metadata_filter import parse_filter
from twn_rl.inference.search import search_files, show_hits
from twn_rl.inference.vector_files import StoredVectors, open_vectors

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two files of vectors and the output."""
    parser.add_argument("--queries", required=True, help="vectors to search for, .npy")
    parser.add_argument(
        "--index", required=True, help="vectors to find, .npy, or a folder of `twn-rl index`"
    )
    parser.add_argument("--output", required=True, help="hits, .jsonl")
    parser.add_argument("--top_k", type=int, default=10, help="hits a query")
    parser.add_argument(
        "--backend",
        choices=("auto", "faiss", "exact"),
        default="auto",
        help="auto: FAISS if installed, else an exact product",
    )
    parser.add_argument(
        "--filter",
        nargs="+",
        default=[],
        metavar="NAME=VALUE",
        help="what the metadata of hits must hold; one of several values of a name is enough; "
        "for a folder of `twn-rl index`",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the hits and log the first few."""
    queries = open_vectors(arguments.queries)
    if Path(arguments.index).is_dir():
        first = _search_collection(queries, arguments)
    elif arguments.filter:
        raise ValueError(
            f"--filter with {arguments.index}, which holds vectors without metadata; expected a "
            "folder of `twn-rl index`; make one, or leave the filter out"
        )
    else:
        first = search_files(
            queries,
            open_vectors(arguments.index),
            arguments.output,
            top_k=arguments.top_k,
            backend=arguments.backend,
        )
    for line in show_hits(first):
        logger.info("%s", line)
    return 0


def _search_collection(
    queries: StoredVectors, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    from twn_rl.inference.collection import Collection, search_collection

    if arguments.backend != "auto":
        raise ValueError(
            f"--backend {arguments.backend} with a collection, which LanceDB searches; expected "
            "auto; leave it out"
        )
    return search_collection(
        queries,
        Collection(arguments.index),
        arguments.output,
        top_k=arguments.top_k,
        wanted=parse_filter(arguments.filter),
    )
