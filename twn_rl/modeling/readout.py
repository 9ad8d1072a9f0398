"""Where a vector comes from: read-out tokens, positions, pooling, and the two interfaces.

Knows no items and no losses; gets token tensors, gives unit vectors.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, use_adapter
from twn_rl.modeling.backbone import Backbone

# Processor outputs with one value per prompt token; they must grow with the sequence.
TOKEN_ALIGNED_KEYS = ("mm_token_type_ids", "token_type_ids")
_GRID_KEYS = ("image_grid_thw", "video_grid_thw")


@dataclass(frozen=True)
class Tail:
    """Tokens appended to a sequence to read a vector out of it.

    Attributes:
        readout_ids: Q read-out tokens, the last ones; their states make the vector.
        reason_ids: K reason tokens before them, where a latent thought happens; () is none.
        is_bottleneck: Read-outs see the reason tokens and each other, nothing before.
        takes_last: Without a thought the read-out stands where the prompt's last token does, not
            behind it: an embedder pools there.
    """

    readout_ids: Sequence[int]
    reason_ids: Sequence[int] = ()
    is_bottleneck: bool = False
    takes_last: bool = False

    @property
    def ids(self) -> list[int]:
        """All K + Q tokens in their order."""
        return [*self.reason_ids, *self.readout_ids]


def readout_tokens(num_readout_tokens: int) -> list[str]:
    """Return the read-out token strings.

    >>> readout_tokens(2)
    ['<|readout_0|>', '<|readout_1|>']
    """
    return [f"<|readout_{index}|>" for index in range(num_readout_tokens)]


def reason_tokens(num_reason_tokens: int) -> list[str]:
    """Return the reason token strings.

    >>> reason_tokens(2)
    ['<|reason_0|>', '<|reason_1|>']
    """
    return [f"<|reason_{index}|>" for index in range(num_reason_tokens)]


def add_readout_tokens(
    backbone: Backbone, num_readout_tokens: int, num_reason_tokens: int = 0
) -> list[int]:
    """Make sure tokenizer and embedding table have the read-out tokens; return their ids.

    Ids of reason tokens, if there are any, follow those of the read-outs.

    The table only grows if it has no spare rows. New rows are the mean of the old ones, so that
    they are the same in every session; what is learned lives in the embedding adapter.
    """
    tokenizer = backbone.tokenizer
    model: Any = backbone.model
    tokens = readout_tokens(num_readout_tokens) + reason_tokens(num_reason_tokens)
    missing = [token for token in tokens if token not in tokenizer.get_vocab()]
    if missing:
        tokenizer.add_tokens(missing, special_tokens=True)
    ids = [tokenizer.get_vocab()[token] for token in tokens]
    old_size = model.get_input_embeddings().weight.shape[0]
    if max(ids) >= old_size:
        with torch.random.fork_rng():  # the new rows are drawn at random before they are set
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
        tables = {id(m.weight): m.weight for m in _embedding_tables(model)}
        for table in tables.values():
            with torch.no_grad():
                table[old_size:] = table[:old_size].float().mean(0).to(table.dtype)
    return ids


def _embedding_tables(model: Any) -> list[Any]:
    return [
        m for m in (model.get_input_embeddings(), model.get_output_embeddings()) if m is not None
    ]


def join_sequence(
    batch: Mapping[str, Tensor], readout_ids: list[int] | None = None
) -> dict[str, Tensor]:
    """Return model inputs for `[left-padded prompt | right-padded completion | read-outs]`.

    Args:
        batch: `input_ids`, `attention_mask` (N, P), optionally `completion_ids`, `completion_mask`
            (N, C), and whatever else the processor gave.
        readout_ids: Q ids to append; None appends nothing.

    Returns:
        The batch without completion keys, its token-aligned tensors of length P + C + Q. Masks are
        1 on real tokens.
    """
    inputs = {k: v for k, v in batch.items() if k not in ("completion_ids", "completion_mask")}
    prompt_ids, prompt_mask = batch["input_ids"], batch["attention_mask"]
    ids, masks = [prompt_ids], [prompt_mask]
    if "completion_ids" in batch:
        ids.append(batch["completion_ids"].to(prompt_ids))
        masks.append(batch["completion_mask"].to(prompt_mask))
    if readout_ids:
        rows = prompt_ids.new_tensor(readout_ids).expand(prompt_ids.shape[0], -1)
        ids.append(rows)
        masks.append(torch.ones_like(rows).to(prompt_mask))
    inputs["input_ids"], inputs["attention_mask"] = torch.cat(ids, 1), torch.cat(masks, 1)
    added = inputs["input_ids"].shape[1] - prompt_ids.shape[1]
    for key in TOKEN_ALIGNED_KEYS:
        if key in inputs:
            inputs[key] = nn.functional.pad(inputs[key], (0, added))
    return inputs


def close_gaps(backbone: Backbone, batch: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return a batch that can be read on at its end, also by layers that count columns.

    Right padding of completions would stand between a thought and what is appended. Where that
    matters completions are joined to their prompts and all padding goes to the left; elsewhere the
    batch comes back as it is.
    """
    if "completion_ids" not in batch or not backbone.counts_columns:
        return batch
    inputs = join_sequence(batch)
    order = inputs["attention_mask"].argsort(dim=1, stable=True)  # padding first, then the rest
    for key in ("input_ids", "attention_mask", *TOKEN_ALIGNED_KEYS):
        if key in inputs:
            inputs[key] = inputs[key].gather(1, order)
    return inputs


def give_last(batch: Mapping[str, Tensor], tail: Tail) -> Mapping[str, Tensor]:
    """Return a batch whose prompts without a thought hide their last token, if the tail takes it.

    Hidden means masked: it has no position, nobody sees it, and the tail comes next.
    """
    if not tail.takes_last:
        return batch
    mask = batch["attention_mask"].clone()
    mask[:, -1] *= has_completion(batch, len(mask)).to(mask)
    return {**batch, "attention_mask": mask}


def has_completion(batch: Mapping[str, Tensor], rows: int) -> Tensor:
    """Return (N,) bool, on the CPU, which of N rows have a completion that is not empty."""
    if "completion_mask" not in batch:
        return torch.zeros(rows, dtype=torch.bool)
    return batch["completion_mask"].any(1).cpu()


def position_ids(backbone: Backbone, inputs: Mapping[str, Tensor]) -> Tensor:
    """Return positions that count real tokens only, so that padding never moves a token.

    Returns:
        (N, T) for ordinary rotary positions; (3, N, T) for models with 3-D positions, in which an
        image's tokens share their time coordinate.
    """
    mask = inputs["attention_mask"]
    if backbone.uses_mrope and any(inputs.get(key) is not None for key in _GRID_KEYS):
        grids = {key: inputs[key] for key in _GRID_KEYS if inputs.get(key) is not None}
        positions, _ = backbone.inner_model.get_rope_index(  # type: ignore[operator]
            inputs["input_ids"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
            attention_mask=mask,
            **grids,
        )
        return positions
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return positions.expand(3, -1, -1) if backbone.uses_mrope else positions


def bottleneck_mask(mask: Tensor, tail: Tail, dtype: torch.dtype) -> Tensor:
    """Return the (N, 1, T, T) additive mask in which read-outs see only the tail before them.

    Everything else is causal. 0 lets through, the smallest number of `dtype` does not, so that
    both "sdpa" and "eager" attention take it, and rows of padding stay finite.

    Args:
        mask: (N, T), 1 on real tokens; the last K + Q are the tail.
        tail: What is appended.
        dtype: Of the attention scores.
    """
    length = mask.shape[1]
    is_seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    is_seen[length - len(tail.readout_ids) :, : length - len(tail.ids)] = False
    is_hidden = ~(is_seen[None] & mask[:, None].bool())
    scores = torch.zeros(is_hidden.shape, dtype=dtype, device=mask.device)
    return scores.masked_fill(is_hidden, torch.finfo(dtype).min)[:, None]


def attention_for(backbone: Backbone, mask: Tensor, tail: Tail | None, rows: int) -> Tensor:
    """Return the attention mask of the last `rows` tokens: (N, T) as it is, or the bottleneck's.

    Args:
        backbone: Whose parameter type the mask gets.
        mask: (N, T), 1 on real tokens.
        tail: What the sequence ends with; None if it has no tail.
        rows: Tokens of this forward; the others are in the cache.
    """
    if tail is None or not tail.is_bottleneck or not tail.reason_ids:
        return mask
    return bottleneck_mask(mask, tail, backbone.model.dtype)[:, :, -rows:]


def check_bottleneck(backbone: Backbone) -> None:
    """Refuse backbones whose attention cannot take the bottleneck's mask.

    Raises:
        ValueError: For a kernel without additive masks, or layers with sliding windows.
    """
    config = backbone.model.config.get_text_config(decoder=True)
    kernel, kinds = config._attn_implementation, set(getattr(config, "layer_types", None) or ())
    problems = []
    if kernel not in ("sdpa", "eager"):
        problems.append(f"attn_implementation = {kernel!r}, expected 'sdpa' or 'eager'")
    if kinds - {"full_attention"}:
        problems.append(f"layer_types = {sorted(kinds)}, expected 'full_attention' only")
    if problems:
        raise ValueError(
            f"latent_bottleneck = True with {'; '.join(problems)}; load the backbone with another "
            "attention or leave the bottleneck out"
        )


def pool(hidden: Tensor) -> Tensor:
    """Return the unit-norm float32 mean (N, D) of read-out states (N, Q, D); gradient flows."""
    return nn.functional.normalize(hidden.float().mean(dim=1), dim=-1)


@contextmanager
def without_checkpointing(model: nn.Module) -> Iterator[None]:
    """Switch gradient checkpointing off in the body; a checkpointed layer drops its cache."""
    switched = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False) is True]
    try:
        for module in switched:
            module.gradient_checkpointing = False  # type: ignore[assignment]
        yield
    finally:
        for module in switched:
            module.gradient_checkpointing = True  # type: ignore[assignment]


def reencode(
    backbone: Backbone, peft_model: PeftModel, batch: Mapping[str, Tensor], tail: Tail
) -> Tensor:
    """Return tail states (N, K + Q, D) read by the embedding adapter in one pass.

    The language head is never run. Gradient reaches the embedding adapter and its tail's rows.
    """
    inputs = join_sequence(close_gaps(backbone, give_last(batch, tail)), tail.ids)
    positions = position_ids(backbone, inputs)
    mask = inputs["attention_mask"]
    inputs["attention_mask"] = attention_for(backbone, mask, tail, mask.shape[1])
    with use_adapter(peft_model, EMBEDDING_ADAPTER):
        output = backbone.inner_model(
            **inputs, position_ids=positions, use_cache=False, return_dict=True
        )
    return output.last_hidden_state[:, -len(tail.ids) :]


def kv_detach(
    backbone: Backbone,
    peft_model: PeftModel,
    batch: Mapping[str, Tensor],
    tail: Tail,
    *,
    prefill_adapter: str,
) -> Tensor:
    """Return states (N, K + Q, D) of a tail that attends to the cache another adapter left.

    Prompt and completion run once, without gradient, under `prefill_adapter`; only the tail's
    tokens run under the embedding adapter. The cache is detached, so the reasoning adapter gets no
    gradient at all.
    """
    batch = close_gaps(backbone, give_last(batch, tail))
    inputs = join_sequence(batch, tail.ids)
    positions = position_ids(backbone, inputs)
    context = join_sequence(batch)
    length = context["input_ids"].shape[1]
    with without_checkpointing(peft_model):
        with torch.no_grad(), use_adapter(peft_model, prefill_adapter):
            cache = backbone.inner_model(
                **context, position_ids=positions[..., :length], use_cache=True, return_dict=True
            ).past_key_values
        # Nothing is read after the tail, and linear attention would overwrite a state in place that
        # its own backward pass needs.
        cache.update_recurrent_state = lambda states, *_, **__: states
        with use_adapter(peft_model, EMBEDDING_ADAPTER):
            output = backbone.inner_model(
                input_ids=inputs["input_ids"][:, length:],
                attention_mask=attention_for(
                    backbone, inputs["attention_mask"], tail, len(tail.ids)
                ),
                position_ids=positions[..., length:],
                past_key_values=cache,
                use_cache=True,
                return_dict=True,
            )
    return output.last_hidden_state
