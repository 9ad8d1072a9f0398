"""Picture files are opened on threads, a batch ahead of the model.

A photograph takes longer to decode and scale than a GPU takes to embed it. Refuses to know what
becomes of the pictures.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

from PIL import Image

from twn_rl.data.record import Item
from twn_rl.modeling.limits import PromptLimits

MAX_THREADS = 8


class OpenedAhead:
    """Opens the pictures of the next batch while a batch is worked on.

    Pictures in memory are left to the thread that asks: several inputs may hold the same one, which
    two threads must not decode.
    """

    def __init__(self, limits: PromptLimits) -> None:
        """Open pictures within `limits`, which count them."""
        self._limits = limits
        self._opened: Mapping[int, Future[Item]] = {}

    def batches(self, batches: Iterable[dict[int, Item]]) -> Iterator[dict[int, Item]]:
        """Yield batches; `open` serves the one yielded last. Two are in memory at most."""
        pool = ThreadPoolExecutor(min(MAX_THREADS, len(os.sched_getaffinity(0))), "pictures")
        try:
            ready: tuple[dict[int, Item], dict[int, Future[Item]]] | None = None
            for batch in batches:
                files = [item for item in batch.values() if _is_of_files(item)]
                begun = {id(item): pool.submit(self._limits.open, item) for item in files}
                if ready is not None:
                    yield self._turn_to(*ready)
                ready = batch, begun
            if ready is not None:
                yield self._turn_to(*ready)
        finally:
            self._opened = {}
            pool.shutdown(cancel_futures=True)

    def open(self, item: Item) -> Item:
        """Return what `PromptLimits.open` does.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        begun = self._opened.get(id(item))
        return self._limits.open(item) if begun is None else begun.result()

    def _turn_to(
        self, batch: dict[int, Item], opened: Mapping[int, Future[Item]]
    ) -> dict[int, Item]:
        self._opened = opened
        return batch


def _is_of_files(item: Item) -> bool:
    sources = (*item.images, *item.video)
    return bool(sources) and not any(isinstance(source, Image.Image) for source in sources)
