"""Settings that trainers of adapters share: launch, precision, what a contrastive batch is.

Knows no losses: each method's configuration takes them in beside its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from twn_rl.runtime.processes import join_processes, launch_precision


@dataclass
class LaunchSettings:
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

    def __post_init__(self) -> None:
        """Join the processes, then let transformers read the rest.

        Raises:
            ValueError: If precision is asked for twice and differently, or the launch does not fit
                the machine.
        """
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
class ContrastiveSettings:
    """Mixin, before HF's arguments: what a contrastive batch is, for every method that has one."""

    temperature: float = field(
        default=0.02, metadata={"help": "InfoNCE temperature; cosines are divided by it."}
    )
    num_hard_negatives: int = field(
        default=1,
        metadata={"help": "Listed negatives per query that join the in-batch ones; 0 is off."},
    )
    max_negative_similarity: float | None = field(
        default=None,
        metadata={
            "help": "Cosine to the positive target from which on a target is taken for an "
            "unlabelled positive and is no negative; null is off."
        },
    )
    contrastive_chunk_tokens: int | None = field(
        default=None,
        metadata={
            "help": "Tokens of a chunk: the contrastive batch goes through the model chunk by "
            "chunk, twice, and gives the gradient of the whole at the memory of one; raise "
            "per_device_train_batch_size with it. null: the whole batch at once."
        },
    )

    def contrastive_problems(self) -> list[str]:
        """Return what is wrong with these fields."""
        args: Any = self
        problems = []
        if self.temperature <= 0:
            problems.append(f"temperature = {self.temperature}, expected > 0")
        if self.num_hard_negatives < 0:
            problems.append(f"num_hard_negatives = {self.num_hard_negatives}, expected >= 0")
        limit, tokens = self.max_negative_similarity, self.contrastive_chunk_tokens
        if limit is not None and not -1 < limit <= 1:
            problems.append(f"max_negative_similarity = {limit}, expected a cosine in (-1, 1]")
        if tokens is not None and tokens < 1:
            problems.append(f"contrastive_chunk_tokens = {tokens}, expected >= 1 or null")
        if tokens is not None and args.gradient_accumulation_steps != 1:
            problems.append(
                f"gradient_accumulation_steps = {args.gradient_accumulation_steps} with "
                "contrastive_chunk_tokens, expected 1: accumulated batches do not see each other's "
                "negatives; raise per_device_train_batch_size instead, memory does not depend on it"
            )
        return problems
