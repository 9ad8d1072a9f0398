"""GRPO on the reasoning adapter, scored by the frozen embedding adapter: TRL plus three hooks.

Knows no reward function and no data format beyond `Record`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from datasets import Dataset
from torch import Tensor
from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

from twn_rl.data.mixture import Mixture, MixtureSampler, ReorderedSampler
from twn_rl.data.record import Item, Record
from twn_rl.modeling.adapters import REASONING_ADAPTER, set_trainable, snapshot_reasoning_adapter
from twn_rl.modeling.collator import fit_item
from twn_rl.modeling.gate_files import drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encoding_first
from twn_rl.runtime.zero import deepspeed_dtype
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.settings import TrainingSettings, at_least

ROLLOUT_COLUMNS = ("record_index", "record_id", "source", "task", "hops")


@dataclass
class EmbedGRPOConfig(TrainingSettings, GRPOConfig):
    """TRL's GRPO settings plus what the retrieval reward needs."""

    num_negatives: int = field(
        default=16, metadata={"help": "K hardest bank negatives handed to the rewards."}
    )
    scorer_batch_size: int = field(
        default=64, metadata={"help": "Items per forward pass while the banks are built."}
    )
    bank_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the target bank; default: <output_dir>/bank. Reused while it fits."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the scorer's fields."""
        return [*super().problems(), *at_least(1, self, "num_negatives", "scorer_batch_size")]


def place_scorer(model: DualLoraModel, args: EmbedGRPOConfig) -> None:
    """Move the model to its device and, under DeepSpeed, cast it as the engine will.

    The bank is made before there is an engine; without this a bfloat16 run would compare rollouts
    in bfloat16 with targets in float32.
    """
    model.to(device=args.device, dtype=deepspeed_dtype(args))


def freeze_scorer(model: DualLoraModel) -> None:
    """Leave only the reasoning adapter trainable; a "kv_detach" scorer keeps a snapshot of it."""
    if model.config.interface == "kv_detach":
        model.prefill_adapter = snapshot_reasoning_adapter(model.peft_model)
    set_trainable(model.peft_model, [REASONING_ADAPTER])


def rollout_dataset(model: DualLoraModel, records: Sequence[Record]) -> Dataset:
    """Return TRL's view of the records: prompts, pictures opened on access, columns for rewards.

    Texts are cut and pictures scaled by the model's limits, as `model.collate` does.
    """
    renderer, limits, is_multimodal = model.renderer, model.limits, model.backbone.is_multimodal
    # Datasets pickles what `render` holds to name itself: the weights must not be among it.
    weightless = replace(model.backbone, model=cast(Any, None))
    # TRL asks for a query once a rollout; measuring it again would process its pictures again.
    kept_characters: dict[int, int] = {}

    def fitted(index: int) -> Item:
        query = records[index].query
        if index in kept_characters:
            text = (query.text or "")[: kept_characters[index]]
            return limits.open(replace(query, text=text or None))
        item = fit_item(weightless, renderer, query, limits)
        kept_characters[index] = len(item.text or "")
        return item

    def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        queries = [fitted(index) for index in batch["record_index"]]
        rendered = {**batch, "prompt": [renderer.messages(q, is_multimodal) for q in queries]}
        if is_multimodal:
            rendered["images"] = [renderer.images(query) for query in queries]
        return rendered

    rows = {
        "record_index": list(range(len(records))),
        "record_id": [record.id for record in records],
        "source": [record.source for record in records],
        "task": [str(record.metadata.get("task", "")) for record in records],
        "hops": [record.metadata.get("hops") for record in records],
    }
    return Dataset.from_dict(rows).with_transform(render)


class EmbedGRPOTrainer(AdapterCheckpoints, GRPOTrainer):
    """TRL's GRPO with retrieval columns for rewards; generation, loss and logging are TRL's own."""

    def __init__(
        self,
        model: DualLoraModel,
        reward_funcs: Sequence[Callable[..., list[float | None]]],
        args: EmbedGRPOConfig,
        records: Sequence[Record],
        scorer: RolloutScorer,
        **kwargs: Any,
    ) -> None:
        """Freeze the scorer, forbid placeholder tokens, and hand the rest to TRL.

        Args:
            model: Warm-started model; its reasoning adapter becomes the policy.
            reward_funcs: From `reward_loading.load_rewards`.
            args: Settings.
            records: What to roll out, the same that `scorer` was built with.
            scorer: Makes the similarity columns.
            **kwargs: For `GRPOTrainer`, such as callbacks.
        """
        drop_gates(model, "RL changes the thoughts", args.output_dir or "OUTPUT_DIR")
        given: Any = args.generation_kwargs or {}
        args.generation_kwargs = {**given, "suppress_tokens": model.suppressed_token_ids}
        super().__init__(
            model=model.peft_model,
            reward_funcs=list(reward_funcs),
            args=args,
            train_dataset=rollout_dataset(model, records),
            processing_class=model.processor,
            **kwargs,
        )
        # TRL may have added a reference adapter, and PEFT makes every new adapter trainable.
        set_trainable(model.peft_model, [REASONING_ADAPTER])
        # TRL gathers pictures for its logs from the processes that have some: others would wait.
        self.log_multimodal = self.log_multimodal and self.accelerator.num_processes == 1
        self.dual_model = model
        self.scorer = scorer

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """Let TRL repeat prompts; those of a mixture are drawn by weight."""
        places: Any = super()._get_train_sampler(dataset)
        if not isinstance(self.scorer.records, Mixture):
            return places
        order = MixtureSampler(
            self.scorer.records,
            batch_size=places.batch_size,
            seed=self.args.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )
        places.num_samples, places.shuffle = len(order), False
        return ReorderedSampler(places, order)

    def _tokenize_prompts(self, prompts: list[Any]) -> Any:
        """Let TRL tokenize; a prompt without pictures beside others has an empty list of them."""
        ids, images, fields = super()._tokenize_prompts(prompts)
        if images is not None and not self.use_vllm:
            images = [row or [] for row in images]
        return ids, images, fields

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        """Return what TRL computes, pictures encoded first under ZeRO-3."""
        pixels = kwargs.get("pixel_values")
        if pixels is not None and pixels.ndim == 5:  # padded to one row a prompt, not a picture
            kwargs["num_images"] = [1] * len(pixels)
        with encoding_first(self.dual_model.backbone):
            return super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _calculate_rewards(
        self,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[list[int]],
    ) -> Tensor:
        """Add the similarity columns to the examples, then let TRL call the rewards."""
        indices = [example["record_index"] for example in inputs]
        with self.whole_model():
            columns = self._rollout_columns(indices, completion_ids_list)
        self._log_rollouts(columns)
        scored = [
            {**example, **{name: values[row] for name, values in columns.items()}}
            for row, example in enumerate(inputs)
        ]
        return super()._calculate_rewards(scored, prompts, completions, completion_ids_list)

    def _rollout_columns(
        self, indices: list[int], completion_ids: list[list[int]]
    ) -> dict[str, list[Any]]:
        """Return what the rewards read of this process's rollouts; other methods add to it."""
        return self.scorer.columns(indices, completion_ids)

    def _log_rollouts(self, columns: dict[str, list[Any]]) -> None:
        """Log the rollouts' quality: sampled hit@1, complete thinks, spread of vectors."""
        ranks, baseline = columns["target_rank"], columns["no_think_target_rank"]
        metrics = {
            "rollouts/hit@1": [float(rank == 1) for rank in ranks],
            "rollouts/no_think_hit@1": [float(rank == 1) for rank in baseline],
            "rollouts/think_tokens": [float(count) for count in columns["think_tokens"]],
            "rollouts/incomplete_ratio": [float(not ok) for ok in columns["is_think_complete"]],
            "embedding_variance": columns["embedding_variance"],
        }
        ratios = self.dual_model.limits.counts.take_ratios()
        self._log_means({**metrics, **{name: [ratio] for name, ratio in ratios.items()}})

    def _log_means(self, metrics: dict[str, list[float]]) -> None:
        """Log the mean of each list over all processes; every process must call this."""
        policy: Any = self.model
        mode = "train" if policy.training else "eval"
        for name, values in metrics.items():
            local = torch.tensor(values, dtype=torch.float32, device=self.accelerator.device).mean()
            everywhere: Any = self.accelerator.gather(local)
            self._metrics[mode][name].append(everywhere.mean().item())
