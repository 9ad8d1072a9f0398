"""What is different under DeepSpeed ZeRO: parameters in parts, engines, their files and optimizers.

Knows no losses and no launch; without DeepSpeed everything here does nothing.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn


def is_sharded(parameter: Any) -> bool:
    """Return whether a parameter belongs to ZeRO-3, which keeps a part of it on each process."""
    return hasattr(parameter, "ds_id")


def parameter_count(parameter: Any) -> int:
    """Return how many numbers a parameter has, on all processes together."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Make parameters whole in the body under ZeRO-3, where every process must enter."""
    if not any(is_sharded(parameter) for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def deepspeed_dtype(args: Any) -> torch.dtype | None:
    """Return the type a DeepSpeed engine casts every parameter to; None without DeepSpeed.

    Args:
        args: HF training arguments.
    """
    if getattr(args, "deepspeed_plugin", None) is None:
        return None
    config = args.deepspeed_plugin.deepspeed_config
    for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        enabled = config.get(name, {}).get("enabled", False)
        if getattr(args, name) if enabled == "auto" else enabled:
            return dtype
    return torch.float32


def fill_auto_sizes(config: dict[str, Any], hidden_size: int) -> None:
    """Replace a DeepSpeed file's `auto` sizes by transformers' rules, in place.

    transformers looks for the width in the config of the model it is given, and ours is its own.

    >>> config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": "auto"}}
    >>> fill_auto_sizes(config, 64)
    >>> config["zero_optimization"]["reduce_bucket_size"]
    4096
    """
    sizes = {
        "reduce_bucket_size": hidden_size * hidden_size,
        "stage3_prefetch_bucket_size": int(0.9 * hidden_size * hidden_size),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }
    zero = config["zero_optimization"]
    zero.update({name: size for name, size in sizes.items() if zero.get(name) == "auto"})


def describe_engine(engine: Any) -> str:
    """Return in words what an engine keeps in parts; under ZeRO-3 that should be everything big."""
    parameters = list(engine.module.parameters())
    parts = sum(is_sharded(p) and not p.ds_persist for p in parameters)
    stage = engine.zero_optimization_stage()
    return (
        f"{type(engine).__name__}, ZeRO-{int(stage)} on {engine.dp_world_size} processes, "
        f"{parts} of {len(parameters)} parameters partitioned"
    )


def save_trained_only(engine: Any) -> None:
    """Let an engine's checkpoints hold what is trained and nothing frozen.

    DeepSpeed leaves a frozen table in when another name is tied to it: of a 2B backbone that would
    be 600 MB a checkpoint.
    """
    state_dict = engine.module_state_dict

    def trained(*args: Any, **kwargs: Any) -> dict[str, Any]:
        named = engine.module.named_parameters(remove_duplicate=False)
        frozen = {name for name, parameter in named if not parameter.requires_grad}
        kept = state_dict(*args, **kwargs).items()
        return {name: value for name, value in kept if name not in frozen}

    engine.module_state_dict = trained
    engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)


def forget_moments(engine: Any, group: int) -> None:
    """Let one parameter group's optimizer state start anew, as if it had never been stepped.

    A plain optimizer passes over parameters without gradient; a ZeRO optimizer steps its flat
    partition with zeros, which leaves Adam's moments at 0 and its bias correction too far on.

    Args:
        engine: A ZeRO-2 or ZeRO-3 engine.
        group: Position among the parameter groups the trainer made.
    """
    zero = engine.optimizer
    if hasattr(zero, "fp32_partitioned_groups_flat"):  # ZeRO-3 cuts groups into sub-groups
        owners = zero.sub_group_to_group_id
        flats = zero.fp32_partitioned_groups_flat
        parts = [flats[number] for number, owner in owners.items() if owner == group]
    else:
        parts = [zero.single_partition_of_fp32_groups[group]]
    for part in parts:
        zero.optimizer.state.pop(part, None)
