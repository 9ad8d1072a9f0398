"""`twn-rl encode`: the items of a file -> a memory-mapped file of vectors.

Several processes share the work: `torchrun --nproc_per_node 8 -m twn_rl.cli encode ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING

from twn_rl.cli.model_arguments import (
    add_model_arguments,
    add_row_arguments,
    encode_settings,
    load_embedder,
    named_fields,
)
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.item_rows import ItemFile
from twn_rl.inference.vector_meta import details_path

if TYPE_CHECKING:
    from twn_rl.runtime.processes import RunProcesses

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare input, output and how a row becomes an item."""
    add_row_arguments(parser, output="vectors, .npy; details stand beside it")
    parser.add_argument(
        "--side",
        choices=("query", "document"),
        default="document",
        help="encode as queries or documents; of records, their query or their positive",
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
    processes = launched_processes()
    if processes is not None and arguments.device is None:
        arguments.device = str(processes.device)
    report = encode_file(
        load_embedder(arguments),
        source,
        arguments.output,
        settings,
        overwrite=arguments.overwrite,
        processes=processes,
    )
    if processes is not None and not processes.is_main_process:
        return 0  # the main process says what came of it
    logger.info("%s: %s", arguments.output, report)
    if report.failed_rows:
        logger.warning(
            "%d of %d rows have a zero vector; their errors are in %s",
            *(report.failed_rows, report.rows, details_path(Path(arguments.output))),
        )
    return int(report.failed_rows == report.rows)


def launched_processes() -> RunProcesses | None:
    """Return the processes that a launcher has started for this command, None without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from twn_rl.runtime.processes import join_processes

    return join_processes()
