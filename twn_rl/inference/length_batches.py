"""Items -> batches of like length, pictures opened, texts cut to fit. Runs no model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from twn_rl.data.chat import Renderer
from twn_rl.data.images import ImageError
from twn_rl.data.record import Item
from twn_rl.inference.inputs import InputError
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.collator import collate_opened, cut_item
from twn_rl.modeling.limits import PromptLengthError, PromptLimits

# A picture fills some hundred tokens in most backbones; only the order of the batches depends on
# it, no result does.
_CHARACTERS_PER_PICTURE = 1000


@dataclass
class Row:
    """One input on its way through a batch."""

    position: int
    item: Item


def in_batches(items: Sequence[Item | None], batch_size: int) -> Iterator[list[Row]]:
    """Yield batches of like length, longest first, so that memory runs out early or not at all.

    Positions without an item are left out.
    """
    rows = [Row(position, item) for position, item in enumerate(items) if item is not None]
    rows.sort(key=lambda row: -length_estimate(row.item))
    for start in range(0, len(rows), batch_size):
        yield rows[start : start + batch_size]


def length_estimate(item: Item) -> int:
    """Return a number that grows with the tokens of an item; reads nothing."""
    pictures = len(item.images) + len(item.video)
    text = len(item.instruction or "") + len(item.text or "")
    return text + _CHARACTERS_PER_PICTURE * pictures


def open_pictures(row: Row, limits: PromptLimits) -> Row:
    """Return the row with its pictures decoded and, if too large, scaled down.

    Raises:
        InputError: If one cannot be.
    """
    try:
        return Row(row.position, limits.open(row.item))
    except ImageError as error:
        raise InputError(row.position, str(error)) from error


def collate_rows(
    backbone: Backbone, renderer: Renderer, rows: Sequence[Row], limits: PromptLimits
) -> tuple[dict[str, Tensor], list[Row], list[int], list[InputError]]:
    """Return a batch whose prompts fit; only texts are cut, at their ends, never image tokens.

    Returns:
        The batch; its rows, with texts as they were embedded; the positions of those cut; and one
        error for each row that is left out: it does not fit even without its text, or the
        processor refuses it. The batch is empty if no row is left.
    """
    kept, cut, errors = list(rows), set[int](), list[InputError]()
    while kept:
        try:
            batch = collate_opened(backbone, renderer, [row.item for row in kept])
        except ValueError:
            kept, refused = _without_refused(backbone, renderer, kept)
            errors += refused
            continue
        lengths = batch["attention_mask"].sum(1).tolist()
        if not any(limits.is_too_long(tokens) for tokens in lengths):
            limits.count_prompts(len(kept), len(cut))
            return batch, kept, sorted(cut), errors
        fitted: list[Row] = []
        for row, tokens in zip(kept, lengths, strict=True):
            if not limits.is_too_long(tokens):
                fitted.append(row)
                continue
            try:
                item = cut_item(backbone, renderer, row.item, tokens, limits)
            except PromptLengthError as error:
                errors.append(InputError(row.position, str(error)))
            else:
                fitted.append(Row(row.position, item))
                cut.add(row.position)
        kept = fitted
    return {}, [], [], errors


def _without_refused(
    backbone: Backbone, renderer: Renderer, rows: Sequence[Row]
) -> tuple[list[Row], list[InputError]]:
    """Return the rows a processor accepts by themselves, and what it says of the others.

    It refuses, say, pictures of extreme shape, and does not tell whose.
    """
    accepted, refused = [], []
    for row in rows:
        try:
            collate_opened(backbone, renderer, [row.item])
            accepted.append(row)
        except ValueError as error:
            problem = f"the processor refuses it ({error}); expected what it can read; change it"
            refused.append(InputError(row.position, problem))
    if not refused:
        collate_opened(backbone, renderer, [row.item for row in rows])  # raises what it said
    return accepted, refused
