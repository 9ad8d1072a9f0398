"""The warm start: token loss on CoTs plus InfoNCE with and without them, in one trainer."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor

from twn_rl.data.record import Record
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encode_images
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.chunking import Chunk
from twn_rl.training.contrastive_trainer import Batch, ContrastiveTrainer, Tensors
from twn_rl.training.losses import gather_with_grad
from twn_rl.training.pair_batches import SftCollator
from twn_rl.training.settings import ContrastiveConfig


@dataclass
class SftConfig(ContrastiveConfig):
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
    think_without_cot: bool = field(
        default=False,
        metadata={
            "help": "Records without a CoT think, too, in steps with self-written ones. Default: "
            "a record without a CoT is one that thinking does not help."
        },
    )

    def problems(self) -> list[str]:
        """Return what is wrong with the batch's and the method's fields."""
        problems = super().problems()
        for name in ("contrastive_from", "self_written_from", "self_written_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                problems.append(f"{name} = {getattr(self, name)}, expected in [0, 1]")
        if not self.token_weight and self.contrastive_from:
            problems.append(
                f"contrastive_from = {self.contrastive_from} with token_weight = 0, expected 0: "
                "the steps before it would have no loss"
            )
        if self.think_without_cot and not (self.self_written_share and self.self_written_from < 1):
            problems.append(
                f"think_without_cot with self_written_share = {self.self_written_share} and "
                f"self_written_from = {self.self_written_from}, expected steps with self-written "
                "CoTs: there are no others to read"
            )
        return problems


class SftTrainer(AdapterCheckpoints, ContrastiveTrainer):
    """Trains `DualLoraModel.forward`: one wrapped forward a step gives all losses.

    A record without a CoT trains the direct path only (MMEmb-R1, 2604.06156: pairs for which no
    candidate was worth it): no token loss, and no row in the think terms, whoever writes. With
    `think_without_cot` it has the rows of thoughts that the model writes itself, and no token loss
    either: the few thoughts there are teach to write, all pairs teach to read.
    """

    args: SftConfig

    def __init__(
        self, model: DualLoraModel, args: SftConfig, records: Sequence[Record], **kwargs: Any
    ) -> None:
        """Build the collator; `kwargs` go to `Trainer`."""
        collator = SftCollator(
            model,
            num_hard_negatives=args.num_hard_negatives,
            has_targets=args.contrastive_from < 1,
            chunk_tokens=args.contrastive_chunk_tokens,
        )
        super().__init__(model, args, records, module=model, data_collator=collator, **kwargs)

    def _weights(self) -> dict[str, float]:
        return {
            "token": self.args.token_weight,
            "think": self.args.think_weight,
            "no_think": self.args.no_think_weight,
            "cross": self.args.cross_weight,
        }

    def _begin_step(self, inputs: Batch) -> None:
        """Let the model write where it is due; find out who thinks and how much is taught.

        All processes take part in the same gathers, also those without a target CoT.
        """
        done, chunks = self._done, inputs.get("chunks")
        inputs["only_taught"] = done < self.args.contrastive_from
        if not inputs["only_taught"]:
            if self._is_self_written(done):
                self._write_thoughts(inputs)
                if self.args.think_without_cot:
                    inputs["has_cot"] = torch.ones_like(inputs["has_cot"])
            inputs["is_thinking"] = gather_with_grad(inputs["has_cot"].long()).bool()
            inputs["targets_think"] = bool(gather_with_grad(inputs["has_target_cot"]).any())
        elif chunks is not None:
            del chunks.kinds["target"]
        queries = [inputs] if chunks is None else [c.completions for c in chunks.kinds["query"]]
        masks = [written["taught"]["completion_mask"].sum() for written in queries]
        count = torch.stack(masks).sum().float().to(self.args.device)
        total: Any = self.accelerator.reduce(count, reduction="sum")
        inputs["token_count"] = total.clamp(min=1)

    def _losses(self, model: Any, inputs: Batch) -> tuple[Tensors, Any]:
        embed: dict[str, Batch] = {}
        if not inputs["only_taught"]:
            for kind in ("query", "target"):
                embed |= self._embedded(kind, inputs[kind], inputs, inputs)
        taught = self._taught(inputs["query"], inputs["taught"])
        outputs = model(embed=embed, token_nll=taught)
        parts = self._contrastive_losses(outputs["embeds"], inputs) if embed else {}
        if taught is not None:  # scaled for DDP's mean over processes
            nll, processes = outputs["token_nll"].sum(), self.accelerator.num_processes
            parts["token"] = nll * processes / inputs["token_count"]
        return parts, outputs

    def _chunk_call(
        self, kind: str, prompt: Batch, written: dict[str, Tensors], inputs: Batch, is_second: bool
    ) -> dict[str, Any] | None:
        embed, taught = {}, None
        if not inputs["only_taught"]:
            embed = self._embedded(kind, prompt, written, inputs)
        if kind == "query" and is_second:
            taught = self._taught(prompt, written["taught"])
        return {"embed": embed, "token_nll": taught} if embed or taught else None

    def _embedded(
        self, kind: str, prompt: Batch, written: Mapping[str, Any], inputs: Batch
    ) -> dict[str, Batch]:
        """Return what is embedded of queries or of targets, without and with a thought."""
        direct, thinking, thinks = "no_think", "think", bool(inputs["is_thinking"].any())
        if kind == "target":
            direct, thinking, thinks = "target", "target_think", inputs["targets_think"]
        return {direct: prompt, **({thinking: {**prompt, **written[thinking]}} if thinks else {})}

    def _taught(self, prompt: Batch, written: Tensors) -> Batch | None:
        return {**prompt, **written} if self.args.token_weight else None

    def _row_losses(
        self, outputs: Any, chunk: Chunk, vectors: Mapping[str, Tensor], inputs: Batch
    ) -> Tensors:
        if "token_nll" not in outputs:
            return {}
        scale = self.accelerator.num_processes / inputs["token_count"]
        return {"token": outputs["token_nll"].sum() * scale}

    def _contrastive_losses(self, vectors: Mapping[str, Tensor], inputs: Batch) -> Tensors:
        temperature = self.args.temperature
        has_cot = inputs["is_thinking"]  # of the records of all processes
        every, target = self._pairs(vectors["target"], inputs)
        no_think = gather_with_grad(vectors["no_think"])
        think_target = target
        if "target_think" in vectors:
            think_target = every.gather_targets(vectors["target_think"][inputs["target_rows"]])
        parts: Tensors = {}
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

    def _write_thoughts(self, inputs: Batch) -> None:
        """Let the reasoning adapter write the CoTs of the prompts (greedy) in place of those given.

        Malformed thoughts become no-think. Pictures are encoded here for the rest of the step, too.
        """
        model, device, chunks = self.dual_model, self.args.device, inputs.get("chunks")
        if chunks is None:
            inputs["query"] = encode_images(model.backbone, inputs["query"])
            queries = [(inputs["query"], inputs)]
        else:
            self._encode(chunks, "query")
            queries = [(chunk.prompt, chunk.completions) for chunk in chunks.kinds["query"]]
        with self.whole_model():
            written = [model.reason(send_to_device(prompt, device)) for prompt, _ in queries]
        usable = [[model.completion_for_embedding(ids) for ids in rows] for rows in written]
        for (_, completions), rows in zip(queries, usable, strict=True):
            completions["think"] = send_to_device(model.collate_completions(rows), device)
        is_malformed = [not ids for rows in usable for ids in rows]
        self._note("self_written_malformed_ratio", sum(is_malformed) / len(is_malformed))
