"""TRL's private hooks, all of them: GRPO's trainer with a few methods of ours to override instead.

What TRL must have for this is checked by tests/training/test_trl_hooks.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Sampler

from twn_rl.data.mixture import ReorderedSampler
from twn_rl.modeling.adapters import REASONING_ADAPTER, set_trainable
from twn_rl.modeling.distinct_pictures import encoding_distinct
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.late_adapter import acting_late
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import counting_images, encoding_first
from twn_rl.runtime.extras import extra
from twn_rl.training.vllm_rollouts import VLLMRollouts

with extra("train"):
    from trl import GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

WRITTEN_AGAINST = "1.16"


class HookedGRPOTrainer(GRPOTrainer):
    """`GRPOTrainer` on a model's reasoning adapter; generation, loss and logging are TRL's own.

    A method overrides `prompt_order`, `edit_completions`, `rollout_columns` and `shape_loss`.

    Attributes:
        dual_model: The model.
        prompts_read: In "shared_prefill" what the bare backbone read of the prompts that were
            written from last, and the place of each rollout's among them; else None.
    """

    def __init__(self, dual_model: DualLoraModel, **kwargs: Any) -> None:
        """Hand all to TRL; `kwargs` are those of `GRPOTrainer` but for model and processor."""
        args: Any = kwargs["args"]
        for name in ("use_transformers_continuous_batching", "use_vllm"):
            if dual_model.shares_prefill and getattr(args, name):
                raise ValueError(
                    f"{name} = True with interface = 'shared_prefill'; expected False: its cache "
                    "has no place where an adapter begins to act"
                )
        self.dual_model = dual_model
        self.prompts_read: tuple[Prefix, list[int]] | None = None
        self._marks: Mapping[str, Tensor] = {}
        self._loss_inputs: dict[str, Any] | None = None
        # TRL's own vLLM would merge into the backbone, and knows no second adapter.
        use_vllm, args.use_vllm = args.use_vllm, False
        super().__init__(
            model=dual_model.peft_model, processing_class=dual_model.processor, **kwargs
        )
        # TRL may have added a reference adapter, and PEFT makes every new adapter trainable.
        set_trainable(dual_model.peft_model, [REASONING_ADAPTER])
        # TRL gathers pictures for its logs from the processes that have some: others would wait.
        self.log_multimodal = self.log_multimodal and self.accelerator.num_processes == 1
        if use_vllm:
            self._write_with_vllm(args)

    def _write_with_vllm(self, args: Any) -> None:
        """Let vLLM write from here on, as TRL would have it."""
        self.use_vllm = args.use_vllm = True
        self._last_loaded_step = -1  # none: the first rollouts wait for a sync
        self.vllm_generation = VLLMRollouts(
            self.dual_model, args, self.accelerator, self.whole_model, self.eos_token_ids
        )

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as HF does, then give vLLM's memory back: an evaluation may need the room.

        What is written after that is written by transformers.
        """
        try:
            return super().train(*args, **kwargs)
        finally:
            if self.use_vllm:
                self.vllm_generation.close()
                self.use_vllm = False

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Gather the weights in the body where an engine has parts of them."""
        yield

    def prompt_order(self, batch_size: int) -> Sampler[int] | None:
        """Return the order of prompts, `batch_size` of them a step; None leaves it to TRL."""
        return None

    def edit_completions(
        self, prompt_ids: list[list[int]], completions: list[list[int]], num_generations: int
    ) -> Mapping[str, Tensor]:
        """Change what was sampled, in place; return what `shape_loss` must know, (N,) each.

        Everything TRL computes afterwards, masks and log-probabilities, is of what stands here.

        Args:
            prompt_ids: Tokens of this process's N prompts.
            completions: What was sampled after each, with its end of turn.
            num_generations: G, rollouts of a group.
        """
        return {}

    def rollout_columns(
        self, indices: list[int], completion_ids: list[list[int]]
    ) -> dict[str, list[Any]]:
        """Return what rewards read of this process's rollouts, one value per rollout.

        Args:
            indices: `record_index` of each.
            completion_ids: What was written, with its end of turn.
        """
        return {}

    def shape_loss(self, logps: Tensor, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
        """Return the log-probabilities (N, T) for TRL's loss, and what is added to it, if anything.

        Args:
            logps: Of the policy's completions, with gradient.
            inputs: TRL's batch, with what `edit_completions` returned.
        """
        return logps, None

    def write_on(self, rows: list[int], opening: list[int]) -> list[list[int]]:
        """Return what the policy writes after an opening, the opening included; within the budget.

        Every process must call this; one without rows of its own writes for its first prompt.

        Args:
            rows: Rollouts of the batch that is being generated.
            opening: Tokens that the completions begin with.
        """
        prompts = [self._prompts[row] for row in rows or [0]]
        prompt_ids, images, fields = super()._tokenize_prompts(prompts)
        images = self._per_prompt(images)
        # What has an entry per token must grow with the prompt; thoughts are text, type 0.
        fields = {
            key: [[*row, *([0] * len(opening))] for row in values]
            if isinstance(values, list) and values and isinstance(values[0], list)
            else values
            for key, values in fields.items()
        }
        opened = [[*ids, *opening] for ids in prompt_ids]
        if self.use_vllm and images is not None:
            short = [[*ids, *opening] for ids in self._short_prompts(prompts)]
            self.vllm_generation.name_prompts(opened, short)
        with self._policy_reads(1 + len(opening)):
            written, _ = super()._generate_single_turn(opened, images, fields, 1)
        return [[*opening, *ids][: self.max_completion_length] for ids in written[: len(rows)]]

    def log_means(self, metrics: Mapping[str, list[float]]) -> None:
        """Log the mean of each list over all processes; every process must call this."""
        policy: Any = self.model
        mode = "train" if policy.training else "eval"
        for name, values in metrics.items():
            local = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device).mean()
            everywhere: Any = self.accelerator.gather(local)
            self._metrics[mode][name].append(everywhere.mean().item())

    def everywhere(self, values: Tensor) -> Tensor:
        """Return values (N,) of every process's rollouts, in TRL's order of groups, on the CPU."""
        gathered: Any = self.accelerator.gather(values.to(self.accelerator.device))
        return gathered.cpu()

    def own(self, values: Tensor, count: int) -> Tensor:
        """Return this process's part of what is `everywhere`; `count` rollouts a process."""
        return values.split(count)[self.accelerator.process_index]

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        places: Any = super()._get_train_sampler(dataset)
        order: Any = self.prompt_order(places.batch_size)
        if order is None:
            return places
        places.num_samples, places.shuffle = len(order), False
        return ReorderedSampler(places, order)

    def _policy_reads(self, num_tokens: int, *, keep: bool = False) -> AbstractContextManager[None]:
        """Let TRL's forwards in the body read prompts as the model's interface has it.

        In "shared_prefill" the policy acts on the last tokens of a sequence only, and what was read
        of the others can be kept.
        """
        if not self.dual_model.shares_prefill:
            return nullcontext()

        def take(prefix: Prefix, places: list[int]) -> None:
            if keep:
                self.prompts_read = prefix, places

        parts = self.dual_model.backbone, self.dual_model.peft_model
        return acting_late(*parts, num_tokens, take=take)

    def _per_prompt(self, images: Any) -> Any:
        """Return TRL's pictures; a prompt without any beside others has an empty list of them."""
        return images if images is None else [row or [] for row in images]

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        self._prompts = prompts
        ids, images, fields = super()._tokenize_prompts(prompts)
        if self.use_vllm and images is not None:
            self.vllm_generation.name_prompts(ids, self._short_prompts(prompts))
        return ids, self._per_prompt(images), fields

    def _short_prompts(self, prompts: list[Any]) -> list[list[int]]:
        """Return the tokens of prompts whose pictures are one placeholder each, for vLLM."""
        processor, given = cast(Any, self.processing_class), cast(Any, self.chat_template_kwargs)
        texts = processor.apply_chat_template(
            prompts, add_generation_prompt=True, tokenize=False, **given
        )
        tokenizer = self.dual_model.tokenizer
        # As the processor does: a template that writes BOS leaves none for the tokenizer.
        has_bos = tokenizer.bos_token is not None and texts[0].startswith(tokenizer.bos_token)
        return tokenizer(texts, add_special_tokens=not has_bos)["input_ids"]

    def _generate_single_turn(
        self,
        prompt_ids: list[list[int]],
        images: Any,
        multimodal_fields: dict[str, Any],
        num_generations: int,
        has_tool_images: bool = False,
    ) -> tuple[list[list[int]], Any]:
        self.prompts_read = None
        with self._policy_reads(1, keep=True), encoding_distinct(self.dual_model.backbone):
            completions, logprobs = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields, num_generations, has_tool_images
            )
        written = [list(ids) for ids in completions]
        self._marks = self.edit_completions(prompt_ids, completions, num_generations)
        if logprobs is not None:  # of vLLM; TRL takes the trainer's where there is none
            logprobs = [
                row if ids == before else [None] * len(ids)
                for row, ids, before in zip(logprobs, completions, written, strict=True)
            ]
        return completions, logprobs

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: Any = super()._generate_and_score_completions(inputs)
        output |= per_prompt_images(output)
        device = output["completion_ids"].device
        return {**output, **{name: values.to(device) for name, values in self._marks.items()}}

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        indices = [example["record_index"] for example in inputs]
        columns = self.rollout_columns(indices, completion_ids_list)
        scored = [
            {**example, **{name: values[row] for name, values in columns.items()}}
            for row, example in enumerate(inputs)
        ]
        return super()._calculate_rewards(scored, prompts, completions, completion_ids_list)

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL computes, a group's pictures encoded once, and first under ZeRO-3."""
        input_ids: Tensor = args[1]
        if (types := kwargs.get("token_type_ids")) is not None:
            # Where template and tokenizer both write BOS, TRL's processor call has one too many.
            kwargs["token_type_ids"] = types[:, -input_ids.shape[1] :]
        kwargs |= per_prompt_images(kwargs)
        backbone, logits_to_keep = self.dual_model.backbone, args[3]
        with (
            encoding_first(backbone),
            counting_images(backbone, kwargs.get("num_images")),
            encoding_distinct(backbone),
            self._policy_reads(1 + logits_to_keep),
        ):
            logps, *rest = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_inputs is not None:
            logps, self._added_loss = self.shape_loss(logps, self._loss_inputs)
        return (logps, *rest)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        self._loss_inputs, self._added_loss = inputs, None
        try:
            loss: Any = super()._compute_loss(model, inputs)
        finally:
            self._loss_inputs = None
        if self._added_loss is not None:
            loss = loss + self._added_loss / self.current_gradient_accumulation_steps
        return loss


def per_prompt_images(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return `num_images` as TRL must count them; nothing where its own count is right.

    Idefics3 and SmolVLM pad the pictures of each prompt to one row, (N, pictures, 3, H, W), with a
    mask. TRL takes rows for pictures when there happen to be as many of both, and would give
    prompts each other's pictures.
    """
    pixels, mask = batch.get("pixel_values"), batch.get("pixel_attention_mask")
    if pixels is None or pixels.ndim != 5 or mask is None:
        return {}
    return {"num_images": [1] * len(pixels)}
