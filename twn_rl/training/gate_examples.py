"""What a gate is taught on: distinct inputs of one side with all their partners; knows no model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from twn_rl.data.record import Item, Record, hop_of, pool_of, task_of
from twn_rl.modeling.gate import QUERY_SIDE, SIDES

MIXED = "mixed"


@dataclass(frozen=True)
class GateExample:
    """One distinct input and what it should be near to.

    Attributes:
        id: Id of the first record it occurs in.
        key: Its content key.
        item: The query, or the target on the document side.
        partners: (content key, pool) of every distinct target of the query, or query of the target.
        task: Task of its records, or "mixed".
        hop: Hop of its records; None if they have none or differ.
    """

    id: str
    key: str
    item: Item
    partners: tuple[tuple[str, str], ...]
    task: str
    hop: str | None


def gate_examples(records: Sequence[Record], side: str) -> list[GateExample]:
    """Return the distinct inputs of one side, in order of first appearance.

    Equal queries are one example with several targets, and equal targets one with several queries:
    an input is thought about once, and its partners are no negatives of each other.
    """
    if side not in SIDES:
        raise ValueError(f"side = {side!r}; expected one of {SIDES}; change sides")
    groups: dict[str, list[tuple[Record, str]]] = {}
    for record in records:
        own, other = record.query, record.positive
        if side != QUERY_SIDE:
            own, other = other, own
        groups.setdefault(own.content_key(), []).append((record, other.content_key()))
    examples = []
    for key, members in groups.items():
        first = members[0][0]
        tasks = dict.fromkeys(task_of(record) for record, _ in members)
        hops = dict.fromkeys(hop_of(record) for record, _ in members)
        examples.append(
            GateExample(
                id=first.id,
                key=key,
                item=first.query if side == QUERY_SIDE else first.positive,
                partners=tuple(dict.fromkeys((other, pool_of(r)) for r, other in members)),
                task=next(iter(tasks)) if len(tasks) == 1 else MIXED,
                hop=next(iter(hops)) if len(hops) == 1 else None,
            )
        )
    return examples


def choose_examples(
    examples: Sequence[GateExample], max_examples: int | None, *, seed: int = 0
) -> list[GateExample]:
    """Return at most that many examples, drawn by the seed, in their old order; None takes all."""
    if max_examples is None or max_examples >= len(examples):
        return list(examples)
    chosen = random.Random(seed).sample(range(len(examples)), max_examples)
    return [examples[index] for index in sorted(chosen)]


def bank_items(records: Sequence[Record], side: str) -> tuple[list[Item], list[str]]:
    """Return what examples of `side` compete for, and its pools: all targets, or all queries."""
    if side != QUERY_SIDE:
        return [record.query for record in records], [pool_of(record) for record in records]
    pairs = [(item, pool_of(r)) for r in records for item in (r.positive, *r.negatives)]
    return [item for item, _ in pairs], [pool for _, pool in pairs]
