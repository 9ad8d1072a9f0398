"""Marks that other models' data carry in their texts: taken out here, so that our renderer decides.

Our renderer places every picture before the text and adds think markers itself.
"""

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from twn_rl.data.chat import Renderer, parse_think
from twn_rl.data.formats.input_files import text_of
from twn_rl.data.record import RecordError

# Phi-3, LLaVA and UME, Qwen-VL, Llama, Gemma, InternVL, Pixtral: whatever stands for pixels.
_PLACEHOLDER = (
    r"(?:<\|image_\d+\|>|<\|(?:image|video)(?:_pad)?\|>|<\|vision_(?:start|end|pad)\|>"
    r"|<(?:image|video)(?:_placeholder|_soft_token)?>|<(?:start|end)_of_image>"
    r"|<IMG_CONTEXT>|</?img>|\[IMG(?:_BREAK|_END)?\])"
)
_MARK = re.compile(_PLACEHOLDER)
_MARK_LINE = re.compile(rf"^[ \t]*(?:{_PLACEHOLDER}[ \t]*)+(?:\n|\Z)", re.MULTILINE)
_MARK_INLINE = re.compile(rf"[ \t]*(?:{_PLACEHOLDER}[ \t]*)+")
_READ_OUT = re.compile(r"(?:\s*<(?:disc_emb|gen_emb)>)+\s*\Z")

_RENDERER = Renderer()


def strip_marks(
    text: str | None, *, has_pictures: bool, notes: Counter[str], field: str
) -> str | None:
    r"""Return `text` without placeholders and trailing read-out marks; None if nothing is left.

    Args:
        text: Text of another model's data; without marks it comes back unchanged.
        has_pictures: Whether the item has pictures for placeholders to stand for.
        notes: Where a placeholder amid the text is counted: its position is lost.
        field: Dotted field name for errors.

    Raises:
        RecordError: For a placeholder in an item without pictures, which have been lost somewhere.

    >>> strip_marks("<|image_1|>\nWhat is it?", has_pictures=True, notes=Counter(), field="qry")
    'What is it?'
    """
    if text is None:
        return None
    without_read_out = _READ_OUT.sub("", text)
    if not _MARK.search(without_read_out):
        return without_read_out if without_read_out.strip() else None
    if not has_pictures:
        raise RecordError(
            f"text = {text[:80]!r} has a picture placeholder but the item has no picture; expected "
            "one; add its path, or remove the placeholder",
            reason="mark_without_image",
            field=field,
        )
    if sum(bool(part.strip()) for part in _MARK.split(without_read_out)) > 1:
        notes["placeholders amid a text, whose picture now comes first"] += 1
    bare = _MARK_LINE.sub("", without_read_out)
    bare = _MARK_INLINE.sub(_gap, bare).strip()
    return bare or None


def count_marks(text: str, kind: str) -> int:
    """Return how many `<image>` or `<video>` marks (`kind`) stand in `text`."""
    return text.count(f"<{kind}>")


class Thought(NamedTuple):
    """A chain of thought taken out of a completion.

    Attributes:
        cot: The thought without markers; None if there is none that could be used.
        metadata: The summary after it, or the whole completion if the thought is malformed.
    """

    cot: str | None
    metadata: dict[str, Any]


def parse_thought(completion: str | None, *, side: str, notes: Counter[str]) -> Thought:
    """Return the thought of `<think>...</think>summary<gen_emb>`.

    A malformed thought is counted in `notes`; its completion is kept in the metadata, unused.

    >>> parse_thought("<think>a cat</think>Cat.<gen_emb>", side="query", notes=Counter())
    Thought(cot='a cat', metadata={'query_summary': 'Cat.'})
    """
    if completion is None or not completion.strip():
        return Thought(None, {})
    think = parse_think(completion, _RENDERER)
    if not think.is_complete:
        notes[f"{side} thoughts left unused, {think.problem}"] += 1
        return Thought(None, {f"{side}_completion": completion})
    rest = completion.partition(_RENDERER.think_close)[2]
    summary = _READ_OUT.sub("", rest).strip()
    return Thought(think.text, {f"{side}_summary": summary} if summary else {})


def thought_of(data: Mapping[str, Any], name: str, *, side: str, notes: Counter[str]) -> Thought:
    """Return the thought in field `name`: a bare one, or one in think markers."""
    text = text_of(data, name)
    if text is None or _RENDERER.think_open in text or _RENDERER.think_close in text:
        return parse_thought(text, side=side, notes=notes)
    return Thought(_READ_OUT.sub("", text).strip() or None, {})


def _gap(match: re.Match[str]) -> str:
    before, after = match.string[: match.start()], match.string[match.end() :]
    is_at_edge = not before or not after or before[-1] == "\n" or after[0] == "\n"
    return "" if is_at_edge else " "
