"""The likeliest k of a stream, and what was kept of them within a memory bound."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Generic, TypeVar

Kept = TypeVar("Kept")


class Shortlist(Generic[Kept]):
    """Candidates that may still be among the k highest scores of all that will have been offered.

    A candidate that falls out can never come back, so nothing needs to be kept of it. If memory
    runs short, those most likely to fall out are forgotten first: they stay candidates, without
    what was kept.
    """

    def __init__(self, size: int, max_bytes: float) -> None:
        """Keep the best `size`, with at most `max_bytes` of what belongs to them."""
        self.size, self.max_bytes = size, max_bytes
        self.kept_bytes = 0
        self._heap: list[tuple[float, int]] = []  # (score, -position): of equals the first stay
        self._kept: dict[int, tuple[Kept, int]] = {}
        self._forgettable: list[tuple[float, int]] = []

    def offer(self, score: float, position: int, keep: Callable[[], tuple[Kept, int]]) -> None:
        """Consider one more candidate; `keep` returns what to keep of it and its bytes."""
        entry = (score, -position)
        if not self.size:
            return
        if len(self._heap) < self.size:
            heapq.heappush(self._heap, entry)
        else:
            dropped = heapq.heappushpop(self._heap, entry)
            self._forget(-dropped[1])
            if dropped == entry:
                return
        self._kept[position] = keep()
        self.kept_bytes += self._kept[position][1]
        heapq.heappush(self._forgettable, entry)
        while self.kept_bytes > self.max_bytes:
            self._forget(-heapq.heappop(self._forgettable)[1])

    def positions(self) -> list[int]:
        """Return the candidates' positions, best first."""
        return [-negative for _, negative in sorted(self._heap, reverse=True)]

    def pop(self, position: int) -> Kept | None:
        """Return and drop what was kept of a candidate; None if it was forgotten."""
        kept = self._kept.get(position)
        self._forget(position)
        return None if kept is None else kept[0]

    def _forget(self, position: int) -> None:
        _, size = self._kept.pop(position, (None, 0))
        self.kept_bytes -= size
