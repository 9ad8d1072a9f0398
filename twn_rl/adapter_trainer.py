"""What every trainer of adapters does with checkpoints. Knows no losses and no data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twn_rl.checkpoint import load_weights
from twn_rl.model import DualLoraModel


class AdapterCheckpoints:
    """Mixin, before an HF trainer: checkpoints hold adapters and settings, never the backbone.

    Attributes:
        dual_model: The model the trainer trains, unwrapped.
    """

    args: Any
    dual_model: DualLoraModel

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        self.dual_model.save_pretrained(directory, state_dict=state_dict)
        torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.dual_model, resume_from_checkpoint)
