"""What tests of trainers share: a small model, settings of a short run on CPU, what moved."""

from typing import Any

import torch
from tiny_backbones import awaken, make_idefics3
from torch import Tensor

from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

SHORT_RUN = {
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": [],
    "use_cpu": True,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
}


def small_model(seed: int = 0, **settings: Any) -> DualLoraModel:
    """Return a tiny Idefics3 whose adapters change every output, ready to train."""
    settings = {
        "reasoning_lora": LoraSettings(r=2, alpha=4),
        "embedding_lora": LoraSettings(r=3, alpha=6),
        "num_readout_tokens": 3,
        **settings,
    }
    model = DualLoraModel.from_backbone(make_idefics3(), TwnConfig(**settings), seed=seed)
    awaken(model, seed)
    return model


def weights(model: DualLoraModel) -> dict[str, Tensor]:
    """Return a copy of everything."""
    return {name: p.detach().clone() for name, p in model.peft_model.named_parameters()}


def moved(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    """Return the names of what is not the same to the bit."""
    return {name for name in before if not torch.equal(before[name], after[name])}
