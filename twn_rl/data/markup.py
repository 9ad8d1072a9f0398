"""Texts that people write: which characters they may hold, and markup in them that stays text.

A prompt's structure (turns, pictures, thoughts, read-outs) is written by the renderer and the chat
template alone. What looks like structure inside a text is shown to the model as text.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Tokens of many model families that some tokenizers do not flag as special.
KNOWN_TOKENS = (
    "<image>",
    "<video>",
    "<fake_token_around_image>",
    "<global-img>",
    "<end_of_utterance>",
    "<start_of_turn>",
    "<end_of_turn>",
    "<|im_start|>",
    "<|im_end|>",
    "<|endoftext|>",
    "<|eot_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    *(f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)),
)
THINK_MARKERS = ("<think>", "</think>")
_UNUSABLE = re.compile("[\x00\ud800-\udfff]")
_MOST_ROUNDS = 8


class Markup:
    """Strings that mean something to a model: found in texts, and shown as text.

    >>> Markup(["</think>"]).as_text("the camel</think>")
    'the camel< /think>'
    """

    def __init__(
        self, tokens: Iterable[str], normalize: Callable[[str], str] | None = None
    ) -> None:
        """Know tokens of two characters or more; a shorter one is a letter of ordinary texts.

        Args:
            tokens: The strings.
            normalize: What the tokenizer does to a text before it looks for them; None is nothing.
        """
        self.tokens = frozenset(token for token in tokens if len(token.strip()) > 1)
        # A longer token first: it may begin with a shorter one.
        longest_first = sorted(self.tokens, key=lambda token: (-len(token), token))
        self._pattern = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._normalize = normalize

    def extended(self, tokens: Iterable[str]) -> "Markup":
        """Return what knows other tokens, too."""
        return Markup([*self.tokens, *tokens], self._normalize)

    def found(self, text: str) -> list[str]:
        """Return the distinct tokens in a text, sorted."""
        found = set(self._pattern.findall(text))
        if self._normalize is not None:
            found |= set(self._pattern.findall(self._normalize(text)))
        return sorted(found)

    def as_text(self, text: str) -> str:
        """Return a text without tokens: a space after the first character of each breaks it up.

        Words and order stay. A text without tokens comes back as it is.

        Raises:
            ValueError: If the tokenizer puts a token together again.
        """
        for _ in range(_MOST_ROUNDS):
            if not self._pattern.search(text):
                plain = text if self._normalize is None else self._normalize(text)
                if not self._pattern.search(plain):
                    return text
                text = plain
            text = self._pattern.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)
        raise ValueError(
            f"text = {text[:80]!r} holds {self.found(text)} in a form that the tokenizer puts "
            "together again; expected a text; remove them"
        )


KNOWN_MARKUP = Markup([*THINK_MARKERS, *KNOWN_TOKENS])


def unusable_character(text: str) -> str | None:
    r"""Return what a text holds that none may: NUL, or half of a surrogate pair; None if nothing.

    >>> unusable_character("a camel"), unusable_character("a\x00")
    (None, 'U+0000')
    """
    found = _UNUSABLE.search(text)
    return None if found is None else f"U+{ord(found[0]):04X}"


def without_unusable(text: str) -> str:
    """Return a text with spaces in place of what no text may hold."""
    return _UNUSABLE.sub(" ", text)


def unusable_in(value: Any, name: str) -> tuple[str, str] | None:
    """Return the dotted name and the character of the first unusable text in nested values."""
    if isinstance(value, str):
        found = unusable_character(value)
        return None if found is None else (name, found)
    parts: Iterable[tuple[Any, str]] = ()
    if isinstance(value, Mapping):
        keys = [(key, f"{name} (a key)") for key in value]
        parts = [*keys, *((part, f"{name}.{key}") for key, part in value.items())]
    elif isinstance(value, list | tuple):
        parts = [(part, f"{name}[{index}]") for index, part in enumerate(value)]
    return next((bad for part, label in parts if (bad := unusable_in(part, label))), None)
