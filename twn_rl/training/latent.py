"""Training of latent thoughts (LaME, arXiv 2606.13061), in one trainer without chains of thought.

First a bottleneck warm-up, in which LoRA is frozen, then joint optimisation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from twn_rl.data.record import Record
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, adapter_parameters
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.tensor_files import read_tensors
from twn_rl.runtime.zero import forget_moments, gathered
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.chunking import Chunk
from twn_rl.training.contrastive_trainer import Batch, ContrastiveTrainer, Tensors
from twn_rl.training.latent_decoder import (
    LatentDecoder,
    LatentLearner,
    rows_of_others,
    vector_losses,
)
from twn_rl.training.losses import gather_with_grad
from twn_rl.training.pair_batches import LatentCollator, check_texts
from twn_rl.training.settings import ContrastiveConfig, at_least

DECODER_FILE = "latent_decoder.safetensors"
LORA_GROUP = "lora"


@dataclass
class LatentConfig(ContrastiveConfig):
    """Hyper-parameters of LaME; the paper publishes no weights, these are our reading of it."""

    warm_up_share: float = field(
        default=0.15,
        metadata={
            "help": "Share of the steps of the bottleneck warm-up, in which LoRA is frozen and "
            "reason tokens, read-outs and decoder train; 0 is off."
        },
    )
    warm_up_reconstruction_weight: float = field(
        default=1.0, metadata={"help": "Weight of the reconstruction in the warm-up; 0 is off."}
    )
    warm_up_contrastive_weight: float = field(
        default=0.3, metadata={"help": "Weight of InfoNCE in the warm-up; 0 is off."}
    )
    reconstruction_weight: float = field(
        default=0.3, metadata={"help": "Weight of the reconstruction after it; 0 is off."}
    )
    contrastive_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE after the warm-up; 0 is off."}
    )
    regression_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight, inside the reconstruction, of 1 - cosine to the detached vector of a "
            "target without text or caption; 0 is off and refuses such targets."
        },
    )
    no_think_weight: float = field(
        default=0.0,
        metadata={
            "help": "Weight of InfoNCE(query without reason tokens, target), which keeps the mode "
            "never usable; 0 is off."
        },
    )
    caption_field: str = field(
        default="caption", metadata={"help": "Metadata field with the words of a picture target."}
    )
    decoder_layers: int = field(default=2, metadata={"help": "Layers of the decoder head."})
    decoder_width: int = field(default=256, metadata={"help": "Width of the decoder head."})
    decoder_heads: int = field(default=4, metadata={"help": "Attention heads of the decoder."})
    max_target_tokens: int = field(
        default=64, metadata={"help": "Words of a target to reconstruct; the rest is left out."}
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the batch's and the method's fields."""
        problems = super().problems()
        if not 0.0 <= self.warm_up_share < 1.0:
            problems.append(f"warm_up_share = {self.warm_up_share}, expected in [0, 1)")
        weights = [name for name in self.__dataclass_fields__ if name.endswith("_weight")]
        problems += at_least(0, self, *weights)
        sizes = ("decoder_layers", "decoder_width", "decoder_heads", "max_target_tokens")
        problems += at_least(1, self, *sizes)
        if self.decoder_width % max(1, self.decoder_heads):
            problems.append(
                f"decoder_width = {self.decoder_width}, expected a multiple of decoder_heads = "
                f"{self.decoder_heads}"
            )
        return problems

    @property
    def needs_text(self) -> bool:
        """Whether every target must have words: the decoder is asked, and not for vectors."""
        in_warm_up = self.warm_up_share > 0 and self.warm_up_reconstruction_weight > 0
        return self.regression_weight == 0 and (in_warm_up or self.reconstruction_weight > 0)


class LatentTrainer(AdapterCheckpoints, ContrastiveTrainer):
    """Trains a `LatentLearner`; without reason tokens it is the baseline, InfoNCE alone."""

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

        With `direct_only` the model has no reason tokens and no head: the baseline to compare with.

        Raises:
            ValueError: For no reason tokens, or a target that cannot be reconstructed.
        """
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
            if args.needs_text:
                check_texts(records, args.caption_field)
        self.learner = LatentLearner(model, decoder)
        collator = LatentCollator(model, args, is_cut=True)
        super().__init__(
            model, args, records, module=self.learner, data_collator=collator, **kwargs
        )

    def _losses(self, model: Any, inputs: Batch) -> tuple[Tensors, Any]:
        queries = {"query": inputs["query"], "with_no_think": self.args.no_think_weight > 0}
        outputs = model(**queries, target=inputs["target"], text=inputs["text"])
        vectors = outputs["embeds"]
        parts = self._contrastive_losses(vectors, inputs)
        if "nll" in outputs:
            targets = vectors["target"][inputs["target_rows"][: len(vectors["query"])]]
            parts["reconstruction"] = self._reconstruction_loss(outputs, targets, inputs["text"])
        return parts, outputs

    @property
    def _is_warm_up(self) -> bool:
        return self.learner.decoder is not None and self._done < self.args.warm_up_share

    def _begin_step(self, inputs: Batch) -> None:
        """Let LoRA learn or not, as this step's stage has it."""
        self._freeze_lora(self._is_warm_up)
        if self.is_deepspeed_enabled and self.learner.decoder is not None:
            self._hold_lora(self._is_warm_up)
        self._note("is_warm_up", float(self._is_warm_up))

    def _weights(self) -> dict[str, float]:
        args = self.args
        contrastive, reconstruction = args.contrastive_weight, args.reconstruction_weight
        if self._is_warm_up:
            contrastive = args.warm_up_contrastive_weight
            reconstruction = args.warm_up_reconstruction_weight
        return {
            "contrastive": contrastive,
            "reconstruction": reconstruction,
            "no_think": args.no_think_weight,
        }

    def _chunk_call(
        self, kind: str, prompt: Batch, written: dict[str, Tensors], inputs: Batch, is_second: bool
    ) -> dict[str, Any]:
        if kind == "target":
            return {"target": prompt}
        text = written["text"] if is_second else None
        return {"query": prompt, "text": text, "with_no_think": self.args.no_think_weight > 0}

    def _row_losses(
        self, outputs: Any, chunk: Chunk, vectors: Mapping[str, Tensor], inputs: Batch
    ) -> Tensors:
        if "nll" not in outputs:
            return {}
        rows = chunk.rows.to(vectors["query"].device)
        targets = vectors["target"][inputs["target_rows"][rows]]
        share = len(rows) / len(vectors["query"])
        loss = self._reconstruction_loss(outputs, targets, chunk.completions["text"])
        return {"reconstruction": share * loss}

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

    def _contrastive_losses(self, vectors: Mapping[str, Tensor], inputs: Batch) -> Tensors:
        pairs, targets = self._pairs(vectors["target"], inputs)
        parts: Tensors = {}
        for part, name in (("contrastive", "query"), ("no_think", "no_think")):
            if name in vectors:
                queries = gather_with_grad(vectors[name])
                parts[part] = pairs.loss(queries, targets, temperature=self.args.temperature)
                self._note(f"in_batch_hit@1_{part}", float(pairs.accuracy(queries, targets)))
        return parts

    def _reconstruction_loss(self, outputs: Tensors, targets: Tensor, text: Tensors) -> Tensor:
        """Return the mean over queries of words' NLL, or of the regression where there are none.

        All processes hold as many queries, so DDP's mean over them is the mean over all.
        """
        regression = vector_losses(outputs["vector"], targets)
        has_text = text["completion_mask"].any(1).to(regression.device)
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
        has_text = batch["text"]["completion_mask"].any(1)
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
        self.learner.decoder.load_state_dict(read_tensors(path)[0])
