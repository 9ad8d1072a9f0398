"""What a run was trained on, so that resuming it on something else is noticed. Knows no trainer."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from twn_rl.data.mixture import Mixture
from twn_rl.data.record import Record
from twn_rl.runtime.sharded_pass import shard_ranges
from twn_rl.runtime.whole_files import digest

RECORDS_FILE = "records.json"
_MAX_BLOCKS = 256


def describe_records(records: Sequence[Record], seed: int) -> dict[str, Any]:
    """Return what tells these records in this order from others, as JSON of a few kilobytes.

    Pictures count by their pixels, as in `Item.content_key`, wherever they lie.
    """
    rows = max(1, -(-len(records) // _MAX_BLOCKS))
    blocks, ids, contents = [], 0, 0
    for positions in shard_ranges(len(records), rows):
        block = hashlib.sha256()
        for name, content in _digests(records, positions):
            block.update(content)
            # Sums do not depend on the order.
            ids += int.from_bytes(name[:8], "big")
            contents += int.from_bytes(content[:8], "big")
        blocks.append(block.hexdigest()[:16])
    drawn: dict[str, Any] = {"seed": seed}
    if isinstance(records, Mixture):
        drawn |= {
            "sources": dict(zip(records.names, records.weights, strict=True)),
            "one_source_per_batch": records.one_source_per_batch,
        }
    sums = {"ids": f"{ids % 2**64:016x}", "contents": f"{contents % 2**64:016x}"}
    return {"records": len(records), **sums, "drawn": drawn, "rows": rows, "blocks": blocks}


def _digests(records: Sequence[Record], positions: range) -> Iterator[tuple[bytes, bytes]]:
    for position in positions:
        record = records[position]
        items = [item.content_key() for item in record.items()]
        thoughts = [record.query_cot, record.positive_cot]
        metadata = {key: str(value) for key, value in sorted(record.metadata.items())}
        content = digest([record.id, record.source, items, thoughts, metadata])
        yield hashlib.sha256(record.id.encode()).digest(), bytes.fromhex(content)


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
