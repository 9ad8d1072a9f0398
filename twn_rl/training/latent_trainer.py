"""Training of latent thoughts: bottleneck warm-up, then joint optimisation, in one trainer.

Knows no decoder weights by name and no data format beyond `Record`; never reads a chain of thought.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from twn_rl.data.record import Record
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, adapter_parameters
from twn_rl.modeling.gate_files import drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.thoughts import evaluating
from twn_rl.runtime.zero import forget_moments, gathered
from twn_rl.training.adapter_trainer import AdapterCheckpoints, RecordTraining
from twn_rl.training.chunked_trainer import ChunkedContrast
from twn_rl.training.chunking import Chunk, Chunks
from twn_rl.training.latent import (
    LatentDecoder,
    LatentLearner,
    check_texts,
    rows_of_others,
    target_text,
    vector_losses,
)
from twn_rl.training.latent_config import LatentConfig
from twn_rl.training.losses import GatheredPairs, gather_with_grad
from twn_rl.training.pair_batches import RecordDataset, SftCollator

DECODER_FILE = "latent_decoder.safetensors"
LORA_GROUP = "lora"


class LatentCollator(SftCollator):
    """Records -> queries, distinct targets, and the words of each query's target."""

    def __init__(self, model: DualLoraModel, args: LatentConfig, *, is_cut: bool = False) -> None:
        """Keep what renders and tokenizes; `is_cut` makes chunks if the settings ask for them."""
        super().__init__(
            model,
            num_hard_negatives=args.num_hard_negatives,
            chunk_tokens=args.contrastive_chunk_tokens if is_cut else None,
        )
        self.caption_field, self.max_tokens = args.caption_field, args.max_target_tokens
        self.needs_text = args.is_reconstructing and args.regression_weight == 0

    def __call__(self, records: list[Record]) -> dict[str, Any]:
        """Return `query`, `target`, `target_rows`, keys as `SftCollator`, and `text`."""
        if self.needs_text:
            check_texts(records, self.caption_field)
        bare = [replace(record, query_cot=None, positive_cot=None) for record in records]
        targets, _, shared = self._targets(bare)
        shared = {key: shared[key] for key in ("target_rows", "target_keys", "query_keys")}
        queries = [record.query for record in records]
        eos = self.model.backbone.eos_token_id
        words = []
        for record in records:
            text = target_text(record, self.caption_field)
            ids = self.model.completion_ids(text)[: self.max_tokens - 1] if text else []
            words.append([*ids, eos] if ids else [])
        if self.chunk_tokens is not None:
            none: list[list[int]] = [[] for _ in targets]
            cut = {
                "query": self.cut(queries, {"text": words}),
                "target": self.cut(targets, {"text": none}),
            }
            return {**shared, "chunks": Chunks(cut)}
        return {
            "query": self.model.collate(queries),
            "text": _as_text(self.model.collate_completions(words)),
            "target": self.model.collate(targets),
            **shared,
        }


def _as_text(completions: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"ids": completions["completion_ids"], "mask": completions["completion_mask"]}


class LatentTrainer(AdapterCheckpoints, ChunkedContrast, RecordTraining, Trainer):
    """HF Trainer over `LatentLearner`; without reason tokens it is the baseline, InfoNCE alone."""

    args: LatentConfig

    def __init__(
        self,
        model: DualLoraModel,
        args: LatentConfig,
        records: Sequence[Record],
        *,
        direct_only: bool = False,
        **kwargs: Any,
    ) -> None:
        """Build head and collator; `kwargs` go to `Trainer`.

        Args:
            model: A model with reason tokens, or without for the baseline.
            args: Hyper-parameters.
            records: What to train on.
            direct_only: Train without latent thoughts, for comparison.
            kwargs: Of HF's trainer.

        Raises:
            ValueError: For no reason tokens, or a target that cannot be reconstructed.
        """
        drop_gates(model, "training changes what it reads", args.output_dir or "OUTPUT_DIR")
        decoder = None
        if not direct_only:
            with torch.random.fork_rng():
                torch.manual_seed(args.seed)
                decoder = LatentDecoder(
                    model.hidden_size,
                    width=args.decoder_width,
                    num_layers=args.decoder_layers,
                    num_heads=args.decoder_heads,
                    max_tokens=args.max_target_tokens,
                ).to(model.device)
            if args.is_reconstructing and args.regression_weight == 0:
                check_texts(records, args.caption_field)
        self.dual_model, self.records = model, records
        self.learner = LatentLearner(model, decoder)
        super().__init__(
            model=self.learner,
            args=args,
            train_dataset=RecordDataset(records),
            data_collator=LatentCollator(model, args, is_cut=True),
            **kwargs,
        )

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the losses, the same however many processes hold the batch."""
        self._enter_stage()
        outputs = model(
            inputs["query"],
            inputs["target"],
            inputs["text"],
            with_no_think=self.args.no_think_weight > 0,
        )
        parts = self._contrastive_losses(outputs, inputs)
        if "nll" in outputs:
            targets = outputs["target"][inputs["target_rows"][: len(outputs["query"])]]
            parts["reconstruction"] = self._reconstruction_loss(outputs, targets, inputs["text"])
        self._log_parts(parts)
        loss = self._weighted(parts)
        return (loss, outputs) if return_outputs else loss

    @property
    def _is_warm_up(self) -> bool:
        return self.learner.decoder is not None and self._done < self.args.warm_up_share

    def _enter_stage(self) -> None:
        """Let LoRA learn or not, as this step's stage has it."""
        self._freeze_lora(self._is_warm_up)
        if self.is_deepspeed_enabled and self.learner.decoder is not None:
            self._hold_lora(self._is_warm_up)
        self._note("is_warm_up", float(self._is_warm_up))

    def _weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        args = self.args
        contrastive, reconstruction = args.contrastive_weight, args.reconstruction_weight
        if self._is_warm_up:
            contrastive = args.warm_up_contrastive_weight
            reconstruction = args.warm_up_reconstruction_weight
        weights = {
            "contrastive": contrastive,
            "reconstruction": reconstruction,
            "no_think": args.no_think_weight,
        }
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def _prepare_chunks(self, inputs: dict[str, Any], chunks: Chunks) -> None:
        self._enter_stage()

    def _chunk_call(
        self,
        kind: str,
        chunk: Chunk,
        prompt: dict[str, Any],
        inputs: dict[str, Any],
        *,
        is_second: bool,
    ) -> dict[str, Any]:
        if kind == "target":
            return {"target": prompt}
        text = send_to_device(_as_text(chunk.completions["text"]), self.args.device)
        return {
            "query": prompt,
            "text": text if is_second else None,
            "with_no_think": self.args.no_think_weight > 0,
        }

    def _chunk_vectors(self, kind: str, outputs: Any) -> dict[str, Tensor]:
        names = ("query", "no_think", "target")
        return {name: outputs[name] for name in names if name in outputs}

    def _row_losses(
        self,
        kind: str,
        outputs: Any,
        chunk: Chunk,
        vectors: Mapping[str, Tensor],
        inputs: dict[str, Any],
    ) -> dict[str, Tensor]:
        if "nll" not in outputs:
            return {}
        rows = chunk.rows.to(vectors["query"].device)
        targets = vectors["target"][inputs["target_rows"][rows]]
        text = {"mask": chunk.completions["text"]["completion_mask"].to(rows.device)}
        share = len(rows) / len(vectors["query"])
        return {"reconstruction": share * self._reconstruction_loss(outputs, targets, text)}

    def _freeze_lora(self, is_frozen: bool) -> None:
        """Let the embedding adapter's LoRA learn or not; rows of reason and read-out always do."""
        for name, parameter in adapter_parameters(
            self.dual_model.peft_model, EMBEDDING_ADAPTER
        ).items():
            if "lora_" in name:
                # Without a gradient the optimizer passes over it: no decay, no momentum.
                parameter.requires_grad_(not is_frozen)

    def _hold_lora(self, is_held: bool) -> None:
        """Make a ZeRO optimizer pass over LoRA in the warm-up as a plain one does.

        It steps frozen parameters with zero gradients: no decay while it does, and no memory of it
        at the first step that LoRA takes part in.
        """
        if self.args.warm_up_share == 0:
            return
        inner = self.model_wrapped.optimizer.optimizer
        names = [group.get("name") for group in inner.param_groups]
        if LORA_GROUP not in names:
            raise ValueError(
                f"the DeepSpeed file names an optimizer, with warm_up_share = "
                f"{self.args.warm_up_share}; expected the trainer's own, which can pass over LoRA "
                "in the warm-up; take `optimizer` out of the file or set warm_up_share to 0"
            )
        group = names.index(LORA_GROUP)
        inner.param_groups[group]["weight_decay"] = 0.0 if is_held else self.args.weight_decay
        before = (self.state.global_step - 1) / max(1, self.state.max_steps)
        if not is_held and 0 <= before < self.args.warm_up_share:
            forget_moments(self.model_wrapped, group)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """Give the optimizer LoRA too, as a group of its own.

        What is frozen when it is made would never be trained.
        """
        self._freeze_lora(False)
        is_new = self.optimizer is None
        optimizer: Any = super().create_optimizer(*args, **kwargs)
        if is_new and self.learner.decoder is not None and hasattr(optimizer, "add_param_group"):
            adapter = adapter_parameters(self.dual_model.peft_model, EMBEDDING_ADAPTER)
            lora = {id(p): p for name, p in adapter.items() if "lora_" in name}
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in lora]
            shared = {k: v for k, v in optimizer.param_groups[0].items() if k != "params"}
            optimizer.add_param_group({**shared, "params": list(lora.values()), "name": LORA_GROUP})
        return optimizer

    def _contrastive_losses(
        self, vectors: dict[str, Tensor], inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        pairs = GatheredPairs.of(inputs["query_keys"], inputs["target_keys"])
        targets = pairs.gather_targets(vectors["target"][inputs["target_rows"]])
        pairs = pairs.without_twins(targets, self.args.max_negative_similarity)
        parts = {}
        for part, name in (("contrastive", "query"), ("no_think", "no_think")):
            if name in vectors:
                queries = gather_with_grad(vectors[name])
                parts[part] = pairs.loss(queries, targets, temperature=self.args.temperature)
                self._note(f"in_batch_hit@1_{part}", float(pairs.accuracy(queries, targets)))
        return parts

    def _reconstruction_loss(
        self, outputs: dict[str, Tensor], targets: Tensor, text: dict[str, Tensor]
    ) -> Tensor:
        """Return the mean over queries of words' NLL, or of the regression where there are none.

        All processes hold as many queries, so DDP's mean over them is the mean over all.
        """
        regression = vector_losses(outputs["vector"], targets)
        has_text = text["mask"].any(1)
        weight = self.args.regression_weight
        return torch.where(has_text, outputs["nll"], weight * regression).mean()

    @torch.no_grad()
    def check_reconstruction(
        self, records: Sequence[Record], *, batch_size: int = 64
    ) -> dict[str, float]:
        """Return how well the head says held-out targets from their own and from other states.

        Where both are alike, the reason states carry nothing of the target. Other states are those
        of the next query of the batch with another target.

        Returns:
            `reconstruction_own`, `reconstruction_shuffled` (nats a word, with text),
            `word_accuracy_own`, `_shuffled`, `regression_own`, `_shuffled` (1 - cosine, without).
        """
        found: dict[str, list[Tensor]] = {}
        collate = LatentCollator(self.dual_model, self.args)
        with self.whole_model(), evaluating(self.learner):
            for start in range(0, len(records), batch_size):
                part = [records[i] for i in range(start, min(start + batch_size, len(records)))]
                batch: Any = self._prepare_inputs(collate(part))  # pyright: ignore[reportArgumentType]
                self._check_batch(batch, found)
        return {name: float(torch.cat(v).mean()) for name, v in found.items() if sum(map(len, v))}

    def _check_batch(self, batch: dict[str, Any], found: dict[str, list[Tensor]]) -> None:
        dual, count = self.dual_model, len(batch["query_keys"])
        kind = "latent" if dual.config.latent_documents else "embed"
        states = dual(latent={"query": batch["query"]})["reason_states"]["query"]
        targets = dual(**{kind: {"target": batch["target"]}})["embeds"]["target"]
        targets = targets[batch["target_rows"][:count]]
        keys = batch["target_keys"][:count]
        others = rows_of_others(keys.cpu()).to(keys.device)
        is_fair = keys[others] != keys
        has_text = batch["text"]["mask"].any(1)
        for name, rows in (("own", torch.arange(count)), ("shuffled", others)):
            said = self.learner.decode(states[rows], batch["text"])
            regression = vector_losses(said["vector"], targets)
            for key, values, kept in (
                ("reconstruction", said["nll"], has_text),
                ("word_accuracy", said["is_right"], has_text),
                ("regression", regression, ~has_text),
            ):
                found.setdefault(f"{key}_{name}", []).append(values[kept & is_fair].cpu())

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Save the model; its head only in checkpoints to resume from, serving needs none."""
        directory = Path(output_dir or self.args.output_dir or ".")
        decoder = self.learner.decoder
        super()._save(str(directory))
        if decoder is None or not directory.name.startswith(PREFIX_CHECKPOINT_DIR):
            return
        with gathered(list(decoder.parameters())):
            weights = {key: value.cpu().clone() for key, value in decoder.state_dict().items()}
        if self.args.should_save:
            save_file(weights, directory / DECODER_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        path = Path(resume_from_checkpoint) / DECODER_FILE
        if self.learner.decoder is None:
            return
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist; expected the decoder head to resume with; resume from a "
                "checkpoint-N folder of this recipe, not from a model saved for serving"
            )
        self.learner.decoder.load_state_dict(load_file(path))
