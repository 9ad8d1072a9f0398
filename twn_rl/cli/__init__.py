"""`twn-rl`: one subcommand a module. Knows names and help lines; a command's imports are its own.

A module offers `add_arguments(parser)` and `run(arguments) -> int`, the exit status.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import sys
from collections.abc import Sequence
from typing import Any

from twn_rl import __version__

# Subcommand -> (module of this package, one line of help). Modules are imported when chosen, so
# that `twn-rl --help` does not load torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "convert": ("convert", "turn data of another format into records"),
    "check-data": ("check_data", "verify a file of records and print what it holds"),
    "encode": ("encode", "Embed the items of a file into a file of vectors."),
    "search": ("search", "Find the nearest vectors of one file to those of another."),
    "mine-negatives": ("mine_negatives", "Add hard negatives to a file of records."),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status: 0 fine, 1 wrong input, 2 wrong usage."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = argparse.ArgumentParser(prog="twn-rl", description="Embed, search, prepare data.")
    parser.add_argument("--version", action="version", version=f"twn-rl {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in COMMANDS.items():
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=line,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == chosen:
            _module(name).add_arguments(subparser)
    parsed = parser.parse_args(words)
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    try:
        return int(_module(parsed.command).run(parsed))
    except (ValueError, OSError, ModuleNotFoundError) as error:
        # Errors people can act on: their message says what to change; a traceback would hide it.
        logging.getLogger(__name__).error("%s", error)
        return 1


def _module(name: str) -> Any:
    return importlib.import_module(f"twn_rl.cli.{COMMANDS[name][0]}")
