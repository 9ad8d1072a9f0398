"""Settings that every trainer of adapters shares: how it is launched, how precisely it counts.

Knows no losses: each method's configuration takes them in beside its own.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from twn_rl.processes import join_processes, launch_precision


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
