"""What was written, read back as a thought. Knows no vectors, no losses, no rewards."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from twn_rl.data.chat import Renderer, Think, parse_think
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.collator import completion_ids


def suppressed_token_ids(backbone: Backbone, renderer: Renderer) -> list[int]:
    """Return the ids no policy may write; think tags and the end of turn stay allowed."""
    return backbone.suppressed_token_ids(keep=(renderer.think_open, renderer.think_close))


def parse_completion(backbone: Backbone, renderer: Renderer, ids: Sequence[int]) -> Think:
    """Return the think span of generated ids; without an end of turn its problem is "truncated"."""
    ended = backbone.eos_token_id in ids
    text = backbone.tokenizer.decode(_before_eos(backbone, ids), skip_special_tokens=False)
    think = parse_think(text, renderer)
    if ended or not think.is_complete:
        return think
    return Think(text=think.text, is_complete=False, problem="truncated")


def completion_for_embedding(
    backbone: Backbone, renderer: Renderer, ids: Sequence[int]
) -> list[int]:
    """Return the ids up to the end of turn, or [] if the think span may not be embedded."""
    if not parse_completion(backbone, renderer, ids).is_complete:
        return []
    return _before_eos(backbone, ids)


def think_open_ids(backbone: Backbone, renderer: Renderer) -> list[int]:
    """Return the ids a thought opens with; the first of them is the decision to think."""
    return completion_ids(backbone, renderer.think_open)


def think_probability(backbone: Backbone, renderer: Renderer, logits: Tensor) -> Tensor:
    """Return how likely the policy opens a thought rather than ending its turn at once.

    P(open) / (P(open) + P(end of turn)) of the first token of a completion: the decision of
    MMEmb-R1 (arXiv 2604.06156) without a token of its own, so that backbone and tokenizer stay as
    they are. Tokens that are neither do not count.

    Args:
        backbone: Whose end of turn it is.
        renderer: Whose marker opens a thought.
        logits: (N, V) of the first token.

    Returns:
        (N,) float32 in [0, 1].
    """
    opening = think_open_ids(backbone, renderer)[0]
    return (logits[:, opening].float() - logits[:, backbone.eos_token_id].float()).sigmoid()


def is_direct(backbone: Backbone, ids: Sequence[int]) -> bool:
    """Return whether a completion ends its turn at once: the decision to answer without a thought.

    Only a policy that was taught to decide means it so; see `DualLoraModel.is_direct`.
    """
    return len(ids) > 0 and int(ids[0]) == backbone.eos_token_id


def _before_eos(backbone: Backbone, ids: Sequence[int]) -> list[int]:
    row = [int(token_id) for token_id in ids]
    return row[: row.index(backbone.eos_token_id)] if backbone.eos_token_id in row else row


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout off in the body and restore every module's mode afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
