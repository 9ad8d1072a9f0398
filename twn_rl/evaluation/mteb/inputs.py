"""mteb's batches of columns -> items, and which instruction a task gives.

Texts arrive as mteb composed them (title and body, query and its own instruction), pictures as
images, lists of images or references, videos as tensors of frames.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mteb.abstasks.abstask import get_abstask_prompt
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.types import PromptType
from PIL import Image

from twn_rl.data.images import ImageSource
from twn_rl.data.markup import unusable_character, without_unusable
from twn_rl.data.record import Item
from twn_rl.evaluation.usage import Usage

# Corpora hold empty documents; they need a vector, and every model reads a full stop.
BLANK_TEXT = "."


def task_instruction(metadata: TaskMetadata, prompt_type: PromptType | None) -> str | None:
    """Return what an input of a task is to be embedded for; None for no instruction.

    Inputs of a symmetric task count as queries. A task without a prompt of its own has that of its
    kind. Documents get an instruction only from a task that words one for documents.
    """
    prompt = metadata.prompt
    is_document = prompt_type == PromptType.document
    if isinstance(prompt, Mapping):
        wanted = PromptType.document if is_document else PromptType.query
        return prompt.get(wanted.value) or None
    if is_document:
        return None
    return prompt or get_abstask_prompt(metadata.name) or None


@dataclass
class Reader:
    """Makes items of batches.

    Attributes:
        instruction: For every input.
        open_picture: Reference -> picture, for tasks that name pictures instead of holding them.
        usage: Where repaired inputs are counted.
    """

    instruction: str | None
    open_picture: Callable[[str], ImageSource] | None
    usage: Usage

    def items(self, batch: Mapping[str, Any]) -> list[Item]:
        """Return the items of one batch, in its order.

        Raises:
            ValueError: For a batch without text, image and video.
        """
        columns = [name for name in ("text", "image", "video") if name in batch]
        if not columns:
            raise ValueError(
                f"a batch has columns {sorted(batch)}; expected text, image or video; run the "
                "benchmark with a model of the modality it needs"
            )
        count = len(batch[columns[0]])
        none: Sequence[Any] = [None] * count
        texts, images, videos = (batch.get(name, none) for name in ("text", "image", "video"))
        return [self._item(*cells) for cells in zip(texts, images, videos, strict=True)]

    def _item(self, text: Any, image: Any, video: Any) -> Item:
        text = self._usable("" if text is None else str(text))
        pictures = image if isinstance(image, list | tuple) else [image]
        images = tuple(self._picture(cell) for cell in pictures if cell is not None)
        frames = () if video is None else tuple(_frames(video))
        if not text.strip() and not images and not frames:
            text = BLANK_TEXT
            self.usage.blank += 1
        return Item(self.instruction, text if text.strip() else None, images, frames)

    def _usable(self, text: str) -> str:
        found = unusable_character(text)
        self.usage.characters_removed += found is not None
        return text if found is None else without_unusable(text)

    def _picture(self, cell: Any) -> ImageSource:
        return self.open_picture(cell) if self.open_picture and isinstance(cell, str) else cell


def _frames(video: Any) -> list[Image.Image]:
    """Return the pictures of frames (T, 3, H, W) uint8, or of a list of pictures."""
    if isinstance(video, torch.Tensor):
        return [Image.fromarray(frame.permute(1, 2, 0).cpu().numpy()) for frame in video]
    return list(video)
