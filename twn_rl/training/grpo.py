"""GRPO on the reasoning adapter, scored by the frozen embedding adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Sampler

from twn_rl.data.mixture import Mixture, MixtureSampler
from twn_rl.data.record import Record
from twn_rl.modeling.adapters import REASONING_ADAPTER, set_trainable, snapshot_reasoning_adapter
from twn_rl.modeling.gate_files import drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.extras import extra
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.zero import deepspeed_dtype
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.opened_queries import OpenedQueries
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.settings import ScorerSettings
from twn_rl.training.trl_hooks import HookedGRPOTrainer

with extra("train"):
    from datasets import Dataset
    from trl import GRPOConfig  # pyright: ignore[reportPrivateImportUsage]

ROLLOUT_COLUMNS = ("record_index", "record_id", "source", "task", "hops")


@dataclass
class EmbedGRPOConfig(ScorerSettings, GRPOConfig):
    """TRL's GRPO settings plus what the retrieval reward needs."""

    def problems(self) -> list[str]:
        """Return what is wrong with the scorer's fields, and what does not work yet."""
        problems = super().problems()
        if self.use_vllm:
            problems += vllm_problems(self)
        return problems


def check_vllm(args: EmbedGRPOConfig) -> None:
    """See that vLLM is there if it is to be used.

    Raises:
        ModuleNotFoundError: If it is not.
    """
    if args.use_vllm and find_spec("vllm") is None:
        raise ModuleNotFoundError(
            "use_vllm = True, but the module vllm is missing; expected what twn-rl[vllm] brings; "
            "install it in an environment of its own (docs/gpus.md), or set use_vllm to false",
            name="vllm",
        )


def vllm_problems(args: EmbedGRPOConfig) -> list[str]:
    """Return what rollouts by vLLM do not do."""
    problems = []
    if args.vllm_mode == "colocate" and args.vllm_tensor_parallel_size != 1:
        problems.append(
            f"vllm_tensor_parallel_size = {args.vllm_tensor_parallel_size}, expected 1: an engine "
            "beside the trainer has one device; a server may have several (vllm_mode: server)"
        )
    if args.vllm_enable_sleep_mode:
        problems.append(
            "vllm_enable_sleep_mode = True, expected False: it drops the backbone's weights, which "
            "no sync brings back; lower vllm_gpu_memory_utilization"
        )
    mode, is_used = args.vllm_importance_sampling_mode, args.vllm_importance_sampling_correction
    if args.loss_type == "vespo" and is_used and not mode.startswith("token_"):
        problems.append(
            f"vllm_importance_sampling_mode = {mode} with loss_type = vespo, expected "
            "token_truncate or token_mask"
        )
    if args.vllm_structured_outputs_regex is not None:
        problems.append("vllm_structured_outputs_regex is set, expected null: it is not passed on")
    return problems


def place_scorer(model: DualLoraModel, args: Any) -> None:
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


def make_scorer(
    model: DualLoraModel,
    records: Sequence[Record],
    args: Any,
    output: Path,
    *,
    is_shared: bool = False,
) -> RolloutScorer:
    """Return what scores a run's rollouts: the model, frozen and placed, and a bank of targets.

    `args` are `ScorerSettings` and a trainer's. For `is_shared` see `RolloutScorer`.
    """
    freeze_scorer(model)
    place_scorer(model, args)
    is_half = model.backbone.model.dtype == torch.bfloat16
    auto = "bfloat16" if is_half else "float32"
    return RolloutScorer(
        model,
        records,
        args.bank_dir or output / "bank",
        num_negatives=args.num_negatives,
        max_negative_similarity=args.max_negative_similarity,
        batch_size=args.scorer_batch_size,
        chunk_tokens=args.scorer_chunk_tokens,
        bank_dtype=auto if args.bank_dtype == "auto" else args.bank_dtype,
        num_workers=args.dataloader_num_workers,
        processes=join_processes(),
        is_shared=is_shared,
        exact_targets=args.exact_targets,
        num_candidates=args.num_candidates,
        audit_steps=args.audit_steps,
    )


def rollout_dataset(
    model: DualLoraModel, records: Sequence[Record], queries: OpenedQueries | None = None
) -> Dataset:
    """Return TRL's view of the records: prompts, pictures opened on access, columns for rewards."""
    queries = queries or OpenedQueries(model, records)
    renderer, is_multimodal = model.renderer, model.backbone.is_multimodal
    markup = model.backbone.markup(renderer)

    def render(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        drawn = [records[index] for index in batch["record_index"]]
        opened = [queries(index) for index in batch["record_index"]]
        rendered = {
            **batch,
            "record_id": [record.id for record in drawn],
            "source": [record.source for record in drawn],
            "task": [str(record.metadata.get("task", "")) for record in drawn],
            "hops": [record.metadata.get("hops") for record in drawn],
            "prompt": [renderer.messages(q, is_multimodal, markup=markup) for q in opened],
        }
        if is_multimodal:
            rendered["images"] = [renderer.images(query) for query in opened]
        return rendered

    # All else is read when a record is drawn: millions of them would delay the first step.
    return Dataset.from_dict({"record_index": range(len(records))}).with_transform(render)


class EmbedGRPOTrainer(AdapterCheckpoints, HookedGRPOTrainer):
    """TRL's GRPO with retrieval columns for rewards."""

    def __init__(
        self,
        model: DualLoraModel,
        reward_funcs: Sequence[Callable[..., list[float | None]]],
        args: EmbedGRPOConfig,
        records: Sequence[Record],
        scorer: RolloutScorer,
        **kwargs: Any,
    ) -> None:
        """Drop the model's gates, forbid placeholder tokens, and hand the rest to TRL.

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
        self.scorer, self.records = scorer, records
        self.scorer.query_of = queries = OpenedQueries(model, records)
        super().__init__(
            model,
            reward_funcs=list(reward_funcs),
            args=args,
            train_dataset=rollout_dataset(model, records, queries),
            **kwargs,
        )

    def prompt_order(self, batch_size: int) -> Sampler[int] | None:
        """Draw the prompts of a mixture by weight."""
        records = self.records
        if not isinstance(records, Mixture):
            return None
        seed = self.args.seed
        return MixtureSampler(
            records, batch_size=batch_size, seed=seed, epoch=lambda: int(self.state.epoch or 0)
        )

    def rollout_columns(
        self, indices: list[int], completion_ids: list[list[int]]
    ) -> dict[str, list[Any]]:
        """Return the similarity columns, and log the rollouts' quality: hit@1, complete thinks."""
        with self.whole_model():
            columns = self.scorer.columns(indices, completion_ids, self.prompts_read)
        self.prompts_read = None  # it has the memory of a cache
        ranks, baseline = columns["target_rank"], columns["no_think_target_rank"]
        metrics = {
            "rollouts/hit@1": [float(rank == 1) for rank in ranks],
            "rollouts/no_think_hit@1": [float(rank == 1) for rank in baseline],
            "rollouts/think_tokens": [float(count) for count in columns["think_tokens"]],
            "rollouts/incomplete_ratio": [float(not ok) for ok in columns["is_think_complete"]],
            "embedding_variance": columns["embedding_variance"],
        }
        for name in ("margin", "rank"):  # of an audit
            if f"is_other_{name}" in columns:
                differs = columns[f"is_other_{name}"]
                metrics[f"rollouts/other_{name}_ratio"] = [float(other) for other in differs]
        ratios = self.dual_model.limits.counts.take_ratios()
        self.log_means({**metrics, **{name: [ratio] for name, ratio in ratios.items()}})
        return columns
