"""Rollouts about no picture, one, several and frames: whether TRL sees what the model sees."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from late_reference import gated_lora
from made_records import picture
from short_runs import SHORT_RUN, moved, weights
from tiny_backbones import WORDS
from torch.nn.functional import log_softmax, pad

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.modeling.adapters import REASONING_ADAPTER, use_adapter
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer, freeze_scorer
from twn_rl.training.rollout_scorer import RolloutScorer


def mixed_records(folder: Path) -> RecordSet:
    """Write and load records whose queries have no picture, one, two of other shapes, or a video.

    As many pictures as records: what is counted by rows looks like what is counted by pictures.
    """
    count = 8
    for index in range(count):
        for place, size in enumerate([(64, 64), (128, 64)]):
            picture(2 * index + place, *size).save(folder / f"{index}_{place}.png")

    def query(index: int) -> Item:
        own = (f"{index}_0.png", f"{index}_1.png")
        text = f"{WORDS[5 + index]} in the picture"
        return [
            Item("find the object", text),
            Item("find the object", text, own[:1]),
            Item("find the object", text, own),
            Item("find the object", text, video=(own[0], own[0])),
        ][(0, 1, 2, 3, 0, 1, 2, 0)[index]]

    records = [
        Record(
            id=f"r{index}",
            source="test",
            query=query(index),
            positive=Item(text=f"{WORDS[5 + index]} tree"),
            negatives=(Item(images=(f"{(index + 1) % count}_0.png",)),),
            query_cot=f"{WORDS[5 + index]} left " * (1 + index % 3),
            metadata={"pool": "all", "task": "find", "hops": index % 3},
        )
        for index in range(count)
    ]
    write_records(folder / "records.jsonl", records)
    return load_records(folder / "records.jsonl")


def brevity(completions: list, *, think_tokens: list[int], **kwargs: Any) -> list[float | None]:
    """Differs between rollouts also when no think is complete, so that there is a gradient."""
    return [-count / 8 for count in think_tokens]


def grpo_trainer(model: DualLoraModel, records: RecordSet, folder: Path) -> EmbedGRPOTrainer:
    freeze_scorer(model)
    config = EmbedGRPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        gradient_accumulation_steps=4,  # one generation, shuffled and split into four
        num_generations=2,
        max_completion_length=8,
        max_steps=1,
        beta=0.0,
        temperature=1.0,
        bf16=False,
        gradient_checkpointing=False,
        **SHORT_RUN,
    )
    scorer = RolloutScorer(model, records, folder / "bank", num_negatives=3)
    return EmbedGRPOTrainer(model, [brevity], config, records, scorer)


def plain_logps(model: DualLoraModel, records: RecordSet, row: int, written: list[int]) -> Any:
    """Return the log-probabilities of one record's completion by one forward of the model."""
    batch = model.collate([records[row].query])
    ids = torch.cat([batch["input_ids"], torch.tensor([written])], 1)
    inputs = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = pad(inputs[key], (0, len(written)))
    acting = use_adapter(model.peft_model, REASONING_ADAPTER)
    if model.shares_prefill:
        acting = gated_lora(model, REASONING_ADAPTER, len(written) + 1)
    with torch.no_grad(), acting:
        logits = model.backbone.model(**inputs).logits[0, -len(written) - 1 : -1]
    return log_softmax(logits.float(), dim=-1).gather(1, torch.tensor(written)[:, None])[:, 0]


def assert_logps_are_plain(
    make: Callable[[], DualLoraModel], records: RecordSet, folder: Path
) -> None:
    """Assert that one step of GRPO computes the log-probabilities of plain forwards.

    Args:
        make: Returns the same model at each call.
        records: From `mixed_records`.
        folder: Where to run.
    """
    model = make()
    trainer = grpo_trainer(model, records, folder)
    compute = trainer._get_per_token_logps_and_entropies
    seen: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def watch(policy: Any, ids: torch.Tensor, mask: torch.Tensor, keep: int, **kwargs: Any) -> Any:
        found = compute(policy, ids, mask, keep, **kwargs)
        seen.extend(zip(ids, mask, found[0].detach(), strict=True))
        return found

    setattr(trainer, compute.__name__, watch)
    trainer.train()
    after = weights(model)
    model = make()  # as it was in every forward of the one step
    assert moved(weights(model), after)
    prompts = {
        tuple(model.collate([record.query])["input_ids"][0].tolist()): row
        for row, record in enumerate(records)
    }
    assert len(seen) == 16
    rows: set[int] = set()
    for ids, mask, logps in seen:
        real = ids[mask.bool()].tolist()
        length = int(mask[: len(mask) - len(logps)].sum())
        row = prompts[tuple(real[:length])]  # what TRL tokenized is what the model embeds
        expected = plain_logps(model, records, row, real[length:])
        torch.testing.assert_close(logps[: len(expected)], expected, rtol=0, atol=1e-5)
        rows.add(row)
    counts = {len(records[row].query.images) + len(records[row].query.video) for row in rows}
    assert counts == {0, 1, 2}
