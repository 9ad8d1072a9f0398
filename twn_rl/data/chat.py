"""Item -> chat messages, chain of thought -> completion text and back.

One renderer serves training, rollouts, evaluation and serving, and is saved with the model: the
text a model was trained on is the text it is served with.
"""

from dataclasses import asdict, dataclass, fields
from typing import Any

from twn_rl.data.images import ImageSource
from twn_rl.data.markup import THINK_MARKERS, Markup
from twn_rl.data.record import Item

# For text-only tokenizers that ship no chat template of their own.
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "Assistant:\n{{ message['content'] }}{{ eos_token or '' }}\n"
    "{% else %}"
    "{{ message['role'].capitalize() }}:\n{{ message['content'] }}\n"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:\n{% endif %}"
)


@dataclass(frozen=True)
class Renderer:
    """How an item becomes a prompt and a chain of thought (CoT) becomes a completion.

    Attributes:
        system_prompt: Text of a leading system message; None leaves the message out.
        instruction_in_system: Put an item's instruction into the system message, in place of
            `system_prompt`, as embedders of the Qwen-VL family were trained.
        think_open: Marker that opens a CoT.
        think_close: Marker that closes a CoT.
    """

    system_prompt: str | None = None
    think_open: str = THINK_MARKERS[0]
    think_close: str = THINK_MARKERS[1]
    instruction_in_system: bool = False

    def __post_init__(self) -> None:
        """Refuse markers that `parse_think` could not tell apart."""
        if not self.think_open.strip() or not self.think_close.strip():
            raise ValueError(
                f"think_open = {self.think_open!r}, think_close = {self.think_close!r}; expected "
                "two non-empty markers; set both"
            )
        if self.think_open in self.think_close or self.think_close in self.think_open:
            raise ValueError(
                f"think_open = {self.think_open!r} and think_close = {self.think_close!r} contain "
                "each other; expected two distinct markers; change one"
            )

    def messages(
        self, item: Item, is_multimodal: bool = True, *, markup: Markup | None = None
    ) -> list[dict[str, Any]]:
        """Return the chat messages of `item`: an optional system message and one user message.

        Think markers in its texts are shown as text, and so is other markup that is given.

        Args:
            item: What to show the model.
            is_multimodal: Give contents as lists of image and text parts (processors); otherwise
                as plain strings (tokenizers).
            markup: What else means something to the model, `Backbone.markup`; None for a model
                whose tokens are not known.

        Raises:
            ValueError: If the item has images and `is_multimodal` is False, or has no content.
        """
        markup = markup or Markup([self.think_open, self.think_close])
        system, parts = self.system_prompt, [item.instruction, item.text]
        # Alone an instruction is what the item asks, and no frame of something else.
        if self.instruction_in_system and item.instruction and (item.text or self.images(item)):
            system, parts = markup.as_text(item.instruction), [item.text]
        text = markup.as_text("\n".join(part for part in parts if part))
        image_count = len(self.images(item))
        if not text and not image_count:
            raise ValueError(
                "item has neither instruction, text, images nor video; expected at least one; "
                "fill one of them"
            )
        if not is_multimodal and image_count:
            raise ValueError(
                f"item has {image_count} images or frames but the backbone reads text only; "
                "expected none; use a vision-language backbone or drop the images"
            )
        user: str | list[dict[str, str]] = text
        if is_multimodal:
            user = [{"type": "image"} for _ in range(image_count)]
            if text:
                user.append({"type": "text", "text": text})
        messages: list[dict[str, Any]] = [{"role": "user", "content": user}]
        if system is not None:
            # Several multimodal chat templates walk over content parts, so no bare string here.
            content = [{"type": "text", "text": system}] if is_multimodal else system
            messages.insert(0, {"role": "system", "content": content})
        return messages

    def images(self, item: Item) -> list[ImageSource]:
        """Return the pictures of `item` in the order of their placeholders: images, then frames."""
        return [*item.images, *item.video]

    def completion(self, cot: str) -> str:
        """Return the exact text of a rollout that thought `cot`, without the end-of-turn token.

        >>> Renderer().completion("the camel is top left")
        '<think> the camel is top left </think>'

        Raises:
            ValueError: If `cot` is blank or already has a marker in it.
        """
        if not cot.strip():
            raise ValueError("cot is blank; expected text; use None for an item without a CoT")
        for marker in (self.think_open, self.think_close):
            if marker in cot:
                raise ValueError(
                    f"cot = {cot[:80]!r} contains {marker!r}; expected the bare chain of thought; "
                    "strip the markers, the renderer adds them"
                )
        return f"{self.think_open} {cot.strip()} {self.think_close}"

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-ready dict; `from_dict` is its inverse.

        What is left at its default since it came later is left out: digests of older models stay.
        """
        data = asdict(self)
        if not self.instruction_in_system:
            del data["instruction_in_system"]
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "Renderer":
        """Return the renderer of a `to_dict` result.

        Raises:
            ValueError: For keys this version does not know.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(data) - set(known))
        if unknown:
            raise ValueError(
                f"renderer has unknown keys {unknown}; expected only {known}; "
                "remove them or use the version that wrote them"
            )
        return cls(**data)


@dataclass(frozen=True)
class Think:
    """What a completion's think span holds.

    Attributes:
        text: The CoT without markers; of a malformed completion, what could be read.
        is_complete: Whether the span is well formed, so that it may be embedded.
        problem: None if complete, else "no_open", "nested", "truncated" or "empty".
    """

    text: str
    is_complete: bool
    problem: str | None = None


def parse_think(completion: str, renderer: Renderer) -> Think:
    """Return the think span of `completion`; never raises, never repairs.

    The span must open the completion (leading white space aside), close once, hold text and no
    second marker. Text after the closing marker is ignored, and never embedded.

    >>> parse_think("<think> left of the camel </think>", Renderer())
    Think(text='left of the camel', is_complete=True, problem=None)
    >>> parse_think("<think> left of the", Renderer()).problem
    'truncated'
    """
    opened = completion.lstrip()
    if not opened.startswith(renderer.think_open):
        return Think(text="", is_complete=False, problem="no_open")
    inside, close, rest = opened[len(renderer.think_open) :].partition(renderer.think_close)
    text = inside.strip()
    if renderer.think_open in inside or renderer.think_open in rest or renderer.think_close in rest:
        return Think(text=text, is_complete=False, problem="nested")
    if not close:
        return Think(text=text, is_complete=False, problem="truncated")
    if not text:
        return Think(text="", is_complete=False, problem="empty")
    return Think(text=text, is_complete=True)
