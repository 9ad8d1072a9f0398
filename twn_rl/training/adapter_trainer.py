"""What all trainers of adapters share: checkpoints of adapters alone, and which of them is kept."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, HubStrategy, rotate_checkpoints

from twn_rl.data.record import Record
from twn_rl.modeling.checkpoint import load_weights, moments_bytes, stored_bytes
from twn_rl.modeling.publishing import push_folder
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import gather_objects, join_processes
from twn_rl.runtime.whole_files import full_disk_told, read_json, write_json
from twn_rl.training.engine_trainer import EngineTrainer
from twn_rl.training.seen_records import RECORDS_FILE, describe_records, what_changed
from twn_rl.training.settings import REWARD
from twn_rl.training.whole_checkpoints import final_checkpoint, is_finished, seal

logger = logging.getLogger(__name__)


class AdapterCheckpoints(EngineTrainer):
    """First base of a trainer: checkpoints hold adapters and settings, never the backbone.

    Attributes:
        records: What it is trained on.
    """

    records: Sequence[Record]

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
            self._load_from_checkpoint(str(final_checkpoint(Path(resume), self.args)))
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

    def set_initial_training_values(self, args: Any, dataloader: Any) -> Any:
        """Let HF count the steps of the run.

        Raises:
            ValueError: If there are none: it would end at once and save what it was given.
        """
        if not len(dataloader):
            generations = getattr(args, "num_generations", 1)
            rollouts = f" of {generations} rollouts each" if generations > 1 else ""
            rows = self.get_total_train_batch_size(args)
            rows = getattr(args, "generation_batch_size", None) or rows
            raise ValueError(
                f"{len(self.records)} records, and a step takes {rows // generations}{rollouts}; "
                "expected at least as many: no step would be made; add records, or lower "
                "per_device_train_batch_size or gradient_accumulation_steps"
            )
        values = super().set_initial_training_values(args, dataloader)
        if values[-1] < 1:
            raise ValueError(
                f"max_steps = {args.max_steps}, num_train_epochs = {args.num_train_epochs}; "
                "expected at least one step; raise one of them"
            )
        return values

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Return and log the model's hit rates on validation records, in RL the reward, too.

        The first process measures, the others wait. The reward is the mean of what was logged since
        the measurement before, that of the rollouts on the way here. Other data sets than a
        `Validation` are HF's business.
        """
        measure = getattr(
            self.eval_dataset if eval_dataset is None else eval_dataset, "measure", None
        )
        if measure is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        found: dict[str, float] = {}
        with self.whole_model():
            if join_processes().is_main_process:
                found = measure(self.dual_model)
            found = gather_objects(found)[0]
        if (reward := _mean_reward(self.state.log_history)) is not None:
            found[REWARD] = reward
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in found.items()}
        # TRL's and our own logs would add what they have gathered of training.
        Trainer.log(self, dict(metrics))
        told = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
        logger.log(NOTICE, "Step %d: validation: %s", self.state.global_step, told)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def _load_best_model(self) -> None:
        """Take the best checkpoint's weights, on every engine, and say which it is."""
        state = self.state
        best = Path(str(state.best_model_checkpoint))
        if self.is_deepspeed_enabled:
            self._load_engine(str(best))
        else:
            self._load_from_checkpoint(str(best))
        name = self.args.metric_for_best_model
        values = [row[f"eval_{name}"] for row in state.log_history if f"eval_{name}" in row]
        logger.log(
            NOTICE,
            "The model is that of step %d of %d, the best by %s: %.3f; at the end it was %.3f",
            *(state.best_global_step, state.global_step, name, state.best_metric, values[-1]),
        )

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


def _mean_reward(logs: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the mean reward since the last measurement; None if none was logged."""
    rewards: list[float] = []
    for row in reversed(logs):
        if any(name.startswith("eval_") for name in row):
            break
        if row.get(REWARD) is not None:
            rewards.append(row[REWARD])
    return sum(rewards) / len(rewards) if rewards else None
