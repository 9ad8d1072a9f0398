"""Tokens out of a prefix: greedy or sampled, every row with its own dice, rows leave when done.

Knows token ids only. Rollouts of RL come from TRL; this loop serves inference, where pictures must
not be read twice and a thought must not depend on the batch it was written in, which
`generate` offers neither of.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.kv_prefix import Prefix, fork, merge, trim


def dice(
    num_prompts: int, seeds: int | Sequence[int] | None, num_thoughts: int, num_tokens: int
) -> Tensor:
    """Return uniforms (N * num_thoughts, T) in [0, 1); a prompt's depend on its own seed only.

    Args:
        num_prompts: N.
        seeds: One a prompt, or one for all; None draws it from torch's global state.
        num_thoughts: Rows per prompt.
        num_tokens: T.

    >>> bool((dice(2, [3, 5], 1, 4)[1] == dice(1, [5], 1, 4)[0]).all())
    True
    """
    if seeds is None:
        seeds = int(torch.randint(2**62, ()))
    streams = [(seeds, n) for n in range(num_prompts)] if isinstance(seeds, int) else seeds
    if len(streams) != num_prompts:
        raise ValueError(
            f"{len(streams)} seeds for {num_prompts} prompts; expected one each or a single number"
        )
    rows = [np.random.default_rng(s).random((num_thoughts, num_tokens)) for s in streams]
    return torch.from_numpy(np.concatenate(rows))


def pick_tokens(
    logits: Tensor, uniforms: Tensor | None = None, *, temperature: float = 1.0, top_p: float = 1.0
) -> Tensor:
    """Return the next token (N,) of each row: the likeliest one, or the one its die falls on.

    Args:
        logits: (N, V).
        uniforms: (N,) in [0, 1), one die a row; None takes the likeliest token.
        temperature: Divides the logits; above 0.
        top_p: Smallest set of likeliest tokens with this probability; 1 is off
            (Holtzman et al., 1904.09751).
    """
    if uniforms is None:
        return logits.argmax(-1)
    # float64: the tail of a float32 cumulative sum over a vocabulary would lose rare tokens.
    probabilities = (logits.double() / temperature).softmax(-1)
    order = None
    if top_p < 1.0:
        probabilities, order = probabilities.sort(-1, descending=True)
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    target = uniforms.to(cumulative)[:, None] * cumulative[:, -1:]
    chosen = torch.searchsorted(cumulative, target, right=True)
    # Rounding may leave the target at the very end, behind the last token that can be drawn.
    last = probabilities.shape[-1] - 1 - (probabilities.flip(-1) > 0).int().argmax(-1, keepdim=True)
    chosen = chosen.minimum(last)
    return (chosen if order is None else order.gather(-1, chosen))[:, 0]


@dataclass(eq=False)
class Writing:
    """One sequence that is being written.

    Attributes:
        max_new_tokens: Its budget, end of turn included.
        uniforms: (max_new_tokens,) dice of `dice`; None is greedy.
        ids: What has been written so far.
    """

    max_new_tokens: int
    uniforms: Tensor | None = None
    ids: list[int] = field(default_factory=list)


class Decoding:
    """Sequences that are written together, a token of each at every step.

    Others join between two steps, and those that have ended leave at once, so that a long thought
    neither keeps others waiting nor keeps them computing. The adapter that writes must be active.

    Attributes:
        rows: Who is being written, in the order of the batch.
    """

    def __init__(
        self,
        backbone: Backbone,
        *,
        suppress_tokens: Sequence[int],
        opening: Sequence[int] = (),
        temperature: float = 1.0,
        top_p: float = 1.0,
    ) -> None:
        """Start with nobody.

        Args:
            backbone: The model.
            suppress_tokens: Ids never written.
            opening: Ids every row starts with, whatever the model would have written.
            temperature: Of sampling.
            top_p: Of nucleus sampling.
        """
        self.backbone, self.suppress_tokens = backbone, list(suppress_tokens)
        self.opening, self.temperature, self.top_p = list(opening), temperature, top_p
        self.rows: list[Writing] = []
        self._state: Prefix | None = None

    def __len__(self) -> int:
        """Return how many sequences are being written."""
        return len(self.rows)

    def takes(self, prefix: Prefix) -> bool:
        """Return whether these sequences can join now: beside others, caches must be mergeable."""
        return self._state is None or (self._state.is_mergeable and prefix.is_mergeable)

    def join(self, prefix: Prefix, rows: Sequence[Writing]) -> None:
        """Let N sequences join.

        Args:
            prefix: What the adapter that writes has read of them, with logits.
            rows: N budgets and dice; all of them sampled or all greedy, also those that are here.

        Raises:
            ValueError: If they cannot be written beside those that are here, see `takes`.
        """
        if not self.takes(prefix):
            raise ValueError(
                "caches that drop or compress keys cannot grow by other sequences; expected a "
                "backbone whose layers keep all keys, or nobody else; write them by themselves"
            )
        assert prefix.logits is not None
        if self._state is None:
            self._state = replace(prefix, cache=fork(prefix.cache))  # grows, the prefix must not
        else:
            self._state = merge([self._state, prefix])
        self.rows += rows

    def leave(self, rows: Sequence[Writing]) -> None:
        """Let some sequences go, whether they have ended or not."""
        gone = {id(row) for row in rows}
        self._keep([n for n, row in enumerate(self.rows) if id(row) not in gone])

    def step(self) -> list[Writing]:
        """Write a token of every sequence; return those that have ended, which have left."""
        if self._state is None:
            return []
        tokens = self._next_tokens(self._state)
        for row, token in zip(self.rows, tokens.tolist(), strict=True):
            row.ids.append(token)
        eos = self.backbone.eos_token_id
        ended = [row for row in self.rows if row.ids[-1] == eos or self._is_full(row)]
        self.leave(ended)
        if self._state is not None:
            self._state = self._read(self._state, [row.ids[-1] for row in self.rows])
        return ended

    def _is_full(self, row: Writing) -> bool:
        return len(row.ids) >= row.max_new_tokens

    def _next_tokens(self, state: Prefix) -> Tensor:
        """Return the next token (N,) of each sequence."""
        assert state.logits is not None
        forbidden = torch.tensor(self.suppress_tokens, device=state.logits.device).long()
        logits = state.logits.float().index_fill(-1, forbidden, float("-inf"))
        dice = [row.uniforms[len(row.ids)] for row in self.rows if row.uniforms is not None]
        uniforms = torch.stack(dice) if dice else None
        tokens = pick_tokens(logits, uniforms, temperature=self.temperature, top_p=self.top_p)
        for number, row in enumerate(self.rows):
            if len(row.ids) < len(self.opening):
                tokens[number] = self.opening[len(row.ids)]
        return tokens

    def _read(self, state: Prefix, last: Sequence[int]) -> Prefix:
        """Return the state after the last token of each sequence."""
        mask = torch.cat([state.attention_mask, state.attention_mask.new_ones(len(last), 1)], 1)
        places = state.next_position[:, None]
        model: Any = self.backbone.model
        output = model(
            input_ids=state.next_position.new_tensor(last)[:, None],
            attention_mask=mask,
            position_ids=places.expand(3, -1, -1) if self.backbone.uses_mrope else places,
            past_key_values=state.cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        logits = output.logits[:, -1]
        return Prefix(output.past_key_values, mask, state.next_position + 1, logits)

    def _keep(self, kept: Sequence[int]) -> None:
        """Go on with some rows; columns that only the others filled go, too."""
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[number] for number in kept]
        if not kept:
            self._state = None
            return
        assert self._state is not None
        self._state = trim(self._state.select(kept))


def decode(
    backbone: Backbone,
    prefix: Prefix,
    *,
    max_new_tokens: int,
    suppress_tokens: Sequence[int],
    opening: Sequence[int] = (),
    uniforms: Tensor | None = None,
    temperature: float = 1.0,
    top_p: float = 1.0,
) -> list[list[int]]:
    """Return the ids each sequence goes on with, under the adapter that is active.

    A row ends with the end of turn, or without one after `max_new_tokens`.

    Args:
        backbone: The model.
        prefix: N prompts, read with logits under the adapter that writes.
        max_new_tokens: Budget T of a row, end of turn included.
        suppress_tokens: Ids never written.
        opening: Ids every row starts with, whatever the model would have written.
        uniforms: (N, T) dice of `dice`; None is greedy.
        temperature: Of sampling.
        top_p: Of nucleus sampling.
    """
    decoding = Decoding(
        backbone,
        suppress_tokens=suppress_tokens,
        opening=opening,
        temperature=temperature,
        top_p=top_p,
    )
    dice_of = [None] * len(prefix) if uniforms is None else list(uniforms)
    rows = [Writing(max_new_tokens, own) for own in dice_of]
    decoding.join(prefix, rows)
    while decoding.rows:
        decoding.step()
    return [row.ids for row in rows]
