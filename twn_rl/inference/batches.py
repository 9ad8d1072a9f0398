"""Items -> batches of like length, pictures opened, texts cut to fit; items by their positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from torch import Tensor

from twn_rl.data.chat import Renderer
from twn_rl.data.images import ImageError
from twn_rl.data.record import Item
from twn_rl.inference.inputs import InputError
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.collator import collate_opened, cut_item, fit_prompts
from twn_rl.modeling.limits import PromptLengthError, PromptLimits


def in_batches(items: Sequence[Item | None], batch_size: int) -> Iterator[dict[int, Item]]:
    """Yield batches of like length, longest first, so that memory runs out early or not at all.

    Positions without an item are left out.
    """
    rows = [(position, item) for position, item in enumerate(items) if item is not None]
    rows.sort(key=lambda row: -row[1].length_estimate())
    for start in range(0, len(rows), batch_size):
        yield dict(rows[start : start + batch_size])


def collate_usable(
    backbone: Backbone,
    renderer: Renderer,
    items: Mapping[int, Item],
    limits: PromptLimits,
    *,
    open_item: Callable[[Item], Item] | None = None,
) -> tuple[dict[str, Tensor], dict[int, Item], list[InputError]]:
    """Return a batch whose prompts fit; only texts are cut, at their ends, never image tokens.

    `open_item` stands in for `limits.open` where pictures have been opened before.

    Returns:
        The batch; its items as they were embedded; and one error for each that is left out: a
        picture cannot be opened, it does not fit even without its text, or the processor refuses
        it. The batch is empty if no item is left.
    """
    errors: list[InputError] = []
    while items:
        try:
            values = list(items.values())
            batch, fitted = fit_prompts(backbone, renderer, values, limits, open_item=open_item)
        except ValueError:
            refused = [_problem(backbone, renderer, *row, limits) for row in items.items()]
            found = [error for error in refused if error is not None]
            if not found:  # it is none of them by itself
                raise
            errors += found
            bad = {error.position for error in found}
            items = {position: item for position, item in items.items() if position not in bad}
        else:
            return batch, dict(zip(items, fitted, strict=True)), errors
    return {}, {}, errors


def _problem(
    backbone: Backbone, renderer: Renderer, position: int, item: Item, limits: PromptLimits
) -> InputError | None:
    """Return why an item cannot be read; a processor that refuses a batch does not tell whose."""
    try:
        opened = limits.open(item)
        tokens = int(collate_opened(backbone, renderer, [opened])["attention_mask"].sum())
        if limits.is_too_long(tokens):
            cut_item(backbone, renderer, opened, tokens, limits)
    except (ImageError, PromptLengthError) as error:
        return InputError(position, str(error))
    except ValueError as error:
        problem = f"the processor refuses it ({error}); expected what it can read; change it"
        return InputError(position, problem)
    return None
