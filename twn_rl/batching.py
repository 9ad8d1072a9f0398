"""Items and completions -> padded tensors, with one processor call. Knows no model weights."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from twn_rl.backbone import Backbone
from twn_rl.records import Item
from twn_rl.templates import Renderer

Completion = str | Sequence[int] | None


def prompt_texts(backbone: Backbone, renderer: Renderer, items: Sequence[Item]) -> list[str]:
    """Return the prompt of each item, rendered by the backbone's chat template."""
    return [
        backbone.processor.apply_chat_template(
            renderer.messages(item, is_multimodal=backbone.is_multimodal),
            tokenize=False,
            add_generation_prompt=True,
        )
        for item in items
    ]


def collate_prompts(
    backbone: Backbone, renderer: Renderer, items: Sequence[Item], *, max_length: int | None = None
) -> dict[str, Tensor]:
    """Return left-padded prompts and their pixels.

    Args:
        backbone: Whose processor to use.
        renderer: How items become messages.
        items: N items; images may be PIL images or paths.
        max_length: Largest prompt, in tokens, image tokens included; None is unlimited.

    Returns:
        `input_ids`, `attention_mask` (N, P) and the processor's other tensors.

    Raises:
        ValueError: If a prompt is longer than `max_length`. Cutting it would cut image tokens or
            the end of the turn, so the caller must shorten the item.
    """
    if not items:
        raise ValueError("items is empty; expected at least one item; skip empty batches")
    loaded = [item.load() for item in items]
    texts = prompt_texts(backbone, renderer, loaded)
    batch = _process(backbone, texts, [renderer.images(item) for item in loaded])
    lengths = batch["attention_mask"].sum(1)
    if max_length is not None and int(lengths.max()) > max_length:
        worst = int(lengths.argmax())
        raise ValueError(
            f"prompt of item {worst} has {int(lengths[worst])} tokens; expected at most "
            f"max_length = {max_length}; shorten its text, shrink its images or raise max_length"
        )
    return batch


def _process(backbone: Backbone, texts: list[str], images: list[list[Any]]) -> dict[str, Tensor]:
    bos = backbone.tokenizer.bos_token
    options: dict[str, Any] = {
        "padding": True,
        "return_tensors": "pt",
        # The template has written the special tokens; only some processors leave BOS to themselves.
        "add_special_tokens": backbone.is_multimodal and not (bos and texts[0].startswith(bos)),
    }
    if not backbone.is_multimodal:
        return dict(backbone.tokenizer(texts, **options, return_token_type_ids=False))
    if any(images):
        options["images"] = images
    return dict(backbone.processor(text=texts, **options))


def collate_completions(backbone: Backbone, completions: Sequence[Completion]) -> dict[str, Tensor]:
    """Return right-padded `completion_ids` and `completion_mask` (N, C), C >= 1.

    Strings are tokenized as they are, without special tokens or end of turn; id lists are taken as
    they are; None and empty ones give rows whose mask is all 0.
    """
    rows = [completion_ids(backbone, completion) for completion in completions]
    width = max(1, *(len(row) for row in rows))
    ids = torch.full((len(rows), width), backbone.tokenizer.pad_token_id, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row, dtype=torch.long)
        mask[index, : len(row)] = 1
    return {"completion_ids": ids, "completion_mask": mask}


def completion_ids(backbone: Backbone, completion: Completion) -> list[int]:
    """Return the token ids of one completion; see `collate_completions`."""
    if completion is None:
        return []
    if isinstance(completion, str):
        encoded = backbone.tokenizer(completion, add_special_tokens=False)
        return list(encoded["input_ids"])
    return [int(token_id) for token_id in completion]
