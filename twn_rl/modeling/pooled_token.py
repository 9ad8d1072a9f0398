"""The token at which an embedder reads its vector, and tokenizers that append one to every text.

Knows tokenizers and templates, no weights.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

if TYPE_CHECKING:
    from twn_rl.modeling.backbone import Backbone


def stop_appending(tokenizer: Any) -> int | None:
    """Let a tokenizer write nothing behind a text any more; return the token it wrote, if any."""
    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    ids = tokenizer("a")["input_ids"]
    if not ids or ids[-1] == plain[-1]:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"tokenizer {type(tokenizer).__name__} appends {tokenizer.decode(ids[-1:])!r} to every "
            "text; expected prompts that can be written on from; use its fast version"
        )
    state = json.loads(backend.to_str())
    post = state["post_processor"]
    for step in post.get("processors", [post]):
        for layout in ("single", "pair"):
            while step.get(layout) and "SpecialToken" in step[layout][-1]:
                step[layout].pop()
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    return int(ids[-1])


def find_pooled_token(backbone: Backbone) -> int:
    """Return the token at which an embedder that pools its last token reads its vector.

    It is what the tokenizer appends, or else what every prompt ends with.
    """
    if backbone.appended_token_id is not None:
        return backbone.appended_token_id
    content = [{"type": "text", "text": "a"}] if backbone.is_multimodal else "a"
    text = backbone.processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    return int(backbone.tokenizer(text, add_special_tokens=False)["input_ids"][-1])
