"""`twn-rl search`: the vectors of one file nearest to those of another."""

from __future__ import annotations

import argparse
import logging

from twn_rl.inference.search import search_files, show_hits
from twn_rl.inference.vector_files import open_vectors

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the two files of vectors and the output."""
    parser.add_argument("--queries", required=True, help="vectors to search for, .npy")
    parser.add_argument("--index", required=True, help="vectors to find, .npy")
    parser.add_argument("--output", required=True, help="hits, .jsonl")
    parser.add_argument("--top_k", type=int, default=10, help="hits a query")
    parser.add_argument(
        "--backend",
        choices=("auto", "faiss", "exact"),
        default="auto",
        help="auto: FAISS if installed, else an exact product",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the hits and log the first few."""
    first = search_files(
        open_vectors(arguments.queries),
        open_vectors(arguments.index),
        arguments.output,
        top_k=arguments.top_k,
        backend=arguments.backend,
    )
    for line in show_hits(first):
        logger.info("%s", line)
    return 0
