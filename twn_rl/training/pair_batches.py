"""Records -> the tensors of one contrastive step, whole or in chunks.

Knows no losses; every distinct target of a batch is rendered once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from twn_rl.data.record import Item, Record
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.chunking import Chunk, Chunks, join_prompts, num_patches, pack
from twn_rl.training.losses import key_ids


class RecordDataset(Dataset):
    """Records by index; pictures stay on disk until a batch is collated."""

    def __init__(self, records: Sequence[Record]) -> None:
        """Hold the records."""
        self.records = records

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def __getitem__(self, index: int) -> Record:
        """Return one record with image paths."""
        return self.records[index]


class SftCollator:
    """Records -> the tensors of one step. Every distinct target is encoded once."""

    def __init__(
        self,
        model: DualLoraModel,
        *,
        num_hard_negatives: int,
        has_targets: bool = True,
        chunk_tokens: int | None = None,
    ) -> None:
        """Keep what renders and tokenizes.

        Args:
            model: Whose prompts they are.
            num_hard_negatives: Listed negatives per query.
            has_targets: Without them there is only the token loss.
            chunk_tokens: Cut the batch into chunks of so many tokens; None leaves it whole.
        """
        self.model = model
        self.num_hard_negatives = num_hard_negatives
        self.has_targets = has_targets
        self.chunk_tokens = chunk_tokens

    def __call__(self, records: list[Record]) -> dict[str, Any]:
        """Return prompts, CoT ids with and without end of turn, and the distinct targets.

        `target_rows` (N * (1 + k),) points into the distinct targets: the N positives, then the
        negatives; the same number on every process, so that vectors can be gathered. `target_keys`
        (as `target_rows`) and `query_keys` (N,) are int64 content keys, equal for equal content.
        `has_cot` (N,) is True where the record's query has a CoT; the others learn directly.

        With `chunk_tokens` there are `chunks` of kinds "query" and "target" in place of prompts and
        CoT ids.
        """
        cots = [self._completion(record.query_cot) for record in records]
        eos = self.model.backbone.eos_token_id
        taught = [[*ids, eos] if ids else [] for ids in cots]
        queries = [record.query for record in records]
        if not self.has_targets:
            return {
                "query": self.model.collate(queries),
                "taught": self.model.collate_completions(taught),
            }
        targets, target_cots, shared = self._targets(records)
        if self.chunk_tokens is not None:
            chunks = {
                "query": self.cut(queries, {"think": cots, "taught": taught}),
                "target": self.cut(targets, {"think": target_cots}),
            }
            return {**shared, "chunks": Chunks(chunks)}
        return {
            "query": self.model.collate(queries),
            "taught": self.model.collate_completions(taught),
            "think": self.model.collate_completions(cots),
            "target": self.model.collate(targets),
            "target_think": self.model.collate_completions(target_cots),
            **shared,
        }

    def _targets(
        self, records: list[Record]
    ) -> tuple[list[Item], list[list[int]], dict[str, Tensor]]:
        """Return the distinct targets, their CoT ids, and what losses must know of the batch."""
        positives = [(record.positive, record.positive_cot) for record in records]
        negatives = [(item, None) for record in records for item in self._negatives(record)]
        distinct: dict[tuple[Item, str | None], int] = {}
        rows = [distinct.setdefault(target, len(distinct)) for target in [*positives, *negatives]]
        keys = key_ids([content_key(item) for item, _ in distinct])
        target_cots = [self._completion(cot) for _, cot in distinct]
        shared = {
            "has_target_cot": torch.tensor([any(target_cots)]),
            "target_rows": torch.tensor(rows),
            "target_keys": keys[rows],
            "query_keys": key_ids([content_key(record.query) for record in records]),
            "has_cot": torch.tensor([record.query_cot is not None for record in records]),
        }
        return [item for item, _ in distinct], target_cots, shared

    def cut(
        self, items: Sequence[Item], completions: Mapping[str, Sequence[list[int]]]
    ) -> list[Chunk]:
        """Return the chunks of some items and of what is written after each of them."""
        assert self.chunk_tokens is not None
        backbone = self.model.backbone
        alone: list[Any] = [self.model.collate([item]) for item in items]
        tail = len(self.model.readout_ids) + len(self.model.reason_ids)
        lengths = [
            batch["input_ids"].shape[1] + tail + max(len(ids[row]) for ids in completions.values())
            for row, batch in enumerate(alone)
        ]
        patches = [num_patches(backbone, batch) for batch in alone]
        chunks = []
        for rows in pack(lengths, self.chunk_tokens, patches):
            prompt = join_prompts(backbone, [alone[row] for row in rows])
            for row in rows:
                alone[row] = None  # or the pictures of the whole batch would be there twice
            written = {
                name: self.model.collate_completions([ids[row] for row in rows])
                for name, ids in completions.items()
            }
            chunks.append(Chunk(torch.tensor(rows), prompt, written))
        return chunks

    def _completion(self, cot: str | None) -> list[int]:
        return [] if cot is None else self.model.completion_ids(self.model.renderer.completion(cot))

    def _negatives(self, record: Record) -> list[Item]:
        """Return k negatives; short lists repeat, empty ones repeat the positive (masked later)."""
        if not self.num_hard_negatives:
            return []
        pool = list(record.negatives) or [record.positive]
        start = int(content_key(record.query)[:8], 16) % len(pool)
        return [pool[(start + i) % len(pool)] for i in range(self.num_hard_negatives)]


@lru_cache(maxsize=200_000)
def content_key(item: Item) -> str:
    """Return an item's content key; a picture file is read once."""
    return item.content_key()
