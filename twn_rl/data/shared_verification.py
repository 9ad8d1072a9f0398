"""The blocks of a file of records, each verified once: by one of the processes, or in the past.

Knows no rules; `verification` has them, and `verified_blocks` what is kept.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from zlib import crc32

from tqdm import tqdm

from twn_rl.data.jsonl import RowFile
from twn_rl.data.verification import RowChecks
from twn_rl.data.verified_blocks import BlockStore, VerifiedBlock

if TYPE_CHECKING:
    from twn_rl.runtime.processes import Processes

PROGRESS_AFTER_SECONDS = 5.0
# What is verified in an instant needs no file beside it.
STORED_FROM_ROWS = 5000
STORED_FROM_PICTURES = 1000


def verified_blocks(
    rows: RowFile,
    root: Path,
    *,
    is_strict: bool,
    limit: int | None = None,
    workers: int = 0,
    sharers: Sequence[Processes] = (),
) -> list[VerifiedBlock]:
    """Return what was found of each block of the first `limit` rows.

    If `is_strict`, the last block that is returned may hold an error, and is then the first one
    that does.

    Args:
        rows: The file.
        root: Data root.
        is_strict: Stop at a bad row.
        limit: Rows to look at; None is all.
        workers: Processes that decode pictures; 0 is threads.
        sharers: Who shares the work: all processes of a run, then those of this machine, who make
            what they do not see of the others' work. All of them must call this.
    """
    end = rows.end(limit)
    blocks = rows.blocks(end)
    relative = os.path.relpath(root, rows.path.parent.resolve())
    store = BlockStore(rows.path, {"root": relative, "end": end, "blocks": len(blocks)})
    held: dict[int, VerifiedBlock] = {}
    known = store.stored_pictures()
    with RowChecks(rows, root, is_strict=is_strict, known=known, workers=workers) as checks:
        for sharer in sharers or (None,):
            _verify_share(blocks, checks, store, held, sharer)
            if sharer is not None:
                sharer.wait_for_everyone()
        found = []
        for number, block in enumerate(blocks):
            stored = held.get(number) or store.read(number, is_new=True)
            found.append(stored or checks.verify(block))
            if is_strict and found[-1].errors:
                break
    if not sharers or sharers[0].process_index == 0:
        store.keep_only_this()
    return found


def _verify_share(
    blocks: Sequence[range],
    checks: RowChecks,
    store: BlockStore,
    held: dict[int, VerifiedBlock],
    sharer: Processes | None,
) -> None:
    """Verify this process's share of the blocks, as far as that has not been done; fill `held`."""
    index, count = (0, 1) if sharer is None else (sharer.process_index, sharer.num_processes)
    first = crc32(checks.rows.path.name.encode()) % count  # small files are not all the main one's
    mine = [n for n in range(len(blocks)) if (n - first) % count == index and n not in held]
    with tqdm(
        desc=f"Verifying {checks.rows.path.name}",
        total=sum(len(blocks[number]) for number in mine),
        unit=checks.rows.place_unit,
        unit_scale=True,
        delay=PROGRESS_AFTER_SECONDS,
        disable=index > 0 or None,
    ) as bar:
        for number in mine:
            size = len(blocks[number])
            stored = store.read(number)
            if stored is not None:
                bar.update(size)
            else:
                stored = checks.verify(
                    blocks[number], lambda share, size=size: bar.update(share * size)
                )
                pictures = len(stored.picture_keys)
                if (
                    len(blocks) > 1
                    or stored.rows >= STORED_FROM_ROWS
                    or pictures >= STORED_FROM_PICTURES
                ):
                    store.write(number, stored)
                    # Mapped, it is no memory of this process.
                    stored = store.read(number, is_new=True) or stored
            held[number] = stored
            if checks.is_strict and stored.errors:
                return
