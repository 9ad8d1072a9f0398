"""One call: every input is read once and embedded in each of several ways.

Inputs are read in batches of like length and get their no-think vectors. Those that are to think
wait, with what was read of them, until a batch of them is full, whatever batches they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence

from torch import Tensor
from tqdm.auto import tqdm

from twn_rl.data.record import Item
from twn_rl.inference.batches import collate_usable, in_batches
from twn_rl.inference.details import Ledger, timed
from twn_rl.inference.opened_ahead import OpenedAhead
from twn_rl.inference.shortlist import Shortlist
from twn_rl.inference.thought_pool import Chunk
from twn_rl.inference.way import Way
from twn_rl.modeling.limits import PromptLimits
from twn_rl.modeling.model import DualLoraModel

logger = logging.getLogger(__name__)


class ReadingPass:
    """The course of one call; what comes of it ends up in the ledgers of the ways."""

    def __init__(
        self,
        model: DualLoraModel,
        items: Sequence[Item | None],
        ways: Sequence[Way],
        *,
        limits: PromptLimits,
    ) -> None:
        """Prepare a call.

        Args:
            model: The model.
            items: N items; None where an input was refused already.
            ways: How to embed them, with equal batch sizes.
            limits: What texts are cut and pictures are scaled to.
        """
        self.model, self.items, self.ways, self.limits = model, items, ways, limits
        self.pictures = OpenedAhead(limits)
        options = ways[0].options
        self.batch_size, show = options.batch_size, options.show_progress_bar
        self.title = show if isinstance(show, str) else "embedding"
        self.is_quiet = not (logger.isEnabledFor(logging.INFO) if show is None else show)
        # Prompts that several ways write from, or that the policy decides by, are read for it once.
        starters = [way for way in ways if way.may_write or way.chooser.is_policy]
        is_policy_asked = any(way.chooser.is_policy for way in ways)
        is_read_again = len(starters) > 1 and not model.shares_prefill
        self.starters = starters if is_read_again or is_policy_asked else []

    def run(self) -> None:
        """Embed everything."""
        with timed("total", (), self._ledgers()), self.model.session():
            ahead = self.pictures.batches(in_batches(self.items, self.batch_size))
            for items in self._shown(ahead, self.items, self.title):
                self._embed(items)
            for way in self.ways:
                if way.shortlist is not None:
                    self._think_about(way, way.shortlist)
                way.finish()

    def _ledgers(self, ways: Sequence[Way] | None = None) -> list[Ledger]:
        return [way.ledger for way in (self.ways if ways is None else ways)]

    def _shown(
        self, batches: Iterable[dict[int, Item]], items: Sequence[Item | None], title: str
    ) -> Iterator[dict[int, Item]]:
        total = sum(item is not None for item in items)
        with tqdm(desc=title, total=total, disable=self.is_quiet or None) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch))

    def _embed(self, items: Mapping[int, Item]) -> None:
        """Give the inputs of a batch their no-think vectors, and think where that is decided."""
        batch, items = self._collate(items, self.ways)
        positions = list(items)
        if not positions:
            return
        by_tail = {
            is_latent: [way for way in self.ways if way.chooser.is_latent == is_latent]
            for is_latent in sorted({way.chooser.is_latent for way in self.ways})
        }
        is_unit = all(way.options.normalize_embeddings for way in self.ways)
        if is_unit and len(by_tail) == 1 and not any(way.goes_on(positions) for way in self.ways):
            # One pass is cheaper than two where nothing goes on from the prompt.
            with timed("read", positions, self._ledgers()):
                states = self.model.embed(batch, is_latent=self.ways[0].chooser.is_latent)
            for ledger in self._ledgers():
                ledger.accept(positions, states)
            return
        chunk = self._read(positions, batch, self.ways)
        for is_latent, ways in by_tail.items():
            with timed("read", positions, self._ledgers(ways)):
                states = self.model.read_out(chunk.prefix, is_latent=is_latent)
            for way in ways:
                way.take(chunk, list(items.values()), states)

    def _collate(
        self, items: Mapping[int, Item], ways: Sequence[Way]
    ) -> tuple[dict[str, Tensor], dict[int, Item]]:
        """Return a batch and its items as they are embedded; the others are refused."""
        ledgers = self._ledgers(ways)
        with timed("preprocess", list(items), ledgers):
            parts = self.model.backbone, self.model.renderer
            batch, fitted, errors = collate_usable(
                *parts, items, self.limits, open_item=self.pictures.open
            )
        for ledger in ledgers:
            for error in errors:
                ledger.refuse(error)
            cut = {
                position for position, item in fitted.items() if item.text != items[position].text
            }
            ledger.details.truncated += cut - set(ledger.details.truncated)
        return batch, fitted

    def _read(
        self, positions: list[int], batch: Mapping[str, Tensor], ways: Sequence[Way]
    ) -> Chunk:
        """Return what was read of a batch; who writes pays for what only writing needs."""
        everyone, started, prefix = self._ledgers(ways), None, None
        with timed("read", positions, everyone):
            prompts = self.model.prepare(batch)
            if self.model.shares_prefill:
                prefix = self.model.read(prompts)
        if self.starters:
            # What a decision is read from is what a thought goes on from.
            payers = everyone if self.model.has_one_reader else self._ledgers(self.starters)
            with timed("read", positions, payers):
                started = self.model.start_reasoning(prompts if prefix is None else prefix)
        if prefix is None:
            with timed("read", positions, everyone):
                prefix = self.model.read(prompts, started=started)
            start = prompts if started is None else started
        else:
            start = prefix if started is None else started
        return Chunk(positions, [""] * len(positions), start, prefix)

    def _think_about(self, way: Way, shortlist: Shortlist[Chunk | None]) -> None:
        """Let everyone on the list think, and read those again of whom nothing could be kept."""
        listed = set(shortlist.positions())
        chosen = [item if position in listed else None for position, item in enumerate(self.items)]
        for items in self._shown(in_batches(chosen, self.batch_size), chosen, "thinking"):
            again: dict[int, Item] = {}
            for position, item in items.items():
                chunk = shortlist.pop(position)
                if chunk is None:
                    again[position] = item
                else:
                    way.pool.add(chunk, [0])
            if again:
                way.ledger.details.rereads += len(again)
                batch, fitted = self._collate(again, [way])
                if fitted:
                    chunk = self._read(list(fitted), batch, [way])
                    way.think(chunk, list(fitted.values()), range(len(chunk)))
