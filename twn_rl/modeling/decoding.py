"""Tokens out of a prefix: greedy or sampled, every row with its own dice, rows leave when done.

Knows token ids only. Rollouts of RL come from TRL; this loop serves inference, where pictures must
not be read twice and a thought must not depend on the batch it was written in, which
`generate` offers neither of.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.kv_prefix import Prefix, fork


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

    A row ends with the end of turn, or without one after `max_new_tokens`. Finished rows leave the
    batch at once, so that the last long thought does not keep the others computing.

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
    rows: list[list[int]] = [[] for _ in range(len(prefix))]
    writing = list(range(len(prefix)))
    cache, mask, positions = fork(prefix.cache), prefix.attention_mask, prefix.next_position
    assert prefix.logits is not None
    logits, forbidden = prefix.logits, torch.tensor(suppress_tokens, device=mask.device).long()
    model: Any = backbone.model
    for step in range(max_new_tokens):
        logits = logits.float().index_fill(-1, forbidden, float("-inf"))
        die = None if uniforms is None else uniforms[writing, step]
        tokens = pick_tokens(logits, die, temperature=temperature, top_p=top_p)
        if step < len(opening):
            tokens = torch.full_like(tokens, opening[step])
        for row, token in zip(writing, tokens.tolist(), strict=True):
            rows[row].append(token)
        is_going_on = tokens != backbone.eos_token_id
        kept = is_going_on.nonzero()[:, 0]
        if not len(kept) or step + 1 == max_new_tokens:
            break
        if len(kept) < len(writing):
            writing = [writing[index] for index in kept.tolist()]
            cache.reorder_cache(kept)
            mask, positions, tokens = mask[kept], positions[kept], tokens[kept]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        places = positions[:, None]
        output = model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=places.expand(3, -1, -1) if backbone.uses_mrope else places,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
            return_dict=True,
        )
        logits, cache, positions = output.logits[:, -1], output.past_key_values, positions + 1
    return rows
