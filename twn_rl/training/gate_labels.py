"""Gate labels: what thinking changed for each input, on disk and as classes; knows no model.

A folder holds `plan.json` (what the labels are about), one Parquet file a shard with every measured
quantity of its inputs, and one `.npy` file a shard with their states without and with the thought.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from twn_rl.runtime.extras import extra
from twn_rl.runtime.sharded_pass import PLAN_FILE, shard_ranges
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import map_file, read_json, write_array, written_aside

with extra("train"):
    import pyarrow as pa
    import pyarrow.parquet as pq

LABEL_FORMAT = 2
IGNORED = -1
_CHECKSUM = b"states_crc32"

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "key": pa.string(),
        "task": pa.string(),
        "hop": pa.string(),
        "no_think_loss": pa.float64(),
        "think_loss": pa.float64(),
        "gain": pa.float64(),
        # One rank a partner: a query may have several targets.
        "no_think_ranks": pa.list_(pa.int64()),
        "think_ranks": pa.list_(pa.int64()),
        "no_think_positive_similarity": pa.float64(),
        "no_think_hardest_negative": pa.float64(),
        "think_positive_similarity": pa.float64(),
        "think_hardest_negative": pa.float64(),
        "cot": pa.string(),
        "think_tokens": pa.int64(),
        "problem": pa.string(),
    }
)


class LabelsError(ValueError):
    """Labels that are missing, damaged, or about something else than asked for."""


@dataclass(frozen=True)
class GateLabels:
    """What one label pass measured.

    Attributes:
        rows: One dict an input, with the fields of `SCHEMA`. Losses are in nats, means over the
            partners; `gain` = `no_think_loss` - `think_loss`; `problem` says why a thought could
            not be used, and the input then counts as not having thought.
        both_states: (N, 2D) float32 states before normalisation, without and then with the thought;
            both halves are equal where no thought could be used.
    """

    rows: list[dict[str, Any]]
    both_states: NDArray[np.float32]

    @property
    def states(self) -> NDArray[np.float32]:
        """No-think states, (N, D)."""
        return self.both_states[:, : self.both_states.shape[1] // 2]

    @property
    def think_states(self) -> NDArray[np.float32]:
        """States with the thought, (N, D)."""
        return self.both_states[:, self.both_states.shape[1] // 2 :]

    @property
    def gains(self) -> NDArray[np.float64]:
        """Loss without thinking minus loss with it, (N,) nats: above 0 thinking helped."""
        return self.column("gain")

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of all rows, (N,)."""
        return np.array([row[name] for row in self.rows])


def cut_labels(
    gains: NDArray[Any], margin: float, *, lower_margin: float | None = None
) -> NDArray[np.int8]:
    """Return 1 where thinking helped by more than `margin`, 0 where not, `IGNORED` between.

    >>> cut_labels(np.array([0.5, 0.07, 0.0, -0.4]), 0.1, lower_margin=0.05).tolist()
    [1, -1, 0, 0]
    >>> cut_labels(np.array([0.5, 0.07, 0.0, -0.4]), 0.1, lower_margin=-0.1).tolist()
    [1, -1, -1, 0]

    Args:
        gains: (N,) nats.
        margin: Smallest gain that is worth a thought, at least 0.
        lower_margin: Gains up to this one are not worth it; between it and `margin` lies the dead
            band, which teaches nothing. None is `margin`: no dead band. With `-margin` the inputs
            that thinking leaves as they are teach nothing, and a gate tends to think about them.

    Raises:
        ValueError: For a negative margin, a lower margin above it, or gains that are not finite.
    """
    low = margin if lower_margin is None else lower_margin
    if not 0 <= margin < math.inf or not low <= margin or not np.isfinite(gains).all():
        raise ValueError(
            f"margin = {margin}, lower_margin = {lower_margin}, {int((~np.isfinite(gains)).sum())} "
            "gains not finite; expected margin >= 0, lower_margin <= margin and finite gains; "
            "change these settings"
        )
    return np.where(gains > margin, 1, np.where(gains <= low, 0, IGNORED)).astype(np.int8)


def soft_labels(gains: NDArray[Any], margin: float, temperature: float) -> NDArray[np.float64]:
    """Return sigmoid((gain - margin) / temperature), (N,) in (0, 1): near gains, near labels.

    >>> soft_labels(np.array([0.1, 5.0]), 0.1, 0.5).round(3).tolist()
    [0.5, 1.0]

    Raises:
        ValueError: For a temperature that is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}; expected above 0; raise it")
    scaled = np.clip((np.asarray(gains, dtype=np.float64) - margin) / temperature, -60, 60)
    return 1 / (1 + np.exp(-scaled))


def label_report(rows: Sequence[Mapping[str, Any]], margin: float) -> dict[str, dict[str, float]]:
    """Return for all inputs and each task and hop what thinking did to them.

    `helps`, `hurts` and `does_nothing` are shares by the gain against +-margin. `false_helpful` is
    the share whose positive came nearer while its hardest negative came nearer still
    (SURE, 2609.29560): positive similarity alone would call these helped.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        names = ["all", row["task"], *([row["hop"]] if row["hop"] else [])]
        for name in dict.fromkeys(names):
            groups.setdefault(str(name), []).append(row)
    return {name: _summary(members, margin) for name, members in groups.items()}


def _summary(rows: Sequence[Mapping[str, Any]], margin: float) -> dict[str, float]:
    gains = np.array([row["gain"] for row in rows])
    columns = {
        "helps": gains > margin,
        "hurts": gains < -margin,
        "does_nothing": np.abs(gains) <= margin,
        "false_helpful": [is_false_helpful(row) for row in rows],
        "mean_gain": gains,
        "no_think_hit@1": [np.mean([r == 1 for r in row["no_think_ranks"]]) for row in rows],
        "think_hit@1": [np.mean([r == 1 for r in row["think_ranks"]]) for row in rows],
        "think_tokens": [row["think_tokens"] for row in rows],
        "unusable_thoughts": [row["problem"] is not None for row in rows],
    }
    means = {name: float(np.mean(values)) for name, values in columns.items()}
    return {"count": float(len(rows)), **means}


def is_false_helpful(row: Mapping[str, Any]) -> bool:
    """Tell whether the positive came nearer by thinking, and the hardest negative even more."""
    if row["no_think_hardest_negative"] is None:
        return False
    positive = row["think_positive_similarity"] - row["no_think_positive_similarity"]
    negative = row["think_hardest_negative"] - row["no_think_hardest_negative"]
    return bool(0 < positive < negative)


def report_table(report: Mapping[str, Mapping[str, float]]) -> str:
    """Return a `label_report` as a Markdown table."""
    names = list(next(iter(report.values())))
    rows = [
        [group, *(f"{values[n]:.0f}" if n == "count" else f"{values[n]:.3f}" for n in names)]
        for group, values in report.items()
    ]
    return markdown_table(["group", *names], rows)


def read_labels(directory: str | Path) -> GateLabels:
    """Return all labels of a finished pass.

    Raises:
        LabelsError: If shards are missing or damaged.
    """
    folder = Path(directory)
    plan = read_json(folder / PLAN_FILE)
    if plan is None:
        raise LabelsError(
            f"{folder} has no readable {PLAN_FILE}; expected a folder of a label pass; run "
            "recipes/gate_embed.py"
        )
    ranges = shard_ranges(plan["num_examples"], plan["shard_size"])
    shards = [read_shard(folder, number, len(rows)) for number, rows in enumerate(ranges)]
    lost = [number for number, shard in enumerate(shards) if shard is None]
    if lost:
        raise LabelsError(
            f"{folder} lacks shards {lost[:10]} ({len(lost)} of {len(ranges)}); expected all; run "
            "the label pass again, which writes only these"
        )
    parts = [shard for shard in shards if shard is not None]
    rows = [row for shard_rows, _ in parts for row in shard_rows]
    return GateLabels(rows, np.concatenate([states for _, states in parts]))


def read_shard(
    folder: Path, number: int, size: int
) -> tuple[list[dict[str, Any]], NDArray[np.float32]] | None:
    """Return rows and states of a shard, or None if it is absent, cut short or damaged."""
    states = map_file(folder / f"{number:06d}.npy", (size, None))
    try:
        table = pq.read_table(folder / f"{number:06d}.parquet", page_checksum_verification=True)
    except (OSError, pa.ArrowException):
        return None
    if states is None or len(table) != size or table.schema.names != SCHEMA.names:
        return None
    checksum = (table.schema.metadata or {}).get(_CHECKSUM)
    if checksum not in (None, _checksum(states)):
        return None
    return table.to_pylist(), states


def write_shard(
    folder: Path, number: int, rows: list[dict[str, Any]], states: NDArray[np.float32]
) -> None:
    """Write a shard; its rows come last and make it whole."""
    write_array(folder / f"{number:06d}.npy", states)
    path = folder / f"{number:06d}.parquet"
    schema = SCHEMA.with_metadata({_CHECKSUM: _checksum(states)})
    with written_aside(path) as aside:
        table = pa.Table.from_pylist(rows, schema=schema)
        pq.write_table(table, aside, write_page_checksum=True)


def _checksum(states: NDArray[np.float32]) -> bytes:
    return str(crc32(np.ascontiguousarray(states, dtype="<f4").data)).encode()
