"""How much of an item a model is shown: pictures scaled down, text cut.

Stored with the model, so that training, target banks, rollouts, gates, evaluation and serving see
the same prompt. `collator` applies the limits; content keys are of the item before that.
"""

from __future__ import annotations

import logging
import threading
from dataclasses import dataclass, field, replace

import torch

from twn_rl.data.images import ImageSource, open_image, shrink_image
from twn_rl.data.record import Item
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.config import TwnConfig

logger = logging.getLogger(__name__)

_COUNTED = ("prompts", "cut_texts", "pictures", "resized_pictures")
_SHOWN_CHARACTERS = 60
_ADDING = threading.Lock()


class PromptLengthError(ValueError):
    """A prompt that is too long even without its text: instruction and pictures are never cut."""

    def __init__(self, tokens: int, max_length: int) -> None:
        """Compose the message from the tokens left and the tokens allowed."""
        super().__init__(
            f"prompt has {tokens} tokens and no more text to cut; expected at most max_length = "
            f"{max_length}; lower max_image_pixels, drop pictures or shorten the instruction, or "
            "raise max_length (in serving max_seq_length)"
        )
        self.tokens, self.max_length = tokens, max_length

    def of(self, name: str) -> ValueError:
        """Return the error with the item it is about."""
        return ValueError(str(self).replace("prompt has", f"prompt of {name} has", 1))


class LimitCounts:
    """What the limits did so far; worker processes of a data loader count into the same numbers.

    The first cut and the first resize of a process are logged as warnings.
    """

    def __init__(self) -> None:
        """Start at zero."""
        self._totals = torch.zeros(len(_COUNTED), dtype=torch.long).share_memory_()
        self._taken = self._totals.clone()

    def add(self, name: str, count: int = 1) -> int:
        """Count prompts, cut_texts, pictures or resized_pictures; return how many were before."""
        with _ADDING:  # pictures are opened on several threads
            before = int(self._totals[_COUNTED.index(name)])
            self._totals[_COUNTED.index(name)] += count
        return before

    def totals(self) -> dict[str, int]:
        """Return `prompts`, `cut_texts`, `pictures` and `resized_pictures` since the beginning."""
        return dict(zip(_COUNTED, self._totals.tolist(), strict=True))

    def take_ratios(self) -> dict[str, float]:
        """Return `cut_texts_ratio` and `resized_pictures_ratio`, in [0, 1], since the last call."""
        now = self._totals.clone()
        prompts, cut, pictures, resized = (now - self._taken).tolist()
        self._taken = now
        return {
            "cut_texts_ratio": cut / max(1, prompts),
            "resized_pictures_ratio": resized / max(1, pictures),
        }


@dataclass(frozen=True)
class PromptLimits:
    """The limits of a model's prompts.

    Attributes:
        max_length: Longest prompt in tokens, picture tokens included; None is unlimited.
        max_image_pixels: Largest picture or video frame in pixels; None is unlimited.
        counts: What they did.
        shows_texts: Whether messages name an item by the beginning of its text; not in a server,
            whose texts are its clients'.
    """

    max_length: int | None = None
    max_image_pixels: int | None = None
    counts: LimitCounts = field(default_factory=LimitCounts, compare=False)
    shows_texts: bool = True

    def open(self, item: Item) -> Item:
        """Return the item with its pictures opened, RGB, none above `max_image_pixels`.

        Raises:
            ImageError: If a picture is missing or cannot be decoded.
        """
        if not item.images and not item.video:
            return item
        return replace(
            item,
            images=tuple(self._opened(source) for source in item.images),
            video=tuple(self._opened(source) for source in item.video),
        )

    def _opened(self, source: ImageSource) -> ImageSource:
        image = open_image(source)
        fitted = shrink_image(image, self.max_image_pixels)
        self.counts.add("pictures")
        if fitted is not image and not self.counts.add("resized_pictures"):
            logger.warning(
                "a picture of %d x %d pixels is shown as %d x %d: max_image_pixels = %s; later "
                "ones are counted only",
                *(*image.size, *fitted.size, self.max_image_pixels),
            )
        return fitted

    def is_too_long(self, tokens: int) -> bool:
        """Return whether a prompt of so many tokens must be cut."""
        return self.max_length is not None and tokens > self.max_length

    def count_prompts(self, prompts: int, cut_texts: int, example: str = "") -> None:
        """Count prompts, and warn of the first one that was cut, unless `example` is empty."""
        if cut_texts and example and not self.counts.totals()["cut_texts"]:
            logger.warning(
                "the text of %s is cut at its end: its prompt is longer than max_length = %s "
                "tokens; later ones are counted only",
                *(example, self.max_length),
            )
        self.counts.add("prompts", prompts)
        self.counts.add("cut_texts", cut_texts)


def item_name(item: Item, *, shows_texts: bool = True) -> str:
    """Return how messages name an item: the beginning of its text and its pictures' files.

    Without `shows_texts` only how long its text is.
    """
    text = item.text or item.instruction or ""
    if not shows_texts:
        return f"an item of {len(text)} characters"
    shown = [f"{text[:_SHOWN_CHARACTERS]!r}" + "..." * (len(text) > _SHOWN_CHARACTERS)]
    pictures = [*item.images, *item.video]
    if pictures:
        files = [source for source in pictures if isinstance(source, str)]
        shown.append(f"{len(pictures)} pictures" + (f", first {files[0]!r}" if files else ""))
    return ", ".join(shown)


def context_tokens(backbone: Backbone) -> int | None:
    """Return the positions the backbone has; None if it does not say."""
    text_config = backbone.model.config.get_text_config(decoder=True)
    return getattr(text_config, "max_position_embeddings", None)


def prompt_room(
    backbone: Backbone, config: TwnConfig, max_think_tokens: int | None = None
) -> int | None:
    """Return the tokens the backbone's context leaves for a prompt; None if it names no limit.

    Args:
        backbone: The backbone.
        config: How many read-out and reason tokens follow.
        max_think_tokens: Longest thought; the config's if None.

    Raises:
        ValueError: If nothing is left.
    """
    context = context_tokens(backbone)
    if context is None:
        return None
    think_tokens = max_think_tokens or config.max_think_tokens
    room = context - think_tokens - config.num_readout_tokens - config.num_reason_tokens
    if room < 1:
        raise ValueError(
            f"max_think_tokens = {think_tokens} in a context of {context} tokens leaves no "
            "room for a prompt; expected a shorter thought; lower max_think_tokens"
        )
    return room


def settle_limits(backbone: Backbone, config: TwnConfig) -> TwnConfig:
    """Return the config with `max_length` at most what the backbone's context leaves for a prompt.

    A number settled once, and stored, means the same in training as in serving.
    """
    if config.max_length is None:
        return config
    room = prompt_room(backbone, config)
    if room is None or room >= config.max_length:
        return config
    logger.info("max_length = %d is lowered to %d: the context", config.max_length, room)
    return replace(config, max_length=room)
