"""What both adapters do without gradient: read prompts once, write thoughts, read states out.

`model.DualLoraModel` adds training, loading and saving.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn

from twn_rl.data.chat import Think, parse_think
from twn_rl.data.record import Item
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, use_adapter
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.collator import (
    Completion,
    collate_completions,
    collate_prompts,
    completion_ids,
    cut_behind,
)
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.decoding import Decoding, decode, dice
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.limits import LimitCounts, PromptLimits, settle_limits
from twn_rl.modeling.prefix_reading import read_pending, read_rows, read_tail
from twn_rl.modeling.prompt_features import Prompts, prepare_prompts
from twn_rl.modeling.readout import Tail, without_checkpointing

# Tensors, and `mm_encoder_outputs` once pictures are encoded.
Batch = Mapping[str, Any]


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


class DualLoraInference(nn.Module):
    """A frozen backbone with a reasoning and an embedding adapter, as far as it serves.

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
        """Hold parts made by `DualLoraModel.from_backbone`."""
        super().__init__()
        self.backbone = backbone
        self.peft_model = peft_model
        self.config = settle_limits(backbone, config)
        self._limit_counts = LimitCounts()
        self.renderer = config.renderer
        self.processor = backbone.processor
        self.tokenizer = backbone.tokenizer
        self.readout_ids, self.reason_ids = readout_ids, list(reason_ids)
        self.prefill_adapter = REASONING_ADAPTER
        self.gates = nn.ModuleDict()
        self._sessions = 0

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.peft_model.device

    @property
    def hidden_size(self) -> int:
        """Width D of a vector."""
        return self.backbone.hidden_size

    @property
    def limits(self) -> PromptLimits:
        """What texts are cut and pictures are scaled to, with counts of both since construction."""
        config = self.config
        return PromptLimits(config.max_length, config.max_image_pixels, self._limit_counts)

    @property
    def suppressed_token_ids(self) -> list[int]:
        """Ids the policy must never write, for `generation_kwargs={"suppress_tokens": ...}`."""
        think_tags = self.renderer.think_open, self.renderer.think_close
        return self.backbone.suppressed_token_ids(keep=think_tags)

    @property
    def think_open_ids(self) -> list[int]:
        """Ids a thought opens with; the first of them is the decision to think."""
        return self.completion_ids(self.renderer.think_open)

    def judge(self, side: str) -> Judge | None:
        """Return what judges the thoughts of one side; None if its gate has no judge."""
        gate = dict(self.gates.items()).get(side)
        return gate.judge if isinstance(gate, Gate) else None

    @property
    def is_policy_deciding(self) -> bool:
        """Whether the policy was trained to decide by its first token if it thinks."""
        return self.config.thinking_decision == "policy"

    def collate(
        self,
        items: Sequence[Item],
        completions: Sequence[Completion] | None = None,
        *,
        max_length: int | None = None,
    ) -> dict[str, Tensor]:
        """Return a batch of N prompts, left-padded, and completions, right-padded.

        Args:
            items: N items.
            completions: Per item a string, a list of ids, or None for no thinking.
            max_length: Longest prompt in tokens, to which texts are cut; the model's if None.

        Returns:
            `input_ids`, `attention_mask` (N, P), the processor's image tensors and, if completions
            are given, `completion_ids`, `completion_mask` (N, C). Masks are 1 on real tokens.
        """
        limits = self.limits if max_length is None else replace(self.limits, max_length=max_length)
        batch = collate_prompts(self.backbone, self.renderer, items, limits=limits)
        if completions is not None:
            if len(completions) != len(items):
                raise ValueError(
                    f"{len(completions)} completions for {len(items)} items; expected one each; "
                    "use None for items without a thought"
                )
            batch |= collate_completions(self.backbone, completions)
        return batch

    def collate_completions(self, completions: Sequence[Completion]) -> dict[str, Tensor]:
        """Return right-padded `completion_ids`, `completion_mask` (N, C); see `collator`."""
        return collate_completions(self.backbone, completions)

    def completion_ids(self, text: str, *, add_eos: bool = False) -> list[int]:
        """Return the ids of a completion; an SFT target ends with the end of turn."""
        ids = completion_ids(self.backbone, text)
        return [*ids, self.backbone.eos_token_id] if add_eos else ids

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
        if started is not None and self.has_one_reader:
            return started
        adapter = None if self.shares_prefill else EMBEDDING_ADAPTER
        adapter = self.prefill_adapter if self._is_detached else adapter
        with self._inference():
            return read_rows(self.backbone, self.peft_model, prompts, rows, adapter=adapter)

    def read_both(
        self, prompts: Prompts, *, is_started: bool = False
    ) -> tuple[Prompts | Prefix, Prefix]:
        """Return where writing starts and where reading out does; each prompt is read once a side.

        The first is what `reason` takes: the prompts themselves, what `start_reasoning` read of
        them, or, if that serves both sides, the very prefix that is read out from.

        Args:
            prompts: Prompts from `prepare`.
            is_started: Let the reasoning adapter read now, to decide or to write several times.
        """
        if self.shares_prefill:
            prefix = self.read(prompts)
            return (self.start_reasoning(prefix) if is_started else prefix), prefix
        if not is_started:
            return prompts, self.read(prompts)
        started = self.start_reasoning(prompts)
        return started, self.read(prompts, started=started)

    def read_out(
        self,
        prefix: Prefix,
        completions: Sequence[Completion] | None = None,
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

    def start_reasoning(
        self, prompts: Prompts | Prefix, rows: Sequence[int] | None = None
    ) -> Prefix:
        """Return what the reasoning adapter has read of prompts: to decide, and to `reason` from.

        Args:
            prompts: Prompts from `prepare`; in "shared_prefill" also what `read` returned, of which
                only the last tokens are left to read; or what this method returned.
            rows: Which of them; all if None.
        """
        parts = self.backbone, self.peft_model
        with self._inference():
            if isinstance(prompts, Prompts) and not self.shares_prefill:
                return read_rows(*parts, prompts, rows, adapter=REASONING_ADAPTER, with_logits=True)
            if isinstance(prompts, Prompts):
                prefix = read_rows(*parts, prompts, rows, adapter=None)
            else:
                prefix = prompts if rows is None else prompts.select(rows)
            if prefix.logits is not None:
                return prefix
            return read_pending(*parts, prefix, adapter=REASONING_ADAPTER)

    def think_probability(self, prefix: Prefix) -> Tensor:
        """Return (N,) float32 how likely the policy opens a thought, from `start_reasoning`.

        P(open) / (P(open) + P(end of turn)) of the first token of a completion: the decision of
        MMEmb-R1 (arXiv 2604.06156) without a token of its own, so that backbone and tokenizer stay
        as they are. Tokens that are neither do not count.
        """
        assert prefix.logits is not None
        opening, ending = self.think_open_ids[0], self.backbone.eos_token_id
        return (prefix.logits[:, opening].float() - prefix.logits[:, ending].float()).sigmoid()

    def is_direct(self, ids: Sequence[int]) -> bool:
        """Return whether a completion is the policy's decision to answer without a thought.

        It ends its turn at once. Only a policy that was taught to decide means it so.
        """
        return self.is_policy_deciding and list(ids[:1]) == [self.backbone.eos_token_id]

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
            batch: Prompts from `prepare`, a batch from `collate`, or what `start_reasoning` takes.
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
        start = batch if isinstance(batch, Prompts | Prefix) else self.prepare(batch)
        prefix = self.start_reasoning(start, rows)
        budget = max_think_tokens or self.config.max_think_tokens
        with self._inference():
            uniforms = dice(len(prefix), seeds, num_thoughts, budget) if do_sample else None
            with use_adapter(self.peft_model, REASONING_ADAPTER):
                return decode(
                    self.backbone,
                    prefix.select([row for row in range(len(prefix)) for _ in range(num_thoughts)]),
                    max_new_tokens=budget,
                    suppress_tokens=self.suppressed_token_ids,
                    opening=self.think_open_ids if self.is_policy_deciding else (),
                    uniforms=uniforms,
                    temperature=temperature,
                    top_p=top_p,
                )

    def start_decoding(self) -> Decoding:
        """Return an empty batch of greedy thoughts; its steps are taken inside `writing`."""
        return Decoding(
            self.backbone,
            suppress_tokens=self.suppressed_token_ids,
            opening=self.think_open_ids if self.is_policy_deciding else (),
        )

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Let the reasoning adapter write in the body, for the steps of `start_decoding`."""
        with self._inference(), use_adapter(self.peft_model, REASONING_ADAPTER):
            yield

    def think(self, ids: Sequence[int]) -> Think:
        """Return what a generated completion thought, or why it is not a thought.

        Without an end of turn its problem is "truncated".
        """
        text = self.tokenizer.decode(self._before_eos(ids), skip_special_tokens=False)
        think = parse_think(text, self.renderer)
        if self.backbone.eos_token_id in ids or not think.is_complete:
            return think
        return Think(text=think.text, is_complete=False, problem="truncated")

    def completion_for_embedding(self, ids: Sequence[int]) -> list[int]:
        """Return a completion up to the mark that closes its thought, or [] if it is malformed."""
        return self.until_close(self._before_eos(ids)) if self.think(ids).is_complete else []

    def until_close(self, ids: Sequence[int]) -> list[int]:
        """Return ids up to the mark that closes a thought; all of them if there is none."""
        return cut_behind(self.backbone, ids, self.renderer.think_close)

    def _before_eos(self, ids: Sequence[int]) -> list[int]:
        eos = self.backbone.eos_token_id
        return list(takewhile(lambda token_id: token_id != eos, map(int, ids)))

    @property
    def has_one_reader(self) -> bool:
        """Whether the reasoning adapter reads prompts for both sides."""
        return self._is_detached and self.prefill_adapter == REASONING_ADAPTER

    @property
    def shares_prefill(self) -> bool:
        """Whether the bare backbone reads prompts: what it has read serves both adapters."""
        return self.config.interface == "shared_prefill"

    @property
    def _is_detached(self) -> bool:
        return self.config.interface == "kv_detach"

    @contextmanager
    def session(self) -> Iterator[None]:
        """Prepare for inference once for all calls in the body, in which nothing is trained.

        Modes are set here instead of in every call. For one thread; a session inside a session is
        the same one.
        """
        if self._sessions:
            with torch.no_grad():
                yield
            return
        with self._inference(), evaluating(self):
            self._sessions += 1
            try:
                yield
            finally:
                self._sessions -= 1

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """Switch gradient, dropout and recomputation off in the body."""
        model = self.peft_model
        if self._sessions:
            with torch.no_grad():
                yield
            return
        with torch.no_grad(), without_checkpointing(model), evaluating(model):
            yield

    def _tail(self, is_latent: bool) -> Tail:
        if not is_latent:
            is_pooled = self.config.readout_start == "pooled_token"
            takes_last = is_pooled and self.backbone.appended_token_id is None
            return Tail(self.readout_ids, takes_last=takes_last)
        if not self.reason_ids:
            raise ValueError(
                "num_reason_tokens = 0; a latent thought needs at least one; train a model with "
                "recipes/latent_embed.py, or think in another way"
            )
        return Tail(self.readout_ids, self.reason_ids, self.config.latent_bottleneck)

    def _on_device(self, batch: Batch) -> dict[str, Tensor]:
        return {
            key: value.to(self.device) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
