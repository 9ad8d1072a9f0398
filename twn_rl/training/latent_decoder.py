"""Latent thoughts (LaME, arXiv 2606.13061): what K reason states must be able to say again.

The reason tokens themselves belong to the read-out; here is the head that teaches them, which only
training needs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from twn_rl.modeling.model import DualLoraModel


class LatentDecoder(nn.Module):
    """A light transformer decoder that sees K reason states and what it has said so far.

    The paper names a lightweight decoder head and not its size; two layers are our choice. Words
    go in and out through the backbone's frozen tables, so the head has no vocabulary of its own.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        width: int = 256,
        num_layers: int = 2,
        num_heads: int = 4,
        max_tokens: int = 64,
    ) -> None:
        """Make new weights; a text has `max_tokens` at most, end of turn included."""
        super().__init__()
        self.max_tokens = max_tokens
        self.memory_in = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.token_in = nn.Sequential(nn.LayerNorm(hidden_size), nn.Linear(hidden_size, width))
        self.positions = nn.Parameter(0.02 * torch.randn(max_tokens, width))
        layer = nn.TransformerDecoderLayer(
            width, num_heads, 2 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.layers = nn.TransformerDecoder(layer, num_layers, norm=nn.LayerNorm(width))
        self.token_out = nn.Linear(width, hidden_size)
        self.vector_out = nn.Linear(width, hidden_size)

    def forward(self, reason_states: Tensor, token_embeds: Tensor) -> tuple[Tensor, Tensor]:
        """Return what is said: states (N, T, D) for the words, and a vector (N, D).

        The vector is read where nothing has been said yet, so that it rests on the reason states
        alone. Gradient reaches the head and, through the K states only, whatever made them.

        Args:
            reason_states: (N, K, D).
            token_embeds: (N, T - 1, D) of the words before each word but the first.
        """
        memory = self.memory_in(reason_states.to(self.positions.dtype))
        said = self.token_in(token_embeds.to(self.positions.dtype))
        said = F.pad(said, (0, 0, 1, 0)) + self.positions[: said.shape[1] + 1]
        length = said.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=said.device).triu(1)
        states = self.layers(said, memory, tgt_mask=causal)
        return self.token_out(states), self.vector_out(states[:, 0])


class LatentLearner(nn.Module):
    """A model and the head beside it: what a trainer wraps, so that a step has one forward.

    Attributes:
        dual: The model.
        decoder: The head; None for the baseline without reason tokens.
    """

    def __init__(self, dual: DualLoraModel, decoder: LatentDecoder | None) -> None:
        """Hold both.

        Raises:
            ValueError: For a head without reason tokens to look at.
        """
        super().__init__()
        if decoder is not None and not dual.reason_ids:
            raise ValueError(
                "num_reason_tokens = 0; expected K >= 1 reason tokens for a latent thought; set "
                "num_reason_tokens, or train the baseline without them (direct_only)"
            )
        self.dual, self.decoder = dual, decoder

    def forward(
        self,
        query: Mapping[str, Any] | None = None,
        target: Mapping[str, Any] | None = None,
        text: Mapping[str, Tensor] | None = None,
        *,
        with_no_think: bool = False,
    ) -> dict[str, Any]:
        """Return vectors and, with a head, what it makes of the queries' reason states.

        Args:
            query: N prompts, if they are wanted.
            target: M prompts of distinct targets, if they are wanted.
            text: `completion_ids`, `completion_mask` (N, T): the words to say; rows may be empty.
                None asks the head for nothing.
            with_no_think: Also embed the queries without reason tokens.

        Returns:
            `embeds`: `query`, `target` vectors, `no_think` if asked for; `nll` (N,) in nats a word,
            0 where there are none, `is_right` (N,) share of words, `vector` (N, D).
        """
        latent: dict[str, Any] = {}
        embed: dict[str, Any] = {}
        if query is not None:
            (embed if self.decoder is None else latent)["query"] = query
            if self.decoder is not None and with_no_think:
                embed["no_think"] = query
        if target is not None:
            thinks = self.decoder is not None and self.dual.config.latent_documents
            (latent if thinks else embed)["target"] = target
        output = self.dual(embed=embed, latent=latent)
        if self.decoder is None or query is None or text is None:
            return {"embeds": output["embeds"]}
        said = self.decode(output["reason_states"]["query"], text)
        return {"embeds": output["embeds"], **said}

    def decode(self, reason_states: Tensor, text: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return `nll`, `is_right` and `vector` of the head for reason states (N, K, D)."""
        assert self.decoder is not None
        base: Any = self.dual.peft_model.get_base_model()
        with torch.no_grad():
            embeds = base.get_input_embeddings()(text["completion_ids"][:, :-1])
        states, vector = self.decoder(reason_states, embeds)
        head = base.get_output_embeddings()
        logits = head(states.to(head.weight.dtype)).float()
        nll, is_right = word_losses(logits, text["completion_ids"], text["completion_mask"])
        return {"nll": nll, "is_right": is_right, "vector": vector}

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass."""
        return self.dual.is_gradient_checkpointing

    def activation_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Recompute the backbone's layers; see `DualLoraModel`."""
        self.dual.activation_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Do it under its old name, which TRL still calls."""
        self.dual.gradient_checkpointing_enable(*args, **kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.dual.activation_checkpointing_disable()


def word_losses(logits: Tensor, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean NLL (N,) in nats a word, and the share (N,) of words guessed right.

    Every text counts the same, however long it is; one without words has 0 of both.

    >>> logits = torch.zeros(1, 2, 4)
    >>> nll, _ = word_losses(logits, torch.tensor([[1, 2]]), torch.tensor([[1, 1]]))
    >>> round(nll.item(), 4)  # log 4
    1.3863

    Args:
        logits: (N, T, V); gradient flows.
        ids: (N, T) words.
        mask: (N, T), 1 on real words.
    """
    nll = F.cross_entropy(logits.transpose(1, 2), ids, reduction="none")
    count = mask.sum(1).clamp(min=1)
    is_right = (logits.argmax(-1) == ids).float() * mask
    return (nll * mask).sum(1) / count, is_right.detach().sum(1) / count


def vector_losses(vector: Tensor, target_embeds: Tensor) -> Tensor:
    """Return 1 - cosine (N,) of what the head says and the detached target vector, in [0, 2].

    >>> vector_losses(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])).item()
    1.0

    Args:
        vector: (N, D); gradient flows.
        target_embeds: (N, D) unit vectors; detached, so that targets do not move to meet it.
    """
    return 1 - F.cosine_similarity(vector.float(), target_embeds.detach().float(), dim=-1)


def rows_of_others(keys: Tensor) -> Tensor:
    """Return for each row (N,) the next row with another key, itself if there is none.

    >>> rows_of_others(torch.tensor([7, 7, 3])).tolist()
    [2, 2, 0]
    """
    count = len(keys)
    order = (torch.arange(count)[:, None] + torch.arange(count)) % count  # (N, N), itself first
    is_other = keys[order] != keys[:, None]
    return order.gather(1, is_other.int().argmax(1, keepdim=True))[:, 0]
