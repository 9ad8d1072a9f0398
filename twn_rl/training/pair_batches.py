"""Records -> the tensors of one contrastive step, whole or in chunks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from twn_rl.data.record import Item, Record
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.chunking import Chunk, Chunks, join_prompts, num_patches, pack
from twn_rl.training.losses import key_ids

if TYPE_CHECKING:
    from twn_rl.training.latent import LatentConfig

Written = Mapping[str, Sequence[list[int]]]


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
        """Keep what renders and tokenizes; without targets there is only the token loss.

        Batches are cut into chunks of `chunk_tokens`, unless it is None.
        """
        self.model, self.has_targets = model, has_targets
        self.num_hard_negatives, self.chunk_tokens = num_hard_negatives, chunk_tokens

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
            return self._whole({"query": (queries, {"taught": taught})})
        targets, target_cots, shared = self._targets(records)
        query: Written = {"taught": taught, "think": cots}
        return {**shared, **self._tensors(queries, query, targets, {"target_think": target_cots})}

    def _tensors(
        self, queries: list[Item], written: Written, targets: list[Item], target_written: Written
    ) -> dict[str, Any]:
        """Return prompts and what is written after them, by name: whole, or as `chunks`."""
        kinds = {"query": (queries, written), "target": (targets, target_written)}
        if self.chunk_tokens is None:
            return self._whole(kinds)
        return {"chunks": Chunks({kind: self._cut(*each) for kind, each in kinds.items()})}

    def _whole(self, kinds: Mapping[str, tuple[list[Item], Written]]) -> dict[str, Any]:
        batch: dict[str, Any] = {}
        for kind, (items, written) in kinds.items():
            batch[kind] = self.model.collate(items)
            batch |= {name: self.model.collate_completions(ids) for name, ids in written.items()}
        return batch

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

    def _cut(self, items: Sequence[Item], written: Written) -> list[Chunk]:
        """Return the chunks of some items and of what is written after each of them."""
        assert self.chunk_tokens is not None
        backbone = self.model.backbone
        alone: list[Any] = [self.model.collate([item]) for item in items]
        tail = len(self.model.readout_ids) + len(self.model.reason_ids)
        lengths = [
            batch["input_ids"].shape[1]
            + tail
            + max((len(ids[row]) for ids in written.values()), default=0)
            for row, batch in enumerate(alone)
        ]
        patches = [num_patches(backbone, batch) for batch in alone]
        chunks = []
        for rows in pack(lengths, self.chunk_tokens, patches):
            prompt = join_prompts(backbone, [alone[row] for row in rows])
            for row in rows:
                alone[row] = None  # or the pictures of the whole batch would be there twice
            completions = {
                name: self.model.collate_completions([ids[row] for row in rows])
                for name, ids in written.items()
            }
            chunks.append(Chunk(torch.tensor(rows), prompt, completions))
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


class LatentCollator(SftCollator):
    """Records -> queries, distinct targets, and the words of each query's target."""

    def __init__(self, model: DualLoraModel, args: LatentConfig, *, is_cut: bool = False) -> None:
        """Keep what renders and tokenizes; `is_cut` makes chunks if the settings ask for them."""
        super().__init__(
            model,
            num_hard_negatives=args.num_hard_negatives,
            chunk_tokens=args.contrastive_chunk_tokens if is_cut else None,
        )
        self.caption_field, self.max_tokens = args.caption_field, args.max_target_tokens

    def __call__(self, records: list[Record]) -> dict[str, Any]:
        """Return `query`, `target`, `target_rows`, keys as `SftCollator`, and the `text`."""
        bare = [replace(record, query_cot=None, positive_cot=None) for record in records]
        targets, _, shared = self._targets(bare)
        shared = {key: shared[key] for key in ("target_rows", "target_keys", "query_keys")}
        eos = self.model.backbone.eos_token_id
        words = []
        for record in records:
            text = target_text(record, self.caption_field)
            ids = self.model.completion_ids(text)[: self.max_tokens - 1] if text else []
            words.append([*ids, eos] if ids else [])
        queries = [record.query for record in records]
        return {**shared, **self._tensors(queries, {"text": words}, targets, {})}


def target_text(record: Record, caption_field: str) -> str | None:
    """Return what a target says: its text, else `metadata[caption_field]`, else None.

    Raises:
        ValueError: If the caption is no string.
    """
    if record.positive.text:
        return record.positive.text
    caption = record.metadata.get(caption_field)
    if caption is not None and not isinstance(caption, str):
        raise ValueError(
            f"record {record.id!r}: metadata[{caption_field!r}] = {caption!r}; expected a string; "
            "correct it or set caption_field"
        )
    return caption or None


def check_texts(records: Sequence[Record], caption_field: str) -> None:
    """Refuse records whose target the head could only regress on.

    Raises:
        ValueError: With the first such record.
    """
    for record in records:
        if target_text(record, caption_field) is None:
            raise ValueError(
                f"record {record.id!r}: the target has no text and metadata[{caption_field!r}] is "
                "missing, with regression_weight = 0; expected words to reconstruct; add a caption "
                "or set regression_weight > 0 to regress on the target's vector"
            )


@lru_cache(maxsize=200_000)
def content_key(item: Item) -> str:
    """Return an item's content key; a picture file is read once."""
    return item.content_key()
