"""An adapter that acts on the last tokens only, by a gate on LoRA's update: slow and plain."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from twn_rl.modeling.adapters import use_adapter
from twn_rl.modeling.model import DualLoraModel


@contextmanager
def gated_lora(model: DualLoraModel, adapter: str, num_tokens: int) -> Iterator[None]:
    """Let `adapter` act on the last `num_tokens` columns of whole forwards in the body."""

    def gate(layer: Any, args: tuple[torch.Tensor, ...], _: torch.Tensor) -> torch.Tensor:
        update = layer.lora_B[adapter](layer.lora_A[adapter](args[0])) * layer.scaling[adapter]
        columns = torch.arange(args[0].shape[1]) >= args[0].shape[1] - num_tokens
        return layer.base_layer(args[0]) + update * columns[None, :, None]

    layers = [module for module in model.peft_model.modules() if hasattr(module, "lora_A")]
    handles = [layer.register_forward_hook(gate) for layer in layers if len(layer.lora_A)]
    assert handles
    try:
        with use_adapter(model.peft_model, adapter):
            yield
    finally:
        for handle in handles:
            handle.remove()
