"""Queries as the model is shown them, their pictures opened once for all rollouts of a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from twn_rl.data.record import Item, Record
from twn_rl.modeling.collator import fit_item
from twn_rl.modeling.model import DualLoraModel

# TRL asks for a query once a rollout, and again for each reuse of a generation.
REMEMBERED_QUERIES = 64


class OpenedQueries:
    """The queries of records: texts cut and pictures opened and scaled by the model's limits.

    The last ones stay open, so that TRL and the scorer do not decode the same file again.
    """

    def __init__(self, model: DualLoraModel, records: Sequence[Record]) -> None:
        """Open nothing yet."""
        # Datasets pickles what it transforms with to name itself: no weights must be among it.
        self._backbone = replace(model.backbone, model=cast(Any, None))
        self.renderer, self._limits = model.renderer, model.limits
        self._records = records
        self._kept_characters: dict[int, int] = {}
        self._opened: dict[int, Item] = {}

    def __call__(self, index: int) -> Item:
        """Return the query of a record."""
        if index not in self._opened:
            if len(self._opened) >= REMEMBERED_QUERIES:
                del self._opened[next(iter(self._opened))]
            self._opened[index] = self._fitted(index)
        return self._opened[index]

    def _fitted(self, index: int) -> Item:
        query = self._records[index].query
        if index in self._kept_characters:  # measuring it again would process its pictures again
            text = (query.text or "")[: self._kept_characters[index]]
            return self._limits.open(replace(query, text=text or None))
        item = fit_item(self._backbone, self.renderer, query, self._limits)
        self._kept_characters[index] = len(item.text or "")
        return item
