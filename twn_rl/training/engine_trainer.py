"""What a trainer of adapters does with its engine: none, DDP or DeepSpeed, by the launch."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState
from transformers import Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config

from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.extras import extra
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import check_engaged
from twn_rl.runtime.whole_files import read_json, write_json
from twn_rl.runtime.zero import (
    deepspeed_dtype,
    describe_engine,
    fill_auto_sizes,
    save_trained_only,
)

with extra("train"):
    from trl.models.utils import unwrap_model_for_generation

logger = logging.getLogger(__name__)
ENGINE_FILE = "deepspeed.json"


class EngineTrainer(Trainer):
    """Sees to it that what the launch asked for is what runs; its state holds no backbone.

    Attributes:
        dual_model: The model the trainer trains, unwrapped.
    """

    args: Any
    accelerator: Any
    model_wrapped: Any  # the engine, where there is one
    dual_model: DualLoraModel

    def create_accelerator_and_postprocess(self) -> None:
        """Let HF make the accelerator of this trainer, not of one that ran before it."""
        AcceleratorState._reset_state()
        if self.args.deepspeed:
            set_hf_deepspeed_config(self.args.hf_deepspeed_config)
        super().create_accelerator_and_postprocess()
        check_engaged(self)

    @property
    def is_zero3(self) -> bool:
        """Whether every process holds a part of each parameter only."""
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        return plugin is not None and plugin.zero_stage == 3

    @contextmanager
    def whole_model(self) -> Iterator[None]:
        """Gather the weights in the body, so that the model can be called outside of the engine.

        Inside, the processes need not stay in step. Without ZeRO-3 nothing happens.
        """
        if not self.is_zero3:
            yield
            return
        with unwrap_model_for_generation(
            self.model_wrapped,
            self.accelerator,
            gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
        ):
            yield

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Write what resuming needs besides the adapters, and what an engine's files are of."""
        super()._save_optimizer_and_scheduler(output_dir)
        if self.is_deepspeed_enabled and self.args.should_save:
            write_json(Path(output_dir) / ENGINE_FILE, self._engine_layout())

    def _prepare_for_training(
        self, max_steps: int, train_dataloader: Any, resume_from_checkpoint: str | None
    ) -> Any:
        """Let HF wrap the model; an engine goes on from its own files, which hold no backbone."""
        resume = resume_from_checkpoint
        if resume is not None:
            self._check_layout(Path(resume))
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume)
        fill_auto_sizes(
            self.accelerator.state.deepspeed_plugin.deepspeed_config, self.dual_model.hidden_size
        )
        if resume is not None:
            self._load_from_checkpoint(resume)  # also what is frozen, before it is taken apart
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.model_wrapped
        save_trained_only(engine)
        logger.log(NOTICE, "%s", describe_engine(engine))
        if resume is None:
            return prepared
        self._load_engine(resume)
        self._load_optimizer_and_scheduler(resume)
        self._load_scaler(resume)
        return prepared

    def _load_engine(self, checkpoint: str) -> None:
        loaded, _ = self.model_wrapped.load_checkpoint(checkpoint, load_module_strict=False)
        if loaded is None:
            raise ValueError(
                f"{checkpoint} holds no readable state of a DeepSpeed engine; expected a "
                "checkpoint-N folder that a killed run left; resume from an older one"
            )

    def _engine_layout(self) -> dict[str, Any]:
        """Return what the files of an engine depend on; {} without DeepSpeed."""
        if not self.is_deepspeed_enabled:
            return {}
        plugin = self.accelerator.state.deepspeed_plugin
        return {
            "zero_stage": int(plugin.zero_stage),
            "num_processes": self.accelerator.num_processes,
            "dtype": str(deepspeed_dtype(self.args)).removeprefix("torch."),
        }

    def _check_layout(self, checkpoint: Path) -> None:
        stored, own = read_json(checkpoint / ENGINE_FILE) or {}, self._engine_layout()
        if stored != own:
            raise ValueError(
                f"resume_from_checkpoint = {checkpoint} was saved by {_layout_name(stored)} and "
                f"this run is {_layout_name(own)}; expected the same, an optimizer's state fits no "
                "other; launch as before, or start anew from its adapters, which any launch can "
                "load (--checkpoint or --warm_start), without the optimizer's state"
            )


def _layout_name(layout: Mapping[str, Any]) -> str:
    if not layout:
        return "a run without DeepSpeed"
    return "ZeRO-{zero_stage} on {num_processes} processes in {dtype}".format(**layout)
