"""Candidates of all sources, put together and scored shard by shard; knows no rule."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.whole_files import digest
from twn_rl.training.thought_selection.evaluators import Evaluator
from twn_rl.training.thought_selection.shards import RecordShards, SelectionError

Row = dict[str, Any]


def unjudged(sources: Sequence[RecordShards]) -> list[Row]:
    """Return one row a record with the `candidates` of all sources, in their order.

    Raises:
        SelectionError: If there is no source.
    """
    if not sources:
        raise SelectionError(
            "no source of candidates; expected at least one; use --own_temperatures, "
            "--use_record_cots, --candidate_files, --demo_teachers or --endpoint_url"
        )
    return [
        {"id": rows[0]["id"], "candidates": [c for row in rows for c in row["candidates"]]}
        for rows in zip(*(source.rows() for source in sources), strict=True)
    ]


def judge(
    rows: Sequence[Row],
    evaluator: Evaluator,
    model: DualLoraModel,
    folder: Path,
    *,
    batch_size: int = 64,
    rebuild: bool = False,
    processes: Processes | None = None,
    show_progress_bar: bool = True,
) -> RecordShards:
    """Return the rows with `with_cot`, `without` and `worth` at every candidate that can be taught.

    Equal CoTs of a record are scored once. A CoT beyond the model's think budget could never be
    written again; it gets the problem "too_long". One that cannot be judged gets "no_negatives".
    """

    def score(positions: list[int]) -> list[Row]:
        judged = [
            [_within_budget(candidate, model) for candidate in rows[position]["candidates"]]
            for position in positions
        ]
        pairs = {
            (position, candidate["cot"]): None
            for position, candidates in zip(positions, judged, strict=True)
            for candidate in candidates
            if candidate["problem"] is None
        }
        ordered, found = list(pairs), {}
        for start in range(0, len(ordered), batch_size):
            batch = ordered[start : start + batch_size]
            found |= dict(zip(batch, evaluator.matches(batch), strict=True))
        for position, candidates in zip(positions, judged, strict=True):
            for candidate in candidates:
                if candidate["problem"] is None:
                    match = found[position, candidate["cot"]]
                    if match is None:
                        candidate["problem"] = "no_negatives"
                        continue
                    candidate |= {
                        "with_cot": match.with_cot,
                        "without": match.without,
                        "worth": match.worth,
                    }
        return [{"candidates": candidates} for candidates in judged]

    plan = {**evaluator.plan, "candidates": digest([row["candidates"] for row in rows])}
    plan["max_think_tokens"] = model.config.max_think_tokens
    return RecordShards(folder, [row["id"] for row in rows], plan).fill(
        score, rebuild=rebuild, processes=processes, show_progress_bar=show_progress_bar
    )


def _within_budget(candidate: Row, model: DualLoraModel) -> Row:
    if candidate["problem"] is not None:
        return dict(candidate)
    tokens = len(model.completion_ids(model.renderer.completion(candidate["cot"]), add_eos=True))
    is_too_long = tokens > model.config.max_think_tokens
    return {**candidate, "problem": "too_long" if is_too_long else None}
