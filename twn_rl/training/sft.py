"""The warm start: token loss on CoTs plus InfoNCE with and without them, in one trainer.

Knows no rewards, no rollouts and no data format beyond `Record`.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor
from transformers import Trainer, TrainingArguments

from twn_rl.data.record import Record
from twn_rl.modeling.gate_files import drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.adapter_trainer import AdapterCheckpoints, RecordTraining
from twn_rl.training.chunked_trainer import ChunkedContrast
from twn_rl.training.chunking import Chunk, Chunks
from twn_rl.training.losses import GatheredPairs, gather_with_grad
from twn_rl.training.pair_batches import RecordDataset, SftCollator
from twn_rl.training.settings import ContrastiveSettings, LaunchSettings


@dataclass
class SftConfig(ContrastiveSettings, LaunchSettings, TrainingArguments):  # pyright: ignore[reportIncompatibleVariableOverride]
    """Hyper-parameters of the warm start; weights 1 and temperature 0.02: UME-R1 (2511.00405)."""

    token_weight: float = field(
        default=1.0, metadata={"help": "Weight of the token loss on CoTs; 0 is off."}
    )
    think_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE(query + CoT, target); 0 is off."}
    )
    no_think_weight: float = field(
        default=1.0, metadata={"help": "Weight of InfoNCE(query, target); 0 is off."}
    )
    cross_weight: float = field(
        default=1.0,
        metadata={
            "help": "Weight of both cross-mode InfoNCE terms, which keep one vector space; only "
            "pairs with a target CoT have them, since otherwise think queries meet no-think "
            "targets in the think term."
        },
    )
    contrastive_from: float = field(
        default=0.0,
        metadata={"help": "Share of the steps after which the contrastive terms join; 1 is never."},
    )
    self_written_from: float = field(
        default=0.5,
        metadata={
            "help": "Share of the steps after which some think vectors read the model's own CoT."
        },
    )
    self_written_share: float = field(
        default=0.3,
        metadata={
            "help": "Share of those later steps that use self-written CoTs; 0 is off. "
            "Gold CoTs leak."
        },
    )

    def __post_init__(self) -> None:
        """Check the method's own fields, all problems at once, then HF's."""
        problems = self.contrastive_problems()
        for name in ("contrastive_from", "self_written_from", "self_written_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"{name} = {getattr(self, name)}, expected in [0, 1]")
        if not self.token_weight and self.contrastive_from:
            problems.append(
                f"contrastive_from = {self.contrastive_from} with token_weight = 0, expected 0: "
                "the steps before it would have no loss"
            )
        if problems:
            raise ValueError("SftConfig: " + "; ".join(problems) + "; change these fields")
        self.remove_unused_columns = False
        super().__post_init__()


class SftTrainer(AdapterCheckpoints, ChunkedContrast, RecordTraining, Trainer):
    """HF Trainer over `DualLoraModel.forward`: one wrapped forward a step gives all losses."""

    args: SftConfig

    def __init__(
        self, model: DualLoraModel, args: SftConfig, records: Sequence[Record], **kwargs: Any
    ) -> None:
        """Build the collator; `kwargs` go to `Trainer`."""
        drop_gates(model, "the warm start changes what it reads", args.output_dir or "OUTPUT_DIR")
        collator = SftCollator(
            model,
            num_hard_negatives=args.num_hard_negatives,
            has_targets=args.contrastive_from < 1,
            chunk_tokens=args.contrastive_chunk_tokens,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=RecordDataset(records),
            data_collator=collator,
            **kwargs,
        )
        self.dual_model, self.records = model, records

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the losses, the same however many processes hold the batch.

        A record without a CoT trains the direct path only (MMEmb-R1, 2604.06156: pairs for which no
        candidate was worth it): no token loss, and no row in the think terms, whoever writes.
        """
        done = self._done
        taught = {**inputs["query"], **inputs["taught"]} if self.args.token_weight else None
        if done < self.args.contrastive_from:
            outputs = model(token_nll=taught)
            parts = {"token": self._token_loss(outputs)}
        else:
            think = inputs["think"]
            if self._is_self_written(done):
                think = self._own_thoughts(inputs["query"])
            embed = {"no_think": inputs["query"], "target": inputs["target"]}
            inputs["is_thinking"] = gather_with_grad(inputs["has_cot"].long()).bool()
            if inputs["is_thinking"].any():
                embed["think"] = {**inputs["query"], **think}
            # All processes take part in the same gathers, also those without a target CoT.
            if bool(gather_with_grad(inputs["has_target_cot"]).any()):
                embed["target_think"] = {**inputs["target"], **inputs["target_think"]}
            outputs = model(embed=embed, token_nll=taught)
            parts = self._contrastive_losses(outputs["embeds"], inputs)
            if taught is not None:
                parts["token"] = self._token_loss(outputs)
        self._log_parts(parts)
        loss = self._weighted(parts)
        return (loss, outputs) if return_outputs else loss

    def _weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        weights = {
            "token": self.args.token_weight,
            "think": self.args.think_weight,
            "no_think": self.args.no_think_weight,
            "cross": self.args.cross_weight,
        }
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def _token_loss(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Return the mean NLL over the tokens of all processes, scaled for DDP's mean over them."""
        count: Any = self.accelerator.reduce(outputs["token_count"].sum().float(), reduction="sum")
        return outputs["token_nll"].sum() * self.accelerator.num_processes / count.clamp(min=1)

    def _prepare_chunks(self, inputs: dict[str, Any], chunks: Chunks) -> None:
        """Count the taught tokens of all processes, and let the model write where it is due."""
        done, queries = self._done, chunks.kinds["query"]
        inputs["only_taught"] = done < self.args.contrastive_from
        if inputs["only_taught"]:
            del chunks.kinds["target"]
        elif self._is_self_written(done):
            written: list[list[int]] = []
            with self.whole_model():
                for chunk in queries:
                    prompt = send_to_device(chunk.prompt, self.args.device)
                    written += self.dual_model.reason(prompt)
            parts = iter(self._usable(written))
            for chunk in queries:
                own = [next(parts) for _ in chunk.rows]
                chunk.completions["think"] = self.dual_model.collate_completions(own)
        inputs["is_thinking"] = gather_with_grad(inputs["has_cot"].long()).bool()
        inputs["targets_think"] = bool(gather_with_grad(inputs["has_target_cot"]).any())
        masks = [chunk.completions["taught"]["completion_mask"].sum() for chunk in queries]
        count = torch.stack(masks).sum().float().to(self.args.device)
        inputs["token_count"] = self.accelerator.reduce(count, reduction="sum")

    def _chunk_call(
        self,
        kind: str,
        chunk: Chunk,
        prompt: dict[str, Any],
        inputs: dict[str, Any],
        *,
        is_second: bool,
    ) -> dict[str, Any] | None:
        written = send_to_device(chunk.completions, self.args.device)
        if kind == "target":
            embed = {"target": prompt}
            if inputs["targets_think"]:
                embed["target_think"] = {**prompt, **written["think"]}
            return {"embed": embed}
        embed = {"no_think": prompt}
        if inputs["is_thinking"].any():
            embed["think"] = {**prompt, **written["think"]}
        if inputs["only_taught"]:
            embed = {}
        has_tokens = is_second and self.args.token_weight
        taught = {**prompt, **written["taught"]} if has_tokens else None
        return {"embed": embed, "token_nll": taught} if embed or taught else None

    def _chunk_vectors(self, kind: str, outputs: Any) -> dict[str, Tensor]:
        return outputs["embeds"]

    def _row_losses(
        self,
        kind: str,
        outputs: Any,
        chunk: Chunk,
        vectors: Mapping[str, Tensor],
        inputs: dict[str, Any],
    ) -> dict[str, Tensor]:
        if "token_nll" not in outputs:
            return {}
        scale = self.accelerator.num_processes / inputs["token_count"].clamp(min=1)
        return {"token": outputs["token_nll"].sum() * scale}

    def _contrastive_losses(
        self, vectors: Mapping[str, Tensor], inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        rows, temperature = inputs["target_rows"], self.args.temperature
        every = GatheredPairs.of(inputs["query_keys"], inputs["target_keys"])
        has_cot = inputs["is_thinking"]  # of the records of all processes
        no_think = gather_with_grad(vectors["no_think"])
        target = every.gather_targets(vectors["target"][rows])
        every = every.without_twins(target, self.args.max_negative_similarity)
        think_target = target
        if "target_think" in vectors:
            think_target = every.gather_targets(vectors["target_think"][rows])
        parts: dict[str, Tensor] = {}
        cross: list[Tensor] = []
        if "think" in vectors:  # some record of some process has a CoT
            thinking = every.only(has_cot)
            think = gather_with_grad(vectors["think"])[has_cot]
            parts["think"] = thinking.loss(think, think_target, temperature=temperature)
            if "target_think" in vectors:
                cross.append(thinking.loss(think, target, temperature=temperature))
            self._note("in_batch_hit@1_think", float(thinking.accuracy(think, target)))
        parts["no_think"] = every.loss(no_think, target, temperature=temperature)
        if "target_think" in vectors:
            cross.append(every.loss(no_think, think_target, temperature=temperature))
            parts["cross"] = torch.stack(cross).sum() / 2
        self._note("direct_only_ratio", 1 - float(has_cot.float().mean()))
        self._note("in_batch_hit@1_no_think", float(every.accuracy(no_think, target)))
        return parts

    def _is_self_written(self, done: float) -> bool:
        """Throw this step's die; the same on every process and after a resume."""
        if done < self.args.self_written_from:
            return False
        die = random.Random(f"{self.args.seed}/{self.state.global_step}").random()
        return die < self.args.self_written_share

    def _own_thoughts(self, query: dict[str, Any]) -> dict[str, Tensor]:
        """Let the reasoning adapter write the CoTs of a batch of prompts (greedy)."""
        with self.whole_model():
            written = self.dual_model.reason(query)
        batch = self.dual_model.collate_completions(self._usable(written))
        return {key: value.to(self.args.device) for key, value in batch.items()}

    def _usable(self, written: Sequence[list[int]]) -> list[list[int]]:
        """Return what may be embedded of the written; malformed thoughts become no-think."""
        usable = [self.dual_model.completion_for_embedding(row) for row in written]
        malformed = sum(not row for row in usable)
        self._note("self_written_malformed_ratio", malformed / len(usable))
        return usable
