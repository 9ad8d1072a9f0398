"""What trainers of adapters share: checkpoints, mixtures, logged means. Knows no losses."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twn_rl.checkpoint import load_weights
from twn_rl.mixtures import Mixture, MixtureSampler
from twn_rl.model import DualLoraModel
from twn_rl.records import Record


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


class RecordTraining:
    """Mixin, before an HF trainer: batches of a mixture's sources, means of what was noted.

    Attributes:
        records: What is trained on.
    """

    args: Any
    accelerator: Any
    state: Any
    _train_batch_size: int
    records: Sequence[Record]

    @cached_property
    def _noted(self) -> dict[str, list[float]]:
        return defaultdict(list)

    def _note(self, name: str, value: float) -> None:
        """Keep a value for the next log, which shows the mean."""
        self._noted[name].append(value)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draw a mixture's sources by weight, one a global batch; else as HF does."""
        records = self.records
        if not isinstance(records, Mixture):
            return super()._get_train_sampler(train_dataset)  # pyright: ignore[reportAttributeAccessIssue]
        processes = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return MixtureSampler(
            records,
            batch_size=self._train_batch_size * processes,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was noted since the last log."""
        means = {name: sum(values) / len(values) for name, values in self._noted.items() if values}
        self._noted.clear()
        super().log({**logs, **means}, start_time)  # pyright: ignore[reportAttributeAccessIssue]
