"""`twn-rl encode`: the items of a file -> a memory-mapped file of vectors.

Several processes share the work: `torchrun --nproc_per_node 8 -m twn_rl.cli encode ...`; several
machines, as actors of Ray Data: `twn-rl encode --ray_actors 16 --ray_gpus 1 ...`.
"""

from __future__ import annotations

import argparse
import logging
import os
from functools import partial
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
    from twn_rl.inference.encode_settings import EncodeReport, EncodeSettings
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
    parser.add_argument(
        "--ray_actors",
        type=int,
        help="let so many actors of Ray Data work, on RAY_ADDRESS or on this machine",
    )
    parser.add_argument(
        "--ray_gpus", type=float, default=0.0, help="GPUs of an actor; 0 keeps it on the CPU"
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Encode the file; return 1 if no row could be encoded, 0 otherwise."""
    settings = encode_settings(arguments, on_bad_row=arguments.on_bad_row)
    source = ItemFile(
        arguments.input if arguments.ray_actors is None else Path(arguments.input).absolute(),
        side=arguments.side,
        fields=named_fields(arguments.field),
        data_root=arguments.data_root,
        limit=arguments.limit,
    )
    processes = launched_processes()
    if arguments.ray_actors is not None:
        return told(encoded_by_ray(arguments, source, settings, processes), arguments.output)
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
    return told(report, arguments.output)


def told(report: EncodeReport, output: str) -> int:
    """Say what came of it; return 1 if no row could be encoded, 0 otherwise."""
    logger.info("%s: %s", output, report)
    if report.failed_rows:
        logger.warning(
            "%d of %d rows have a zero vector; their errors are in %s",
            *(report.failed_rows, report.rows, details_path(Path(output))),
        )
    return int(report.failed_rows == report.rows)


def encoded_by_ray(
    arguments: argparse.Namespace,
    source: ItemFile,
    settings: EncodeSettings,
    processes: RunProcesses | None,
) -> EncodeReport:
    """Encode the file by actors of Ray Data."""
    from twn_rl.inference.ray_encode import RayActors, encode_with_ray

    if processes is not None:
        raise ValueError(
            f"--ray_actors under a launcher of {processes.num_processes} processes; expected one "
            "process, which asks Ray for actors; leave torchrun out"
        )
    actors = RayActors(arguments.ray_actors, gpus=arguments.ray_gpus)
    if Path(arguments.model).is_dir():  # and no name on a hub
        arguments.model = str(Path(arguments.model).absolute())
    load = partial(load_embedder, arguments)
    return encode_with_ray(
        load, source, arguments.output, settings, actors=actors, overwrite=arguments.overwrite
    )


def launched_processes() -> RunProcesses | None:
    """Return the processes that a launcher has started for this command, None without one."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return None
    from twn_rl.runtime.processes import join_processes

    return join_processes()
