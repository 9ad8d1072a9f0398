"""What a run was trained on, so that resuming it on something else is noticed. Knows no trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from twn_rl.data.mixture import Mixture
from twn_rl.data.record import Record
from twn_rl.data.record_files import RecordSet
from twn_rl.data.verification import digests_of
from twn_rl.runtime.sharded_pass import shard_ranges

RECORDS_FILE = "records.json"
_MAX_BLOCKS = 256


def describe_records(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Return what tells these records in this order from others, as JSON of a few kilobytes.

    Pictures count by their pixels, as in `Item.content_key`, wherever they lie.
    """
    rows = max(1, -(-len(records) // _MAX_BLOCKS))
    blocks, ids, contents = [], 0, 0
    for positions in shard_ranges(len(records), rows):
        names, digests = _digests(records, positions)
        blocks.append(hashlib.sha256(digests.tobytes()).hexdigest()[:16])
        # Sums do not depend on the order.
        ids += int(names.sum(dtype=np.uint64))
        contents += int(digests[:, :8].copy().view(">u8").sum(dtype=np.uint64))
    drawn: dict[str, Any] = {"seed": seed}
    if isinstance(records, Mixture):
        drawn |= {
            "sources": dict(zip(records.names, records.weights, strict=True)),
            "one_source_per_batch": records.one_source_per_batch,
        }
    sums = {"ids": f"{ids % 2**64:016x}", "contents": f"{contents % 2**64:016x}"}
    return {"records": len(records), **sums, "drawn": drawn, "rows": rows, "blocks": blocks}


def _digests(
    records: Sequence[Record], positions: range
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    if isinstance(records, RecordSet | Mixture):
        return records.digests(positions)
    return digests_of(records[position] for position in positions)


def what_changed(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """Return in words how the records differ that two descriptions are of; None if they do not."""
    if then == now:
        return None
    if then["records"] != now["records"]:
        return f"{then['records']} records then, {now['records']} now"
    pairs = zip(then["blocks"], now["blocks"], strict=True)
    differing = [number for number, (old, new) in enumerate(pairs) if old != new]
    if not differing:
        return f"they were drawn by {then['drawn']}, now by {now['drawn']}"
    first = now["rows"] * differing[0]
    place = f"from record {first} on" if now["rows"] == 1 else f"from about record {first} on"
    if then["contents"] == now["contents"]:
        return f"the same records in another order, {place}"
    if then["ids"] == now["ids"]:
        return f"records of the same names with other content, {place}"
    return f"other records, {place}"
