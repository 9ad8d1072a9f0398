"""Sampled CoTs -> the columns rewards read, by the frozen embedding adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twn_rl.data.record import Item, Record, pool_of
from twn_rl.metrics.negatives import FalseNegatives
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.generation import Batch, evaluating
from twn_rl.modeling.kv_prefix import Prefix, trim
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import Processes
from twn_rl.training.bank_rows import own_rows
from twn_rl.training.candidate_pools import CandidatePools, audit
from twn_rl.training.chunking import pack
from twn_rl.training.similarity_columns import similarity_columns, what_is_asked
from twn_rl.training.target_bank import TargetBank


def embed_items(model: DualLoraModel, items: Sequence[Item]) -> Tensor:
    """Return detached no-think unit vectors (N, D) float32 of one batch, dropout off."""
    return embed_batch(model, model.collate(items))


@torch.no_grad()
def embed_batch(model: DualLoraModel, batch: Batch) -> Tensor:
    """Return the same for what `collate` made of the items."""
    with evaluating(model.peft_model):
        return model.embed(batch, is_latent=model.config.latent_documents)


class RolloutScorer:
    """Scores rollouts against every target of the data, each of which was embedded once.

    Attributes:
        targets: Bank of all positives and listed negatives.
        query_ids: Content key of each record's query.
        query_of: Position of a record -> its query; trainers give one whose pictures are open.
        candidates: What rollouts are compared with in place of a bank above `exact_targets`.
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
        chunk_tokens: int = 32_768,
        bank_dtype: str = "float32",
        num_workers: int = 0,
        processes: Processes | None = None,
        is_shared: bool = False,
        exact_targets: int | None = None,
        num_candidates: int = 1024,
        audit_steps: int = 20,
    ) -> None:
        """Build or reopen the bank below ``directory``; all processes must call this together.

        Args:
            model: The policy's model, where it will score; its embedding adapter must not change
                from here on.
            records: What the rollouts are about; `columns` takes positions in it.
            directory: Where the bank lives; it is reused while content and scorer are the same.
            num_negatives: K hardest negatives handed to the rewards.
            max_negative_similarity: Cosine to the positive target from which on a target is no
                negative, see `similarity_columns`; None = off.
            batch_size: Items per forward pass while the bank is built.
            chunk_tokens: Tokens whose keys and values are held at once while rollouts are read.
            bank_dtype: See `TargetBank.build`.
            num_workers: Processes that open pictures while the bank is built.
            processes: `PartialState` or `Accelerator` when several processes share the work.
            is_shared: Every process multiplies with its share of the bank; all must then call
                `columns` together. Otherwise each has all of it and scores when it likes.
            exact_targets: Largest bank that every rollout is compared with; above, it is compared
                with its query's `CandidatePools`. None: there is no largest.
            num_candidates: See `CandidatePools`.
            audit_steps: Every so many calls of `columns` both ways are compared.
        """
        self.model, self.records = model, records
        self.query_of: Callable[[int], Item] = lambda index: records[index].query
        self.num_negatives, self.chunk_tokens = num_negatives, chunk_tokens
        self.max_negative_similarity = max_negative_similarity
        self._sharing = processes if is_shared else None
        self.targets = TargetBank(Path(directory) / "targets").build(
            [item for r in records for item in (r.positive, *r.negatives)],
            partial(embed_batch, model),
            fingerprint=Fingerprints(model).vectors,
            batch_size=batch_size,
            pools=[pool_of(r) for r in records for _ in (r.positive, *r.negatives)],
            dtype=bank_dtype,
            prepare=model.collate,
            num_workers=num_workers,
            processes=processes,
        )
        if model.device.type != "cpu":  # there the file's own pages are as good
            self.targets.keep(model.device, own_rows(len(self.targets), self._sharing))
        is_large = exact_targets is not None and len(self.targets) > exact_targets
        self.candidates = (
            CandidatePools(self.targets, num_candidates, self._sharing) if is_large else None
        )
        self._audit_steps, self._steps = audit_steps, 0
        self._positive_ids = [r.positive.content_key() for r in records]
        self.query_ids = [r.query.content_key() for r in records]
        known = FalseNegatives(zip(self.query_ids, self._positive_ids, strict=True))
        self.false_negative_ids = [
            tuple(key for key in known.of(query) if key != positive and key in self.targets.row_of)
            for query, positive in zip(self.query_ids, self._positive_ids, strict=True)
        ]

    def columns(
        self,
        indices: Sequence[int],
        completion_ids: Sequence[list[int]],
        read: tuple[Prefix, Sequence[int]] | None = None,
    ) -> dict[str, list[Any]]:
        """Return the reward columns of N rollouts, one value per rollout.

        Truncated or malformed thinks get the columns of their no-think vector, and so do direct
        answers of a policy that decides (`is_direct`), which count as complete. A query is read
        once for all its rollouts and for its no-think vector, and rollouts of one query that wrote
        the same CoT are embedded once.

        With `candidates`, at the first call and every `audit_steps` there is also
        `is_other_margin` and `is_other_rank`: whether the bank gives the rollout another one.

        Args:
            indices: Position of each rollout's record.
            completion_ids: What the policy wrote, with its end of turn.
            read: What the bare backbone has read of the queries, in "shared_prefill", and the place
                of each rollout's among them; otherwise they are read here.
        """
        usable = [self.model.completion_for_embedding(ids) for ids in completion_ids]
        is_direct = [self.model.is_direct(ids) for ids in completion_ids]
        is_complete = [bool(ids) or direct for ids, direct in zip(usable, is_direct, strict=True)]
        # The vectors of this step: every distinct query without a thought, then with each thought.
        baseline = {index: row for row, index in enumerate(dict.fromkeys(indices))}
        thoughts: dict[tuple[int, tuple[int, ...]], int] = {}
        for index, ids in zip(indices, usable, strict=True):
            if ids:
                thoughts.setdefault((index, tuple(ids)), len(baseline) + len(thoughts))
        prefix = None
        if read is not None:
            places = dict(zip(indices, read[1], strict=True))
            prefix = read[0].select([places[index] for index in baseline])
        vectors = self._embed(list(baseline), list(thoughts), prefix)
        about = [*baseline, *(index for index, _ in thoughts)]
        scored = self._similarities(vectors, about, len(baseline))
        no_think = [baseline[index] for index in indices]
        own = [
            thoughts[index, tuple(ids)] if ids else baseline[index]
            for index, ids in zip(indices, usable, strict=True)
        ]
        eos = self.model.backbone.eos_token_id
        return {
            **{name: [values[row] for row in own] for name, values in scored.items()},
            **{
                f"no_think_{name}": [values[row] for row in no_think]
                for name, values in scored.items()
                if not name.startswith("is_other")
            },
            "think_tokens": [sum(token != eos for token in ids) for ids in completion_ids],
            "is_direct": is_direct,
            "is_think_complete": is_complete,
            "embedding_variance": [self._variance(vectors[own])] * len(indices),
        }

    def _embed(
        self,
        indices: Sequence[int],
        thoughts: Sequence[tuple[int, tuple[int, ...]]],
        prefix: Prefix | None = None,
    ) -> Tensor:
        """Return unit vectors (B + N, D): of B records' queries, then of N thoughts about them.

        Pictures are encoded, and each query is read, once. Queries go through the model in chunks
        whose keys and values, once for the query and once for each of its thoughts, fit in
        `chunk_tokens`. With a prefix of the queries there is nothing left to read of them.
        """
        model = self.model
        about: dict[int, list[int]] = {index: [] for index in indices}
        for row, (index, _) in enumerate(thoughts):
            about[index].append(row)
        with model.session():
            if prefix is None:
                prompts = model.prepare(model.collate([self.query_of(i) for i in indices]))
                lengths = None if prompts.image_tokens is None else prompts.lengths()
                read = partial(model.read, prompts)
            else:
                lengths, read = prefix.attention_mask.sum(1).tolist(), prefix.select
            states = torch.empty(
                len(indices) + len(thoughts), model.hidden_size, device=model.device
            )
            for chunk in self._chunks(lengths, [about[index] for index in indices], thoughts):
                before = trim(read(chunk))
                states[chunk] = model.read_out(before)
                written = [
                    (place, row) for place, c in enumerate(chunk) for row in about[indices[c]]
                ]
                if written:
                    own = before.select([place for place, _ in written])
                    found = model.read_out(own, [thoughts[row][1] for _, row in written])
                    states[[len(indices) + row for _, row in written]] = found
        return torch.nn.functional.normalize(states, dim=-1)

    def _chunks(
        self,
        lengths: Sequence[int] | None,
        about: Sequence[Sequence[int]],
        thoughts: Sequence[tuple[int, tuple[int, ...]]],
    ) -> list[list[int]]:
        """Return rows of prompts, of `lengths` tokens, that are read together; None: all."""
        if lengths is None:  # all would be read again for each chunk
            return [list(range(len(about)))]
        costs = []
        for length, rows in zip(lengths, about, strict=True):
            longest = max((len(thoughts[row][1]) for row in rows), default=0)
            costs.append((1 + len(rows)) * (length + longest + len(self.model.readout_ids)))
        return [sorted(chunk) for chunk in pack(costs, self.chunk_tokens)]

    def _similarities(
        self, vectors: Tensor, indices: Sequence[int], num_queries: int
    ) -> dict[str, list[Any]]:
        """Return the columns of vectors about records; the first `num_queries` are baselines."""
        wanted: dict[str, Any] = {
            "num_negatives": self.num_negatives,
            "false_negative_ids": [self.false_negative_ids[i] for i in indices],
            "pools": [pool_of(self.records[i]) for i in indices],
        }
        positives = [self._positive_ids[i] for i in indices]

        def whole() -> dict[str, list[Any]]:
            return similarity_columns(
                *(vectors, positives, self.targets),
                max_negative_similarity=self.max_negative_similarity,
                processes=self._sharing,
                **wanted,
            )

        if self.candidates is None:
            return whole()
        asked = what_is_asked(vectors, positives, self.targets, **wanted)
        queries = slice(num_queries)
        self.candidates.find(indices[queries], vectors[queries], asked[queries])
        found = self.candidates.columns(
            indices, vectors, asked, self.num_negatives, self.max_negative_similarity
        )
        self._steps += 1
        if self._steps % self._audit_steps == 1 % self._audit_steps:
            found |= audit(found, whole())
        return found

    @staticmethod
    def _variance(vectors: Tensor) -> float:
        """Return 1 - |mean vector|^2: 0 when all vectors are equal, 1 when they spread out."""
        return 1.0 - float(vectors.mean(0).square().sum())
