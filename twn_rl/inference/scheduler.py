"""One call of `encode`: read every input once, choose who thinks, hand those to the thought pool.

Inputs are read in batches of like length and get their no-think vectors. Those that are to think
wait, with what was read of them, until a batch of them is full, whatever batches they came from.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from twn_rl.data.record import Item
from twn_rl.inference.inputs import InputError
from twn_rl.inference.ledger import Ledger
from twn_rl.inference.length_batches import Row, collate_rows, in_batches, open_pictures
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.shortlist import Shortlist
from twn_rl.inference.thought_pool import Chunk, ThoughtCache, ThoughtPool
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.limits import PromptLimits
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.thoughts import evaluating

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True)
class Chooser:
    """Which inputs think.

    Attributes:
        mask: One bool per input; None asks the gate or the policy.
        gate: No-think states (N, D) -> probabilities (N,); None with no mask asks the policy.
        threshold: Probability above which to think; unused with a rate.
        is_latent: Vectors without a written thought have a latent one.
    """

    mask: Sequence[bool] | None = None
    gate: Callable[[Tensor], Tensor] | None = None
    threshold: float | None = None
    is_latent: bool = False

    @property
    def is_policy(self) -> bool:
        """Whether the policy's first token decides."""
        return self.mask is None and self.gate is None


class EncodeRun:
    """The course of one call; vectors and details end up in `ledger`."""

    def __init__(
        self,
        model: DualLoraModel,
        items: Sequence[Item | None],
        options: EncodeOptions,
        chooser: Chooser,
        ledger: Ledger,
        *,
        limits: PromptLimits | None = None,
        cache: ThoughtCache | None = None,
    ) -> None:
        """Prepare a call.

        Args:
            model: The model.
            items: N items; None where an input was refused already.
            options: How to embed.
            chooser: Which inputs think.
            ledger: Where results go.
            limits: What texts are cut and pictures are scaled to; the model's if None.
            cache: Where to look for thoughts and to leave them.
        """
        self.model, self.items, self.options = model, items, options
        self.chooser, self.ledger, self.limits = chooser, ledger, limits or model.limits
        details = ledger.details
        self.probabilities = (
            details.policy_probabilities if chooser.is_policy else details.gate_probabilities
        )
        self.pool = ThoughtPool(model, options, ledger, cache)
        self.count = sum(item is not None for item in items)
        self.shortlist: Shortlist[Chunk | None] | None = None
        if options.think_rate is not None:
            # 0.29 * 100 is a little less than 29 in floating point; the summand keeps that one.
            size = int(options.think_rate * self.count + 1e-9)
            self.shortlist = Shortlist(size, options.prefix_cache_gib * _GIB)
        show = options.show_progress_bar
        self.is_quiet = not (logger.isEnabledFor(logging.INFO) if show is None else show)

    def run(self) -> None:
        """Embed everything."""
        with self.ledger.timed("total"), torch.no_grad(), evaluating(self.model):
            with tqdm(desc="embedding", total=self.count, disable=self.is_quiet) as bar:
                for rows in in_batches(self.items, self.options.batch_size):
                    self._embed(rows)
                    bar.update(len(rows))
            if self.shortlist is not None:
                self._think_about(self.shortlist)
            self.pool.finish()
        self.ledger.details.fallbacks.sort()
        self.ledger.details.truncated.sort()

    def _embed(self, rows: list[Row]) -> None:
        """Give the rows of a batch their no-think vectors, and think where that is decided."""
        batch, rows = self._collate(rows)
        mask = self.chooser.mask
        if not rows:
            return
        if mask is not None and not any(mask[row.position] for row in rows):
            self._embed_only(rows, batch)
            return
        chunk, states = self._read(rows, batch)
        self.ledger.accept(chunk.positions, states)
        if mask is None:
            self._ask(chunk, states)
        candidates = [
            index
            for index, position in enumerate(chunk.positions)
            if position not in self.ledger.details.errors
        ]
        if self.shortlist is not None:
            for index in candidates:
                self._offer(self.shortlist, chunk, rows, index)
            return
        thinking = [index for index in candidates if self._thinks(chunk.positions[index])]
        self._fill_keys(chunk, rows, thinking)
        self.pool.add(chunk, thinking)

    def _embed_only(self, rows: Sequence[Row], batch: dict[str, Tensor]) -> None:
        is_latent = self.chooser.is_latent
        with self.ledger.timed("read"):
            if self.options.normalize_embeddings:
                # One pass is cheaper than two where nothing goes on from the prompt.
                states = self.model.embed(batch, is_latent=is_latent)
            else:
                prefix = self.model.read(self.model.prepare(batch))
                states = self.model.read_out(prefix, is_latent=is_latent)
        self.ledger.accept([row.position for row in rows], states)

    def _collate(self, rows: Sequence[Row]) -> tuple[dict[str, Tensor], list[Row]]:
        with self.ledger.timed("preprocess"):
            opened: list[Row] = []
            for row in rows:
                try:
                    opened.append(open_pictures(row, self.limits))
                except InputError as error:
                    self.ledger.refuse(error)
            parts = self.model.backbone, self.model.renderer
            batch, kept, cut, errors = collate_rows(*parts, opened, self.limits)
        for error in errors:
            self.ledger.refuse(error)
        truncated = self.ledger.details.truncated
        truncated += [position for position in cut if position not in truncated]
        return batch, kept

    def _read(self, rows: Sequence[Row], batch: dict[str, Tensor]) -> tuple[Chunk, Tensor]:
        """Return what was read of a batch, and its no-think states (N, D)."""
        with self.ledger.timed("read"):
            start = prompts = self.model.prepare(batch)
            if self.chooser.is_policy:
                # What the decision was read from is what a thought goes on from.
                start = started = self.model.start_reasoning(prompts)
                prefix = self.model.read(prompts, started=started)
            else:
                prefix = self.model.read(prompts)
            states = self.model.read_out(prefix, is_latent=self.chooser.is_latent)
        return Chunk([row.position for row in rows], [""] * len(rows), start, prefix), states

    def _ask(self, chunk: Chunk, states: Tensor) -> None:
        """Note how likely the gate or the policy finds it that each input should think."""
        who = "policy" if self.chooser.is_policy else "gate"
        with self.ledger.timed(who):
            if self.chooser.gate is not None:
                probabilities = self.chooser.gate(states).float().tolist()
            else:
                assert isinstance(chunk.start, Prefix)
                probabilities = self.model.think_probability(chunk.start).tolist()
        for position, probability in zip(chunk.positions, probabilities, strict=True):
            self.probabilities[position] = probability
            if not 0.0 <= probability <= 1.0 and position not in self.ledger.details.errors:
                problem = (
                    f"{who} probability = {probability}; expected in [0, 1]; train the {who} again "
                    f"with recipes/{'adaptive' if who == 'policy' else who}_embed.py"
                )
                self.ledger.refuse(InputError(position, problem))

    def _thinks(self, position: int) -> bool:
        if self.chooser.mask is not None:
            return self.chooser.mask[position]
        probability = self.probabilities[position]
        assert probability is not None
        assert self.chooser.threshold is not None
        return probability > self.chooser.threshold

    def _fill_keys(self, chunk: Chunk, rows: Sequence[Row], indices: Sequence[int]) -> None:
        if self.pool.needs_keys:
            with self.ledger.timed("keys"):
                for index in indices:
                    chunk.keys[index] = rows[index].item.content_key()

    def _offer(
        self, shortlist: Shortlist[Chunk | None], chunk: Chunk, rows: Sequence[Row], index: int
    ) -> None:
        def keep() -> tuple[Chunk | None, int]:
            if not chunk.is_mergeable:
                return None, 0
            self._fill_keys(chunk, rows, [index])
            kept = chunk.select([index])
            return kept, kept.num_bytes()

        position = chunk.positions[index]
        probability = self.probabilities[position]
        assert probability is not None
        shortlist.offer(probability, position, keep)

    def _think_about(self, shortlist: Shortlist[Chunk | None]) -> None:
        """Let everyone on the list think, and read those again of whom nothing could be kept."""
        chosen = [self.items[position] for position in shortlist.positions()]
        with tqdm(desc="thinking", total=len(chosen), disable=self.is_quiet) as bar:
            listed = set(shortlist.positions())
            items = [item if i in listed else None for i, item in enumerate(self.items)]
            for rows in in_batches(items, self.options.batch_size):
                kept = [(row, shortlist.pop(row.position)) for row in rows]
                for _, chunk in kept:
                    if chunk is not None:
                        self.pool.add(chunk, [0])
                self._read_again([row for row, chunk in kept if chunk is None])
                bar.update(len(rows))

    def _read_again(self, rows: list[Row]) -> None:
        if not rows:
            return
        self.ledger.details.rereads += len(rows)
        batch, rows = self._collate(rows)
        if rows:
            chunk, _ = self._read(rows, batch)
            self._fill_keys(chunk, rows, range(len(rows)))
            self.pool.add(chunk, range(len(rows)))
