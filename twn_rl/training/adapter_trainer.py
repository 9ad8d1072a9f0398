"""What all trainers of adapters share: checkpoints of adapters alone, under any engine."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from transformers import Trainer
from transformers.integrations.deepspeed import set_hf_deepspeed_config
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from twn_rl.data.record import Record
from twn_rl.modeling.checkpoint import load_weights, moments_bytes, stored_bytes
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.publishing import push_folder
from twn_rl.runtime.extras import extra
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import check_engaged, gather_objects, join_processes
from twn_rl.runtime.whole_files import full_disk_told, read_json, write_json
from twn_rl.runtime.zero import (
    deepspeed_dtype,
    describe_engine,
    fill_auto_sizes,
    save_trained_only,
)
from twn_rl.training.seen_records import RECORDS_FILE, describe_records, what_changed
from twn_rl.training.whole_checkpoints import is_finished, seal

with extra("train"):
    from trl.models.utils import unwrap_model_for_generation

logger = logging.getLogger(__name__)
ENGINE_FILE = "deepspeed.json"


class AdapterCheckpoints(Trainer):
    """First base of a trainer: checkpoints hold adapters and settings, never the backbone.

    It also sees to it that what the launch asked for is what runs.

    Attributes:
        dual_model: The model the trainer trains, unwrapped.
        records: What it is trained on.
    """

    args: Any
    accelerator: Any
    model_wrapped: Any  # the engine, where there is one
    dual_model: DualLoraModel
    records: Sequence[Record]

    def create_accelerator_and_postprocess(self) -> None:
        """Let HF make the accelerator of this trainer, not of one that ran before it."""
        AcceleratorState._reset_state()
        if self.args.deepspeed:
            set_hf_deepspeed_config(self.args.hf_deepspeed_config)
        super().create_accelerator_and_postprocess()
        check_engaged(self)

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: Any = None,
    ) -> Any:
        """Let HF train; of a finished run only the weights are read back."""
        resume = resume_from_checkpoint
        self._describe_records(Path(resume) if isinstance(resume, str | Path) else None)
        if isinstance(resume, str | Path) and is_finished(Path(resume), self.args):
            logger.log(NOTICE, "%s is the end of this run: nothing is left to train", resume)
            self._load_from_checkpoint(str(resume))
            return None
        return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """Let HF do a step, and end the run where its loss is not finite.

        Raises:
            FloatingPointError: With the step, and the weights that are not finite.
        """
        try:
            loss: Tensor = super().training_step(*args, **kwargs)
        except RuntimeError as error:  # of sampling, whose probabilities were none
            if not self._not_finite():
                raise
            raise self._no_number(str(error)) from error
        if not torch.isfinite(loss):
            raise self._no_number(f"loss = {loss.item()}, expected a finite number")
        return loss

    def _not_finite(self) -> list[str]:
        """Return the names of the trained tensors of this process that hold NaN or infinity."""
        named = self.dual_model.named_parameters()
        return [name for name, p in named if p.requires_grad and not torch.isfinite(p).all()]

    def _no_number(self, what: str) -> FloatingPointError:
        bad = self._not_finite()
        return FloatingPointError(
            f"step {self.state.global_step + 1}: {what}; {len(bad)} trained tensors are not finite"
            f"{': ' if bad else ''}{', '.join(bad[:3])}; nothing is saved; lower learning_rate, "
            "raise warmup_steps, or resume from the last checkpoint"
        )

    def _describe_records(self, checkpoint: Path | None) -> None:
        """Note what this run is trained on, which must be what a checkpoint was trained on."""
        change, self._described = None, {}
        if join_processes().is_main_process:
            self._described = describe_records(self.records, self.args.data_seed or self.args.seed)
            stored = read_json(checkpoint / RECORDS_FILE) if checkpoint else None
            change = what_changed(stored, self._described) if stored else None
        change = gather_objects(change)[0]
        if change is None:
            return
        said = f"{checkpoint} was trained on other records: {change}"
        if not self.args.accept_other_records:
            raise ValueError(
                f"{said}; expected the same: its steps would count for records that it has not "
                "seen; resume on the old ones, start anew from its adapters (--checkpoint or "
                "--warm_start), or pass --accept_other_records true"
            )
        logger.warning("%s: accepted", said)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let HF save a checkpoint, seal it, and only then delete older ones."""
        folder = Path(self._get_output_dir(trial=trial))
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        model_bytes = stored_bytes(self.dual_model) + moments_bytes(self.dual_model)
        needed = model_bytes + 100_000  # random states, settings and the like
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            with full_disk_told(checkpoint, needed):
                super()._save_checkpoint(model, trial)
                if self.args.should_save:
                    write_json(checkpoint / RECORDS_FILE, self._described)
                join_processes().wait_for_everyone()  # all have written their parts
                if self.args.should_save:
                    seal(checkpoint)
        except OSError:
            if self.args.should_save:  # half of a checkpoint would keep the disk full
                shutil.rmtree(checkpoint, ignore_errors=True)
            raise
        finally:
            self.args.save_total_limit = limit
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(folder),
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
            )

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

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write both adapters and the settings; every process must call this.

        Under ZeRO-3 the adapters alone are gathered, never the backbone.
        """
        directory = Path(output_dir or self.args.output_dir or ".")
        with full_disk_told(directory, stored_bytes(self.dual_model)):
            self._save(output_dir)
        join_processes().wait_for_everyone()  # what comes next may read it

    def push_to_hub(
        self,
        commit_message: str | None = "End of training",
        blocking: bool = True,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Upload the model in the run's folder and its card; nothing else of the run leaves it.

        Recipes call it when they are done, evaluation included. The first process uploads, and gets
        the address. What is None is taken from the run's settings.

        Raises:
            ValueError: If it shall not wait for the upload, or is given fields of HF's own card.
        """
        if kwargs or not blocking:
            raise ValueError(
                f"push_to_hub: blocking = {blocking}, fields of a card {sorted(kwargs)}; expected "
                "blocking = True and no more fields: the card is made from the run's files"
            )
        message = commit_message or "End of training"
        return self._push(Path(self.args.output_dir), message, token, revision, private)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload a checkpoint's model while training goes on, unless only the end is asked for."""
        if self.args.hub_strategy != HubStrategy.END:
            self._push(Path(checkpoint_folder), f"Step {self.state.global_step}")

    def _push(
        self,
        folder: Path,
        commit_message: str,
        token: str | None = None,
        revision: str | None = None,
        private: bool | None = None,
    ) -> str | None:
        if not self.is_world_process_zero():
            return None
        if self.hub_model_id is None:
            self.init_hf_repo()
        address = push_folder(
            folder,
            str(self.hub_model_id),
            commit_message=commit_message,
            token=token or self.args.hub_token,
            private=self.args.hub_private_repo if private is None else private,
            revision=revision or self.args.hub_revision,
        )
        logger.log(NOTICE, "%s is pushed: %s", folder, address)
        return address

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        directory = Path(output_dir or self.args.output_dir or ".")
        self.dual_model.save_pretrained(directory)
        if self.args.should_save:
            torch.save(self.args, directory / "training_args.bin")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_weights(self.dual_model, resume_from_checkpoint)

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
        loaded, _ = engine.load_checkpoint(resume, load_module_strict=False)
        if loaded is None:
            raise ValueError(
                f"{resume} holds no readable state of a DeepSpeed engine; expected a checkpoint-N "
                "folder that a killed run left; resume from an older one"
            )
        self._load_optimizer_and_scheduler(resume)
        self._load_scaler(resume)
        return prepared

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
