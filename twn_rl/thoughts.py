"""Writing chains of thought and reading them back. Knows no vectors, no losses, no rewards."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from twn_rl.backbone import Backbone
from twn_rl.readout import without_checkpointing
from twn_rl.templates import Renderer, Think, parse_think


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


def generate(
    backbone: Backbone,
    model: Any,
    batch: Mapping[str, Tensor],
    *,
    max_think_tokens: int,
    suppress_tokens: list[int],
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_thoughts: int = 1,
    seed: int | None = None,
) -> list[list[int]]:
    """Return completion ids under the adapter that is active, `num_thoughts` rows per prompt.

    Sampling settings stored with the backbone (top-k, repetition penalty) are overridden, so that a
    rollout is drawn from the distribution its log-probabilities are computed under.

    Returns:
        N * num_thoughts rows, thoughts of a prompt next to each other; a row ends with the end of
        turn if it was written, and holds no padding.
    """
    prompt = {k: v for k, v in batch.items() if k not in ("completion_ids", "completion_mask")}
    if num_thoughts > 1 and not do_sample:
        raise ValueError(
            f"num_thoughts = {num_thoughts} with do_sample = False; expected sampling, greedy "
            "thoughts are all equal; set do_sample=True"
        )
    settings = GenerationConfig(
        max_new_tokens=max_think_tokens,
        do_sample=do_sample,
        temperature=temperature if do_sample else 1.0,
        top_p=top_p if do_sample else 1.0,
        top_k=0 if do_sample else 50,  # 0 is off; 50 is the library's default and unused
        min_p=None,
        repetition_penalty=1.0,
        num_beams=1,
        num_return_sequences=num_thoughts,
        suppress_tokens=suppress_tokens,
        eos_token_id=backbone.eos_token_id,
        pad_token_id=backbone.tokenizer.pad_token_id,
        bos_token_id=backbone.tokenizer.bos_token_id,
        use_cache=True,
    )
    devices = [model.device] if model.device.type == "cuda" else []
    with (
        torch.no_grad(),
        torch.random.fork_rng(devices=devices, enabled=seed is not None),
        without_checkpointing(model),
        evaluating(model),
    ):
        if seed is not None:
            torch.manual_seed(seed)
        output = model.generate(**prompt, generation_config=settings)
    rows = output[:, prompt["input_ids"].shape[1] :].tolist()
    return [_until_eos(row, backbone.eos_token_id) for row in rows]


def _until_eos(row: list[int], eos_token_id: int) -> list[int]:
    # Padding only ever follows an end of turn, so a row without one has none to strip.
    return row[: row.index(eos_token_id) + 1] if eos_token_id in row else row
