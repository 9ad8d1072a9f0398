"""One list of inputs for all processes of a launch: each embeds its share, all get all vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from twn_rl.inference.details import EncodeDetails
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions, Side
from twn_rl.runtime.processes import Processes, is_main, on_all_processes
from twn_rl.runtime.sharded_pass import deal


def encode_dealt(
    embedder: ThinkingEmbedder,
    inputs: Sequence[Any],
    ways: Mapping[str, EncodeOptions],
    *,
    side: Side = "query",
    processes: Processes | None = None,
) -> dict[str, EncodeDetails]:
    """Return what `ThinkingEmbedder.encode_ways` does; every process must call this.

    Inputs are dealt in turn, so that long and short ones, texts and pictures, are shared alike.
    Vectors are those of one process but for the last bits, which depend on what shares a batch;
    `timings` add up over the processes.

    Args:
        embedder: What embeds, on the device of this process.
        inputs: N inputs, equal on all processes.
        ways: Name -> options, as for `encode_ways`; none of them with a `think_rate`, which is a
            share of the whole call.
        side: See `SidedOptions`.
        processes: Those that share the work; None embeds everything here.

    Raises:
        InputError: For an input that cannot be embedded, with its position, on the process that
            met it.
        RuntimeError: On the others.
    """
    if processes is None or processes.num_processes == 1:
        return embedder.encode_ways(inputs, ways, side=side)
    rows = deal(range(len(inputs)), processes)

    def share() -> dict[str, EncodeDetails]:
        own = {name: options.of_rows(rows) for name, options in ways.items()}
        try:
            return embedder.encode_ways([inputs[row] for row in rows], own, side=side, logs=False)
        except InputError as error:
            raise InputError(rows[error.position], error.problem) from error

    parts = on_all_processes(share)
    count = len(parts)
    places = [row for first in range(count) for row in range(first, len(inputs), count)]
    found = {
        name: EncodeDetails.joined([part[name] for part in parts]).placed(places) for name in ways
    }
    for details in found.values() if is_main(processes) else ():
        details.log()
    return found
