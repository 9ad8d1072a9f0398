"""Settings that trainers of adapters share: launch, precision, what a contrastive batch is."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SaveStrategy

from twn_rl.runtime.processes import join_processes, launch_precision

HIT_RATES = ("hit@1", "no_think_hit@1")
REWARD = "reward"


def at_least(minimum: int, settings: Any, *names: str) -> list[str]:
    """Return what to say of those fields that are below a minimum."""
    values = {name: getattr(settings, name) for name in names}
    return [f"{n} = {v}, expected >= {minimum}" for n, v in values.items() if v < minimum]


def limit_problems(max_negative_similarity: float | None) -> list[str]:
    """Return what is wrong with the similarity from which on a target is no negative."""
    limit = max_negative_similarity
    if limit is None or -1 < limit <= 1:
        return []
    return [f"max_negative_similarity = {limit}, expected a cosine in (-1, 1] or null"]


def measure_checkpoints(args: Any) -> list[str]:
    """Let a run that chooses between its checkpoints measure each; return what is wrong with that.

    HF would want `eval_strategy` and `eval_steps` as well, which say the same again, and would
    choose by a loss that says little of retrieval.
    """
    problems, metric, saves = [], args.metric_for_best_model, SaveStrategy(args.save_strategy)
    if metric is None and (args.load_best_model_at_end or saves == SaveStrategy.BEST):
        metric = args.metric_for_best_model = "loss"  # HF's default, refused here
    # Only settings of RL have rollouts to reward.
    metrics = (*HIT_RATES, *([REWARD] if hasattr(args, "num_generations") else []))
    if metric not in (None, *metrics):
        problems.append(f"metric_for_best_model = {metric!r}, expected one of {metrics}")
    if metric in HIT_RATES and not args.validation_records:
        problems.append(f"validation_records = 0 with metric_for_best_model = {metric!r}")
    if metric is not None and args.eval_strategy == "no":
        if saves not in (SaveStrategy.STEPS, SaveStrategy.EPOCH):
            problems.append(
                f"save_strategy = {saves.value!r} with metric_for_best_model, expected 'steps' or "
                "'epoch': there must be checkpoints to choose from"
            )
        args.eval_strategy, args.eval_steps = saves.value, args.save_steps
    if args.load_best_model_at_end and args.save_total_limit == 1:
        args.save_total_limit = 2  # HF would delete the last one, by which a finished run is known
    if args.eval_strategy != "no" and getattr(args, "num_generations_eval", 0) is None:
        args.num_generations_eval = 1  # nothing is rolled out, and TRL wants whole groups a batch
    return problems


BANK_DTYPES = ("auto", "float32", "bfloat16")


@dataclass
class TrainingSettings:
    """Mixin, before HF's or TRL's arguments: the launch file and the recipe must agree.

    The process state is made once, by `join_processes`; transformers would throw it away and make
    it anew, without DeepSpeed on a machine without accelerator.
    """

    bf16: bool | None = field(  # pyright: ignore[reportIncompatibleVariableOverride]
        default=None,
        metadata={
            "help": "bfloat16 training; null takes what the launch file says (mixed_precision)."
        },
    )
    accept_other_records: bool = field(
        default=False,
        metadata={
            "help": "Resume although the records, their order or the seed are not those the "
            "checkpoint was trained on."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train although output_dir holds a trained model, which is replaced."},
    )
    license: str | None = field(
        default=None,
        metadata={
            "help": "Licence of the adapters for the model's card, as the hub abbreviates it "
            "(apache-2.0); null says that none is chosen."
        },
    )
    max_negative_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Cosine to the positive target from which on a target is taken for an "
            "unlabelled positive and is no negative, in (-1, 1]; null is off."
        },
    )
    validation_records: int = field(
        default=512,
        metadata={
            "help": "Validation records that hit@1 is measured on with eval_strategy or "
            "metric_for_best_model, spread over the file; 0 is none, for choosing by reward."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the method's own fields; methods add theirs."""
        problems = limit_problems(self.max_negative_similarity)
        return [*problems, *at_least(0, self, "validation_records"), *measure_checkpoints(self)]

    def __post_init__(self) -> None:
        """Check the method's fields, join the processes, then let transformers read the rest.

        Raises:
            ValueError: With all problems of the fields; or if precision is asked for twice and
                differently, or the launch does not fit the machine.
        """
        if problems := self.problems():
            raise ValueError(f"{type(self).__name__}: {'; '.join(problems)}; change these fields")
        args: Any = self
        launched = launch_precision()
        if args.bf16 is None:
            args.bf16 = launched == "bf16" and not args.fp16
        given = "bf16" if args.bf16 else "fp16" if args.fp16 else "no"
        if launched not in (None, "no", given):
            raise ValueError(
                f"bf16 = {args.bf16}, fp16 = {args.fp16} in the recipe and mixed_precision: "
                f"{launched} in the launch file; expected one precision; leave both out of the "
                "recipe's YAML and flags, or change the launch file"
            )
        if args.deepspeed:
            os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        processes = join_processes(use_cpu=bool(args.use_cpu), timeout_seconds=args.ddp_timeout)
        config = args.accelerator_config
        if config is None or isinstance(config, dict):
            args.accelerator_config = {**(config or {}), "use_configured_state": True}
        is_on_cpu = processes.device.type == "cpu"
        args.use_cpu = args.use_cpu or is_on_cpu  # transformers allows bfloat16 there if told so
        super().__post_init__()  # pyright: ignore[reportAttributeAccessIssue]
        if args.deepspeed_plugin is not None and is_on_cpu:
            args.use_cpu = False  # accelerate would skip DeepSpeed; the device is decided
            # A run on the CPU rehearses one on GPUs, where every matrix of a backbone is above the
            # threshold below which DeepSpeed keeps parameters whole: here it partitions them all.
            zero = args.deepspeed_plugin.deepspeed_config["zero_optimization"]
            zero.setdefault("stage3_param_persistence_threshold", 0)


@dataclass
class ScorerSettings(TrainingSettings):
    """Mixin of methods that reward sampled thoughts by retrieval."""

    num_negatives: int = field(
        default=16, metadata={"help": "K hardest bank negatives handed to the rewards."}
    )
    scorer_batch_size: int = field(
        default=64,
        metadata={
            "help": "Items per forward pass while the bank is built; dataloader_num_workers "
            "processes open their pictures."
        },
    )
    scorer_chunk_tokens: int = field(
        default=32_768,
        metadata={
            "help": "Tokens whose keys and values are held at once while rollouts are scored: "
            "each query once, and once more with each of its thoughts."
        },
    )
    bank_dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the bank's vectors on disk and device, float32 or bfloat16; auto is "
            "the backbone's. Products are float32 in any case."
        },
    )
    exact_targets: int | None = field(
        default=None,
        metadata={
            "help": "Largest bank that every rollout is compared with. Above, candidates of each "
            "query are found once and rollouts are compared with these alone; null: never."
        },
    )
    num_candidates: int = field(
        default=1024,
        metadata={"help": "Targets nearest to a query, and to its positive, that are candidates."},
    )
    audit_steps: int = field(
        default=20,
        metadata={
            "help": "Every so many generations candidates are audited against the whole bank: "
            "rollouts/other_margin_ratio and other_rank_ratio are the shares that differ."
        },
    )
    bank_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder of the target bank; default: <output_dir>/bank. Reused while it fits."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the scorer's fields, and with those of other bases."""
        counts = "num_negatives", "scorer_batch_size", "scorer_chunk_tokens", "num_candidates"
        problems = [*super().problems(), *at_least(1, self, *counts, "audit_steps")]
        if self.bank_dtype not in BANK_DTYPES:
            problems.append(f"bank_dtype = {self.bank_dtype!r}, expected one of {BANK_DTYPES}")
        return problems


@dataclass
class ContrastiveConfig(TrainingSettings, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """HF's settings, and what a contrastive batch is."""

    temperature: float = field(
        default=0.02, metadata={"help": "InfoNCE temperature; cosines are divided by it."}
    )
    num_hard_negatives: int = field(
        default=1,
        metadata={"help": "Listed negatives per query that join the in-batch ones; 0 is off."},
    )
    contrastive_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a chunk: the contrastive batch goes through the model chunk by "
            "chunk, twice, and gives the gradient of the whole at the memory of one; raise "
            "per_device_train_batch_size with it. null: the whole batch at once."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the batch's fields."""
        problems = super().problems()
        if self.temperature <= 0:
            problems.append(f"temperature = {self.temperature}, expected > 0")
        problems += at_least(0, self, "num_hard_negatives")
        tokens, accumulated = self.contrastive_chunk_tokens, self.gradient_accumulation_steps
        if tokens is not None and tokens < 1:
            problems.append(f"contrastive_chunk_tokens = {tokens}, expected >= 1 or null")
        if tokens is not None and accumulated != 1:
            problems.append(
                f"gradient_accumulation_steps = {accumulated} with contrastive_chunk_tokens, "
                "expected 1: accumulated batches do not see each other's negatives; raise "
                "per_device_train_batch_size instead, memory does not depend on it"
            )
        return problems

    def __post_init__(self) -> None:
        """Keep records as they are: collators read them."""
        self.remove_unused_columns = False
        super().__post_init__()
