"""Items and completions -> padded tensors, with one processor call."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.limits import PromptLengthError, PromptLimits, item_name

Completion = str | Sequence[int] | None


def collate_prompts(
    backbone: Backbone,
    renderer: Renderer,
    items: Sequence[Item],
    *,
    limits: PromptLimits | None = None,
) -> dict[str, Tensor]:
    """Return left-padded prompts and their pixels.

    Args:
        backbone: Whose processor to use.
        renderer: How items become messages.
        items: N items; images may be PIL images or paths.
        limits: What to cut texts and scale pictures to; None is unlimited.

    Returns:
        `input_ids`, `attention_mask` (N, P) and the processor's other tensors.

    Raises:
        ValueError: If a prompt is too long even without its text.
    """
    return fit_prompts(backbone, renderer, items, limits or PromptLimits())[0]


def fit_item(backbone: Backbone, renderer: Renderer, item: Item, limits: PromptLimits) -> Item:
    """Return what `collate_prompts` shows of an item: pictures opened and scaled, text cut.

    Raises:
        ValueError: If its prompt is too long even without its text.
    """
    return fit_prompts(backbone, renderer, [item], limits)[1][0]


def fit_prompts(
    backbone: Backbone,
    renderer: Renderer,
    items: Sequence[Item],
    limits: PromptLimits,
    *,
    open_item: Callable[[Item], Item] | None = None,
) -> tuple[dict[str, Tensor], list[Item]]:
    """Return the prompts of items within the limits, and those items.

    `open_item` stands in for `limits.open` where pictures have been opened before.
    """
    if not items:
        raise ValueError("items is empty; expected at least one item; skip empty batches")
    fitted = [(open_item or limits.open)(item) for item in items]
    batch = collate_opened(backbone, renderer, fitted)
    lengths = batch["attention_mask"].sum(1).tolist()
    too_long = [row for row, tokens in enumerate(lengths) if limits.is_too_long(tokens)]
    for row in too_long:
        try:
            fitted[row] = cut_item(backbone, renderer, fitted[row], lengths[row], limits)
        except PromptLengthError as error:
            name = item_name(items[row], shows_texts=limits.shows_texts)
            raise error.of(f"item {row} ({name})") from error
    if too_long:
        batch = collate_opened(backbone, renderer, fitted)
    example = ""
    if too_long:
        example = item_name(items[too_long[0]], shows_texts=limits.shows_texts)
    limits.count_prompts(len(items), len(too_long), example)
    return batch, fitted


def cut_item(
    backbone: Backbone, renderer: Renderer, item: Item, tokens: int, limits: PromptLimits
) -> Item:
    """Return an opened item with its text cut at its end, between tokens, so that its prompt fits.

    As many of the text's last tokens go as its prompt of `tokens` has too many. What is kept
    depends on the item alone, never on its batch.

    Raises:
        PromptLengthError: If it does not fit without its text either, or is nothing without it.
    """
    while limits.max_length is not None and tokens > limits.max_length:
        shorter = _shorter(backbone, item, tokens - limits.max_length)
        if shorter is None:
            raise PromptLengthError(tokens, limits.max_length)
        item = shorter
        tokens = int(collate_opened(backbone, renderer, [item])["attention_mask"].sum())
    return item


def _shorter(backbone: Backbone, item: Item, excess_tokens: int) -> Item | None:
    """Return the item with about `excess_tokens` less text, or None if there is no text to cut."""
    if not item.text:
        return None
    if backbone.tokenizer.is_fast:
        encoded = backbone.tokenizer(
            item.text, add_special_tokens=False, return_offsets_mapping=True
        )
        ends = [end for _, end in encoded["offset_mapping"]]
        end = ends[-1 - excess_tokens] if excess_tokens < len(ends) else 0
    else:
        ids = backbone.tokenizer(item.text, add_special_tokens=False)["input_ids"]
        end = len(backbone.tokenizer.decode(ids[: max(0, len(ids) - excess_tokens)]))
    text = item.text[: min(end, len(item.text) - 1)]
    if text.strip():
        return replace(item, text=text)
    # An instruction by itself is nothing to be embedded.
    return replace(item, text=None) if item.images or item.video else None


def collate_opened(
    backbone: Backbone, renderer: Renderer, items: Sequence[Item]
) -> dict[str, Tensor]:
    """Return left-padded prompts of items as they are, their pictures opened; no limits."""
    markup = backbone.markup(renderer)
    texts = [
        backbone.processor.apply_chat_template(
            renderer.messages(item, is_multimodal=backbone.is_multimodal, markup=markup),
            tokenize=False,
            add_generation_prompt=True,
        )
        for item in items
    ]
    return _process(backbone, texts, [renderer.images(item) for item in items])


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


def cut_behind(backbone: Backbone, ids: Sequence[int], mark: str) -> list[int]:
    """Return ids up to the first `mark`, which stays; all of them if it is not in their text.

    What a policy writes behind its thought is not the thought, and must not reach a vector. A token
    that holds the end of the mark and more is replaced by those of the mark's end.
    """
    ids = [int(token_id) for token_id in ids]

    def text_of(count: int) -> str:
        return backbone.tokenizer.decode(ids[:count], skip_special_tokens=False)

    counts = range(len(ids) + 1)
    count = bisect_left(counts, True, key=lambda count: mark in text_of(count))
    if count == len(counts):
        return ids
    text = text_of(count)
    end = text.index(mark) + len(mark)
    if end == len(text):
        return ids[:count]
    return [*ids[: count - 1], *completion_ids(backbone, text[len(text_of(count - 1)) : end])]
