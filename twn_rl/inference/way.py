"""One way of embedding inputs that have been read: who thinks, what is thought, what came of it."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.inference.chooser import Chooser
from twn_rl.inference.details import Ledger, timed
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.shortlist import Shortlist
from twn_rl.inference.thought_pool import Chunk, ThoughtCache, ThoughtPool
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.model import DualLoraModel

_GIB = 1 << 30


class Way:
    """Takes batches of inputs as they are read; vectors and details end up in `ledger`."""

    def __init__(
        self,
        model: DualLoraModel,
        options: EncodeOptions,
        chooser: Chooser,
        ledger: Ledger,
        *,
        num_usable: int,
        cache: ThoughtCache | None = None,
    ) -> None:
        """Prepare one way.

        Args:
            model: The model.
            options: How to embed.
            chooser: Which inputs think.
            ledger: Where results go.
            num_usable: How many inputs have not been refused yet.
            cache: Where to look for thoughts and to leave them.
        """
        self.model, self.options, self.chooser, self.ledger = model, options, chooser, ledger
        details, entries = ledger.details, enumerate(chooser.entries or ())
        self.probabilities = (
            details.policy_probabilities if chooser.is_policy else details.gate_probabilities
        )
        given = {position: entry for position, entry in entries if not isinstance(entry, bool)}
        self.pool = ThoughtPool(
            model, options, ledger, given=given, judge=chooser.judge, cache=cache
        )
        self.shortlist: Shortlist[Chunk | None] | None = None
        if options.think_rate is not None:
            # 0.29 * 100 is a little less than 29 in floating point; the summand keeps that one.
            size = int(options.think_rate * num_usable + 1e-9)
            self.shortlist = Shortlist(size, options.prefix_cache_gib * _GIB)

    @property
    def may_write(self) -> bool:
        """Whether an input may write a thought of its own."""
        entries, threshold = self.chooser.entries, self.chooser.threshold
        if entries is None:
            return self.shortlist is not None or (threshold is not None and threshold < 1)
        return any(entry is True for entry in entries)

    def goes_on(self, positions: Sequence[int]) -> bool:
        """Return whether more may be asked of these inputs than their no-think vectors."""
        entries = self.chooser.entries
        return entries is None or any(entries[position] is not False for position in positions)

    def take(self, chunk: Chunk, items: Sequence[Item], states: Tensor) -> None:
        """Note the no-think states (N, D) of a batch, and think about it where that is decided."""
        self.ledger.accept(chunk.positions, states)
        if self.chooser.entries is None:
            self._ask(chunk, states)
        errors = self.ledger.details.errors
        rows = [row for row, position in enumerate(chunk.positions) if position not in errors]
        if self.shortlist is not None:
            for row in rows:
                self._offer(self.shortlist, chunk, items, row)
            return
        self.think(chunk, items, [row for row in rows if self._thinks(chunk.positions[row])])

    def think(self, chunk: Chunk, items: Sequence[Item], rows: Sequence[int]) -> None:
        """Let some rows of a batch think."""
        self._fill_keys(chunk, items, rows)
        self.pool.add(chunk, rows)

    def finish(self) -> None:
        """Let everyone think who still waits for it."""
        self.pool.finish()
        self.ledger.details.fallbacks.sort()
        self.ledger.details.truncated.sort()

    def _ask(self, chunk: Chunk, states: Tensor) -> None:
        """Note how likely the gate or the policy finds it that each input should think."""
        who = "policy" if self.chooser.is_policy else "gate"
        with timed(who, chunk.positions, [self.ledger]):
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
        return self.chooser.thinks(position, self.probabilities[position])

    def _fill_keys(self, chunk: Chunk, items: Sequence[Item], rows: Sequence[int]) -> None:
        if self.pool.needs_keys and rows:
            with timed("keys", [chunk.positions[row] for row in rows], [self.ledger]):
                for row in rows:
                    chunk.keys[row] = chunk.keys[row] or items[row].content_key()

    def _offer(
        self, shortlist: Shortlist[Chunk | None], chunk: Chunk, items: Sequence[Item], row: int
    ) -> None:
        def keep() -> tuple[Chunk | None, int]:
            if not chunk.is_mergeable:
                return None, 0
            self._fill_keys(chunk, items, [row])
            kept = chunk.select([row])
            return kept, kept.num_bytes()

        position = chunk.positions[row]
        probability = self.probabilities[position]
        assert probability is not None
        shortlist.offer(probability, position, keep)
