"""One backbone that thinks and embeds: the room where adapters, read-out and prompts meet.

Knows no losses, no rewards, no trainers.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twn_rl import batching, thoughts
from twn_rl.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    attach_adapters,
    checkpoint_contexts,
    use_adapter,
)
from twn_rl.backbone import Backbone, load_backbone
from twn_rl.config import TwnConfig
from twn_rl.decoding import decode, dice
from twn_rl.prefix import Prefix, read_rows, read_tail
from twn_rl.prompts import Prompts, prepare_prompts
from twn_rl.readout import (
    Tail,
    add_readout_tokens,
    check_bottleneck,
    join_sequence,
    kv_detach,
    pool,
    position_ids,
    reencode,
    without_checkpointing,
)
from twn_rl.records import Item
from twn_rl.templates import Think
from twn_rl.vision import share_images

# Tensors, and `mm_encoder_outputs` once pictures are encoded.
Batch = Mapping[str, Any]


class DualLoraModel(nn.Module):
    """A frozen backbone with a reasoning and an embedding adapter.

    Attributes:
        backbone: Model, processor and what is known of them.
        peft_model: The backbone with both adapters; what TRL trains.
        processor: The backbone's processor, or tokenizer for text-only models.
        tokenizer: The tokenizer inside it.
        renderer: How items become prompts.
        config: Settings stored with the checkpoint.
        readout_ids: Q ids of the read-out tokens.
        reason_ids: K ids of the reason tokens, for latent thoughts; [] if there are none.
        prefill_adapter: Adapter that fills the cache in "kv_detach"; a frozen snapshot while the
            reasoning adapter is trained by RL.
        gates: Fitted routing gates by side (`gate.QUERY_SIDE`, `gate.DOCUMENT_SIDE`), frozen.
    """

    def __init__(
        self,
        backbone: Backbone,
        peft_model: Any,
        config: TwnConfig,
        readout_ids: list[int],
        reason_ids: Sequence[int] = (),
    ) -> None:
        """Hold parts made by `from_backbone`."""
        super().__init__()
        self.backbone = backbone
        self.peft_model = peft_model
        self.config = config
        self.renderer = config.renderer
        self.processor = backbone.processor
        self.tokenizer = backbone.tokenizer
        self.readout_ids, self.reason_ids = readout_ids, list(reason_ids)
        self.prefill_adapter = REASONING_ADAPTER
        self.gates = nn.ModuleDict()

    @classmethod
    def from_backbone(
        cls,
        backbone: str | Path | Backbone,
        config: TwnConfig | None = None,
        *,
        dtype: str | torch.dtype | None = None,
        seed: int = 0,
    ) -> "DualLoraModel":
        """Return a model with new adapters on a backbone.

        Args:
            backbone: Name, path, or a loaded backbone, which is changed in place.
            config: Settings; defaults if None. Its `backbone` field is filled in.
            dtype: Parameter type when loading; None keeps the stored one.
            seed: Decides the initial adapter weights; the global random state is untouched.
        """
        config = config or TwnConfig()
        if not isinstance(backbone, Backbone):
            revision = config.backbone_revision
            backbone = load_backbone(backbone, revision=revision, dtype=dtype)
        config = replace(config, backbone=backbone.name or config.backbone)
        if config.latent_bottleneck:
            check_bottleneck(backbone)
        num_readouts = config.num_readout_tokens
        tail_ids = add_readout_tokens(backbone, num_readouts, config.num_reason_tokens)
        peft_model = attach_adapters(
            backbone,
            reasoning=config.reasoning_lora,
            embedding=config.embedding_lora,
            readout_ids=tail_ids,
            seed=seed,
        )
        tail = tail_ids[:num_readouts], tail_ids[num_readouts:]
        return cls(backbone, peft_model, config, *tail)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        backbone: str | Path | Backbone | None = None,
        dtype: str | torch.dtype | None = None,
        is_trainable: bool = False,
    ) -> "DualLoraModel":
        """Return the model stored by `save_pretrained`; see `twn_rl.checkpoint.load_model`."""
        from twn_rl.checkpoint import load_model

        return load_model(cls, path, backbone=backbone, dtype=dtype, is_trainable=is_trainable)

    def save_pretrained(
        self, path: str | Path, *, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write adapters and settings; see `twn_rl.checkpoint.save_model`."""
        from twn_rl.checkpoint import save_model

        save_model(self, path, state_dict=state_dict)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.peft_model.device

    @property
    def hidden_size(self) -> int:
        """Width D of a vector."""
        return self.backbone.hidden_size

    @property
    def suppressed_token_ids(self) -> list[int]:
        """Ids the policy must never write, for `generation_kwargs={"suppress_tokens": ...}`."""
        return thoughts.suppressed_token_ids(self.backbone, self.renderer)

    def collate(
        self,
        items: Sequence[Item],
        completions: Sequence[batching.Completion] | None = None,
        *,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Return a batch of N prompts, left-padded, and completions, right-padded.

        Args:
            items: N items.
            completions: Per item a string, a list of ids, or None for no thinking.
            max_length: Largest prompt in tokens; longer ones are refused.

        Returns:
            `input_ids`, `attention_mask` (N, P), the processor's image tensors and, if completions
            are given, `completion_ids`, `completion_mask` (N, C). Masks are 1 on real tokens.
        """
        batch = batching.collate_prompts(self.backbone, self.renderer, items, max_length=max_length)
        if completions is not None:
            if len(completions) != len(items):
                raise ValueError(
                    f"{len(completions)} completions for {len(items)} items; expected one each; "
                    "use None for items without a thought"
                )
            batch |= batching.collate_completions(self.backbone, completions)
        return batch

    def collate_completions(self, completions: Sequence[batching.Completion]) -> dict[str, Tensor]:
        """Return right-padded `completion_ids`, `completion_mask` (N, C); see `batching`."""
        return batching.collate_completions(self.backbone, completions)

    def completion_ids(self, text: str, *, add_eos: bool = False) -> list[int]:
        """Return the ids of a completion; an SFT target ends with the end of turn."""
        ids = batching.completion_ids(self.backbone, text)
        return [*ids, self.backbone.eos_token_id] if add_eos else ids

    def embed(self, batch: Batch, *, is_latent: bool = False) -> Tensor:
        """Return unit-norm float32 vectors (N, D), local, of a batch from `collate`.

        Rows whose completion is empty give the no-think vector. Gradient reaches the embedding
        adapter and the rows of the tail only.

        Args:
            batch: N prompts, with or without completions.
            is_latent: Put the reason tokens before the read-outs: a latent thought.
        """
        tail = self._tail(is_latent)
        return pool(self._tail_states(batch, tail)[:, len(tail.reason_ids) :])

    def _tail(self, is_latent: bool) -> Tail:
        if not is_latent:
            return Tail(self.readout_ids)
        if not self.reason_ids:
            raise ValueError(
                "num_reason_tokens = 0; a latent thought needs at least one; train a model with "
                "recipes/latent_embed.py, or think in another way"
            )
        return Tail(self.readout_ids, self.reason_ids, self.config.latent_bottleneck)

    def _tail_states(self, batch: Batch, tail: Tail) -> Tensor:
        """Return the states (N, K + Q, D) of the tail after prompts and completions."""
        parts = self.backbone, self.peft_model, self._on_device(batch), tail
        if self._is_detached:
            return kv_detach(*parts, prefill_adapter=self.prefill_adapter)
        return reencode(*parts)

    def token_nll(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the summed NLL (N,) in nats of each completion, and its length (N,) in tokens.

        Logits are computed for the completion only. Gradient reaches the reasoning adapter only.
        """
        batch = self._on_device(batch)
        if "completion_ids" not in batch:
            raise ValueError(
                "batch has no completion_ids; expected completions; pass them to collate"
            )
        targets, mask = batch["completion_ids"], batch["completion_mask"]
        inputs = join_sequence(batch)
        with use_adapter(self.peft_model, REASONING_ADAPTER):
            logits = self.backbone.model(
                **inputs,
                position_ids=position_ids(self.backbone, inputs),
                logits_to_keep=targets.shape[1] + 1,
                use_cache=False,
            ).logits[:, :-1]
        labels = targets.masked_fill(mask == 0, -100)
        nll = nn.functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), reduction="none", ignore_index=-100
        )
        return nll.view_as(labels).sum(1), mask.sum(1)

    def forward(
        self,
        embed: Mapping[str, Batch] | None = None,
        token_nll: Batch | None = None,
        latent: Mapping[str, Batch] | None = None,
    ) -> dict[str, Any]:
        """Return every vector and token loss of one training step in one forward.

        DDP and DeepSpeed must see exactly one forward of the wrapped module per backward. Batches
        that hold the very same pixel tensor share one pass of the vision tower; those that hold the
        very same prompt tensor share its key/value cache, gradient included.

        Args:
            embed: Batches by name, each given to `embed`.
            token_nll: Batch given to `token_nll`.
            latent: Batches by other names, embedded with a latent thought.

        Returns:
            `embeds`: name -> (N, D); `reason_states`: name -> (N, K, D) of the latent ones;
            `token_nll`, `token_count`: (N,), if asked for. Gradient flows into all of them.
        """
        tails = {name: self._tail(False) for name in embed or {}}
        tails |= {name: self._tail(True) for name in latent or {}}
        embedded = {**(embed or {}), **(latent or {})}
        groups = _by_prompt(embedded)
        batches: dict[Any, Batch] = {("embed", name): batch for name, batch in embedded.items()}
        if token_nll is not None:
            batches["token_nll", ""] = token_nll
        moved = {key: self._on_device(batch) for key, batch in batches.items()}
        batches = dict(share_images(self.backbone, moved))
        last = batches.pop(("token_nll", ""), None)
        states: dict[str, Tensor] = {}
        for names in groups:
            shared = [(batches["embed", name], tails[name]) for name in names]
            states |= dict(zip(names, self._read_together(shared), strict=True))
        lengths = {name: len(tails[name].reason_ids) for name in embedded}
        embeds = {name: pool(states[name][:, k:]) for name, k in lengths.items()}
        output: dict[str, Any] = {"embeds": embeds}
        if latent:
            output["reason_states"] = {name: states[name][:, : lengths[name]] for name in latent}
        if last is not None:
            output["token_nll"], output["token_count"] = self.token_nll(last)
        return output

    def prepare(self, batch: Batch) -> Prompts:
        """Return the prompts of a batch from `collate`, pictures encoded; no gradient."""
        with torch.no_grad():
            return prepare_prompts(self.backbone, self._on_device(batch))

    def read(
        self,
        prompts: Prompts,
        rows: Sequence[int] | None = None,
        *,
        started: Prefix | None = None,
    ) -> Prefix:
        """Return what the embedding side has read of N prompts, for any number of `read_out`.

        Args:
            prompts: Prompts from `prepare`.
            rows: Which of them; all if None.
            started: What `start_reasoning` read of the same rows; serves both sides where one
                adapter reads for both, in "kv_detach".
        """
        if started is not None and self._is_detached and self.prefill_adapter == REASONING_ADAPTER:
            return started
        adapter = self.prefill_adapter if self._is_detached else EMBEDDING_ADAPTER
        with self._inference():
            return read_rows(self.backbone, self.peft_model, prompts, rows, adapter=adapter)

    def read_out(
        self,
        prefix: Prefix,
        completions: Sequence[batching.Completion] | None = None,
        *,
        is_latent: bool = False,
    ) -> Tensor:
        """Return the mean read-out states (N, D), float32, not normalised, no gradient.

        Normalised they are the vectors of `embed`, for the price of completion and read-outs alone.

        Args:
            prefix: What `read` returned.
            completions: Per sequence a string, a list of ids, or None for no thinking.
            is_latent: Put the reason tokens before the read-outs: a latent thought.
        """
        batch = {} if completions is None else self.collate_completions(completions)
        tail = self._tail(is_latent)
        with self._inference():
            states = self._read_tail(prefix, self._on_device(batch), tail)
        return states[:, len(tail.reason_ids) :].float().mean(1)

    def _read_tail(self, prefix: Prefix, batch: Batch, tail: Tail) -> Tensor:
        return read_tail(
            self.backbone,
            self.peft_model,
            prefix,
            batch,
            tail,
            prefill_adapter=self.prefill_adapter if self._is_detached else None,
        )

    def start_reasoning(self, prompts: Prompts, rows: Sequence[int] | None = None) -> Prefix:
        """Return what the reasoning adapter has read of prompts: to decide, and to `reason` from.

        Args:
            prompts: Prompts from `prepare`.
            rows: Which of them; all if None.
        """
        parts = self.backbone, self.peft_model
        with self._inference():
            return read_rows(*parts, prompts, rows, adapter=REASONING_ADAPTER, with_logits=True)

    @property
    def is_policy_deciding(self) -> bool:
        """Whether the policy was trained to decide by its first token if it thinks."""
        return self.config.thinking_decision == "policy"

    def think_probability(self, prefix: Prefix) -> Tensor:
        """Return (N,) how likely the policy opens a thought, from `start_reasoning`."""
        assert prefix.logits is not None
        return thoughts.think_probability(self.backbone, self.renderer, prefix.logits)

    def is_direct(self, ids: Sequence[int]) -> bool:
        """Return whether a completion is the policy's decision to answer without a thought."""
        return self.is_policy_deciding and thoughts.is_direct(self.backbone, ids)

    def reason(
        self,
        batch: Batch | Prompts | Prefix,
        rows: Sequence[int] | None = None,
        *,
        max_think_tokens: int | None = None,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_thoughts: int = 1,
        seeds: int | Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Return completion ids written by the reasoning adapter, `num_thoughts` rows per prompt.

        Thoughts of a prompt stand next to each other; a row ends with the end of turn if it was
        written, and holds no padding. Sampling settings stored with the backbone are not used.
        Where the policy decides who thinks, that has been decided: the thought is opened for it.

        Args:
            batch: Prompts from `prepare`, a batch from `collate`, or what `start_reasoning` read.
            rows: Which prompts; all if None.
            max_think_tokens: Budget; the config's if None.
            do_sample: Sample instead of taking the likeliest token.
            temperature: Of sampling.
            top_p: Of nucleus sampling; 1 is off.
            num_thoughts: Completions per prompt.
            seeds: Makes sampling repeatable: one seed a prompt, so that its thoughts do not depend
                on its batch mates, or one for the batch. None draws from torch's global state.
        """
        if num_thoughts > 1 and not do_sample:
            raise ValueError(
                f"num_thoughts = {num_thoughts} with do_sample = False; expected sampling, greedy "
                "thoughts are all equal; set do_sample=True"
            )
        if isinstance(batch, Prefix):
            prefix = batch if rows is None else batch.select(rows)
        else:
            prompts = batch if isinstance(batch, Prompts) else self.prepare(batch)
            prefix = self.start_reasoning(prompts, rows)
        budget = max_think_tokens or self.config.max_think_tokens
        opening = thoughts.think_open_ids(self.backbone, self.renderer)
        with self._inference():
            uniforms = dice(len(prefix), seeds, num_thoughts, budget) if do_sample else None
            with use_adapter(self.peft_model, REASONING_ADAPTER):
                return decode(
                    self.backbone,
                    prefix.select([row for row in range(len(prefix)) for _ in range(num_thoughts)]),
                    max_new_tokens=budget,
                    suppress_tokens=self.suppressed_token_ids,
                    opening=opening if self.is_policy_deciding else (),
                    uniforms=uniforms,
                    temperature=temperature,
                    top_p=top_p,
                )

    def _read_together(self, batches: Sequence[tuple[Batch, Tail]]) -> list[Tensor]:
        """Return tail states of batches with the same prompts, which are read once if possible."""
        # A recomputed layer drops its cache, and "kv_detach" has no gradient in the prompt anyway.
        if len(batches) == 1 or self._is_detached or self.is_gradient_checkpointing:
            return [self._tail_states(batch, tail) for batch, tail in batches]
        prompts = prepare_prompts(self.backbone, batches[0][0])
        prefix = read_rows(self.backbone, self.peft_model, prompts, adapter=EMBEDDING_ADAPTER)
        return [self._read_tail(prefix, batch, tail) for batch, tail in batches]

    @property
    def _is_detached(self) -> bool:
        return self.config.interface == "kv_detach"

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Switch gradient, dropout and recomputation off in the body."""
        model = self.peft_model
        with torch.no_grad(), without_checkpointing(model), thoughts.evaluating(model):
            yield

    def think(self, ids: Sequence[int]) -> Think:
        """Return what a generated completion thought, or why it is not a thought."""
        return thoughts.parse_completion(self.backbone, self.renderer, ids)

    def completion_for_embedding(self, ids: Sequence[int]) -> list[int]:
        """Return a completion without end of turn, or [] (no-think) if it is malformed."""
        return thoughts.completion_for_embedding(self.backbone, self.renderer, ids)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether activations are recomputed in the backward pass; trainers ask for it."""
        return bool(self.backbone.model.is_activation_checkpointing)

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Trade time for memory; each layer is recomputed under the adapter of its forward."""
        kwargs = {**(gradient_checkpointing_kwargs or {}), "use_reentrant": False}
        kwargs["context_fn"] = lambda: checkpoint_contexts(self.peft_model)
        self.backbone.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        self.backbone.model.gradient_checkpointing_disable()

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }


def _by_prompt(batches: Mapping[str, Batch]) -> list[list[str]]:
    """Return the names grouped by the very tensor that holds their prompts."""
    groups: dict[int, list[str]] = {}
    for name, batch in batches.items():
        groups.setdefault(id(batch["input_ids"]), []).append(name)
    return list(groups.values())
