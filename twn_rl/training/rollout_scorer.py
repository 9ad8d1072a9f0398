"""Sampled CoTs -> the columns rewards read, by the frozen embedding adapter."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twn_rl.data.record import Item, Record, pool_of
from twn_rl.metrics.negatives import FalseNegatives
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import Processes
from twn_rl.training.similarity_columns import similarity_columns
from twn_rl.training.target_bank import TargetBank


@torch.no_grad()
def embed_items(model: DualLoraModel, items: Sequence[Item]) -> Tensor:
    """Return detached no-think unit vectors (N, D) float32 of one batch, dropout off."""
    with evaluating(model.peft_model):
        return model.embed(model.collate(items), is_latent=model.config.latent_documents)


class RolloutScorer:
    """Scores rollouts against every target of the data, each of which was embedded once.

    Attributes:
        targets: Bank of all positives and listed negatives.
        queries: Bank of the no-think query vectors.
        false_negative_ids: Per record, the bank's targets besides its positive that are neither
            negatives nor rivals of its query, see `metrics.negatives`.
    """

    def __init__(
        self,
        model: DualLoraModel,
        records: Sequence[Record],
        directory: str | Path,
        *,
        num_negatives: int = 16,
        max_negative_similarity: float | None = None,
        batch_size: int = 64,
        processes: Processes | None = None,
    ) -> None:
        """Build or reopen both banks below ``directory``; all processes must call this together.

        Args:
            model: The policy's model; its embedding adapter must not change from here on.
            records: What the rollouts are about; `columns` takes positions in it.
            directory: Where the banks live; they are reused while content and scorer are the same.
            num_negatives: K hardest negatives handed to the rewards.
            max_negative_similarity: Cosine to the positive target from which on a target is no
                negative, see `similarity_columns`; None = off.
            batch_size: Items per forward pass.
            processes: `PartialState` or `Accelerator` when several processes share the work.
        """
        self.model, self.records = model, records
        self.num_negatives, self.batch_size = num_negatives, batch_size
        self.max_negative_similarity = max_negative_similarity
        items = [item for r in records for item in (r.positive, *r.negatives)]
        pools = [pool_of(r) for r in records for _ in (r.positive, *r.negatives)]

        shared: dict[str, Any] = {
            "encode": partial(embed_items, model),
            "fingerprint": Fingerprints(model).vectors,
            "batch_size": batch_size,
            "processes": processes,
        }
        targets, queries = (TargetBank(Path(directory) / name) for name in ("targets", "queries"))
        self.targets = targets.build(items, pools=pools, **shared)
        self.queries = queries.build([r.query for r in records], **shared)
        self._positive_ids = [r.positive.content_key() for r in records]
        self._query_ids = [r.query.content_key() for r in records]
        known = FalseNegatives(zip(self._query_ids, self._positive_ids, strict=True))
        self.false_negative_ids = [
            tuple(key for key in known.of(query) if key != positive and key in self.targets.row_of)
            for query, positive in zip(self._query_ids, self._positive_ids, strict=True)
        ]

    def columns(
        self, indices: Sequence[int], completion_ids: Sequence[list[int]]
    ) -> dict[str, list[Any]]:
        """Return the reward columns of N rollouts, one value per rollout.

        Truncated or malformed thinks get the columns of their no-think vector, and so do direct
        answers of a policy that decides (`is_direct`), which count as complete. Rollouts of one
        query that wrote the same CoT are embedded once.

        Args:
            indices: Position of each rollout's record.
            completion_ids: What the policy wrote, with its end of turn.
        """
        usable = [self.model.completion_for_embedding(ids) for ids in completion_ids]
        rows = torch.tensor([self.queries.row_of[self._query_ids[i]] for i in indices])
        no_think = self.queries.rows(rows.numpy(), torch.device("cpu"))
        vectors = no_think.clone()
        is_direct = [self.model.is_direct(ids) for ids in completion_ids]
        is_complete = [bool(ids) or direct for ids, direct in zip(usable, is_direct, strict=True)]
        distinct = self._distinct(indices, usable)
        embedded = self._embed(list(distinct))
        for position, (index, ids) in enumerate(zip(indices, usable, strict=True)):
            if ids:
                vectors[position] = embedded[distinct[index, tuple(ids)]]
        think = self._similarities(vectors, indices)
        baseline = self._similarities(no_think, indices)
        eos = self.model.backbone.eos_token_id
        return {
            **think,
            **{f"no_think_{name}": values for name, values in baseline.items()},
            "think_tokens": [sum(token != eos for token in ids) for ids in completion_ids],
            "is_direct": is_direct,
            "is_think_complete": is_complete,
            "embedding_variance": [self._variance(vectors)] * len(indices),
        }

    @staticmethod
    def _distinct(
        indices: Sequence[int], usable: Sequence[list[int]]
    ) -> dict[tuple[int, tuple[int, ...]], int]:
        distinct: dict[tuple[int, tuple[int, ...]], int] = {}
        for index, ids in zip(indices, usable, strict=True):
            if ids:
                distinct.setdefault((index, tuple(ids)), len(distinct))
        # Under ZeRO-3 every process must run a forward, also one whose thinks all failed.
        return distinct or {(indices[0], ()): 0}

    def _embed(self, thoughts: list[tuple[int, tuple[int, ...]]]) -> Tensor:
        """Return vectors (N, D) of query + CoT; every distinct query is read once.

        The number of forward passes does not depend on the thoughts: ZeRO-3 needs the same on
        every process.
        """
        queries = {index: row for row, index in enumerate(dict.fromkeys(i for i, _ in thoughts))}
        items = [self.records[index].query for index in queries]
        prompts = self.model.prepare(self.model.collate(items))
        prefix = self.model.read(prompts).select([queries[index] for index, _ in thoughts])
        states = self.model.read_out(prefix, [ids for _, ids in thoughts])
        return torch.nn.functional.normalize(states, dim=-1).cpu()

    def _similarities(self, vectors: Tensor, indices: Sequence[int]) -> dict[str, list[Any]]:
        return similarity_columns(
            vectors,
            [self._positive_ids[i] for i in indices],
            self.targets,
            num_negatives=self.num_negatives,
            false_negative_ids=[self.false_negative_ids[i] for i in indices],
            max_negative_similarity=self.max_negative_similarity,
            pools=[pool_of(self.records[i]) for i in indices],
        )

    @staticmethod
    def _variance(vectors: Tensor) -> float:
        """Return 1 - |mean vector|^2: 0 when all vectors are equal, 1 when they spread out."""
        return 1.0 - float(vectors.mean(0).square().sum())
