"""`twn-rl export`: a model as a folder that other programs load."""

from __future__ import annotations

import argparse
import logging

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the model, the form and the new folder."""
    parser.add_argument("--model", required=True, help="folder of a model, or its name on the hub")
    parser.add_argument(
        "--to",
        required=True,
        choices=("merged", "reasoner", "sentence-transformers"),
        help="merged: vectors without thinking, plain transformers; reasoner: writes the thoughts, "
        "plain transformers; sentence-transformers: everything, the backbone included",
    )
    parser.add_argument("--output", required=True, help="folder to make")
    parser.add_argument(
        "--dtype", help="parameter type to merge in, as float32; else the stored one"
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the folder."""
    from twn_rl.inference.export import export

    folder = export(arguments.model, arguments.output, arguments.to, dtype=arguments.dtype)
    logger.info("wrote %s; README.md there says how to load it", folder)
    return 0
