"""What trainers with a contrastive loss share: batches of a mixture, and steps, whole or chunked.

A batch beyond memory is cut into chunks, by gradient caching (GradCache, Gao et al., arXiv
2101.06983): all vectors are made without gradient, the loss on all of them gives the gradient of
each vector, and every chunk is computed again to carry its share into the weights. The result is
the gradient of the whole batch at the memory of a chunk. Here it also works under DeepSpeed ZeRO,
whose gradients are reduced once, at the end.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor, nn
from transformers import Trainer

from twn_rl.data.mixture import Mixture, MixtureSampler
from twn_rl.data.record import Record, RecordError
from twn_rl.data.verification import refuse_markup_in_thoughts
from twn_rl.modeling.gate_files import drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encode_images
from twn_rl.runtime.processes import gather_objects, join_processes
from twn_rl.runtime.sharded_pass import shard_ranges
from twn_rl.training.chunking import Chunk, Chunks
from twn_rl.training.losses import GatheredPairs
from twn_rl.training.settings import ContrastiveConfig

Tensors = dict[str, Tensor]
Batch = dict[str, Any]


class ContrastiveTrainer(Trainer):
    """HF's trainer, whose loss is a weighted sum of parts on the vectors of the global batch.

    A method says what a step depends on (`_begin_step`), how a batch (`_losses`) and a chunk
    (`_chunk_call`) go through its model, which losses are on all vectors (`_contrastive_losses`)
    or belong to single rows (`_row_losses`), and what each weighs (`_weights`). The model's outputs
    hold `embeds`, name -> vectors (n, D).

    Every process runs as many chunks of a kind as the one with most; those that have fewer repeat
    their first one with weight 0, so that ZeRO-3 stays in step.

    Attributes:
        dual_model: The model that is trained.
        records: What it is trained on.
    """

    args: Any  # of each method
    data_collator: Any

    def __init__(
        self,
        dual_model: DualLoraModel,
        args: ContrastiveConfig,
        records: Sequence[Record],
        *,
        module: nn.Module,
        data_collator: Any,
        **kwargs: Any,
    ) -> None:
        """Drop the model's gates, which read what changes now.

        A step calls `module`, the model itself or what holds it; `kwargs` go to HF's trainer.
        """
        _refuse_markup(dual_model, records)
        drop_gates(dual_model, "training changes what it reads", args.output_dir or "OUTPUT_DIR")
        self.dual_model, self.records = dual_model, records
        self._noted: dict[str, list[float]] = defaultdict(list)
        dataset: Any = records  # by index; pictures stay on disk until a batch is collated
        super().__init__(
            model=module, args=args, train_dataset=dataset, data_collator=data_collator, **kwargs
        )

    def _begin_step(self, inputs: Batch) -> None:
        """Add to `inputs` what the step depends on; every process must take part."""

    def _losses(self, model: Any, inputs: Batch) -> tuple[Tensors, Any]:
        """Return the losses of a whole batch, and the model's outputs, by one forward."""
        raise NotImplementedError

    def _chunk_call(
        self, kind: str, prompt: Batch, written: dict[str, Tensors], inputs: Batch, is_second: bool
    ) -> dict[str, Any] | None:
        """Return the arguments of the model's forward for one chunk; None has no vectors to make.

        Prompts and what is written after them are on the device; in the second phase the outputs
        must do for `_row_losses`, too.
        """
        raise NotImplementedError

    def _contrastive_losses(self, vectors: Mapping[str, Tensor], inputs: Batch) -> Tensors:
        """Return the losses on the vectors of the whole local batch, gathered over processes."""
        raise NotImplementedError

    def _row_losses(
        self, outputs: Any, chunk: Chunk, vectors: Mapping[str, Tensor], inputs: Batch
    ) -> Tensors:
        """Return a chunk's share of the losses that are sums over rows.

        `outputs` have a gradient; `vectors` are those of the whole local batch, detached.
        """
        raise NotImplementedError

    def _weights(self) -> dict[str, float]:
        """Return what each loss weighs in this step."""
        raise NotImplementedError

    def _weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        weights = self._weights()
        return torch.stack([weights[name] * part for name, part in parts.items()]).sum()

    def _pairs(self, vectors: Tensor, inputs: Batch) -> tuple[GatheredPairs, Tensor]:
        """Return who is whose negative, and the targets (M, D) of all processes.

        `vectors` are those of the distinct local targets.
        """
        pairs = GatheredPairs.of(inputs["query_keys"], inputs["target_keys"])
        targets = pairs.gather_targets(vectors[inputs["target_rows"]])
        return pairs.without_twins(targets, self.args.max_negative_similarity), targets

    @property
    def _done(self) -> float:
        """Share of the steps that are behind us."""
        return self.state.global_step / max(1, self.state.max_steps)

    def _note(self, name: str, value: float) -> None:
        """Keep a value for the next log, which shows the mean."""
        self._noted[name].append(value)

    def _log_parts(self, parts: Mapping[str, Tensor]) -> None:
        """Note each loss for the log; the mean over processes, since one has its own rows only."""
        own = torch.stack([part.detach() for part in parts.values()])
        logged: Any = self.accelerator.reduce(own, "mean")
        for name, part in zip(parts, logged.tolist(), strict=True):
            self._note(f"loss_{name}", part)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of what was noted since the last log."""
        means = {name: sum(values) / len(values) for name, values in self._noted.items() if values}
        self._noted.clear()
        means |= self.dual_model.limits.counts.take_ratios()
        super().log({**logs, **means}, start_time)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Draw a mixture's sources by weight, one a global batch; else as HF does."""
        if not isinstance(self.records, Mixture):
            return super()._get_train_sampler(train_dataset)
        processes = 1 if self.accelerator.split_batches else self.accelerator.num_processes
        return MixtureSampler(
            self.records,
            batch_size=self._train_batch_size * processes,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def compute_loss(
        self,
        model: Any,
        inputs: Batch,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """Return the weighted sum of the losses, the same however many processes hold the batch."""
        self._begin_step(inputs)
        parts, outputs = self._losses(model, inputs)
        self._log_parts(parts)
        loss = self._weighted(parts)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: Any, inputs: Batch, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        """Return the detached loss of a step whose gradients are in place; see the module."""
        if "chunks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)
        model.train()
        inputs = cast(Batch, self._prepare_inputs(inputs))
        self._begin_step(inputs)
        call: Any = model if self.is_deepspeed_enabled else self.model  # DDP: `_one_reduction`
        for kind in inputs["chunks"].kinds:
            self._encode(inputs["chunks"], kind)
        plan = self._in_step(inputs["chunks"].kinds)
        dice: list[_Dice] = []
        found: Tensors = {}
        with torch.no_grad(), self.compute_loss_context_manager():
            for kind, chunk, weight in plan:
                parts = self._on_device(chunk)
                dice.append(_Dice(self.args.device))
                arguments = self._chunk_call(kind, *parts, inputs, is_second=False)
                if arguments is None:
                    continue
                vectors = call(**arguments)["embeds"]
                if weight:
                    _scatter(found, vectors, chunk.rows, inputs["chunks"].kinds[kind])
        losses, wanted = self._gradients_of(found, inputs)
        detached = {name: value.detach() for name, value in found.items()}
        with self._one_reduction(model):
            for (kind, chunk, weight), thrown in zip(plan, dice, strict=True):
                parts = self._on_device(chunk)
                with thrown.again(), self.compute_loss_context_manager():
                    arguments = self._chunk_call(kind, *parts, inputs, is_second=True)
                    assert arguments is not None
                    outputs = call(**arguments)
                    own = self._row_losses(outputs, chunk, detached, inputs)
                    terms = [
                        (value * wanted[name][chunk.rows.to(value.device)]).sum()
                        for name, value in outputs["embeds"].items()
                    ]
                    if own:
                        terms.append(self._weighted(own))
                    surrogate = weight * torch.stack(terms).sum()
                self._backward(model, surrogate)
                for name, value in own.items() if weight else ():
                    losses[name] = losses.get(name, 0) + value.detach()
        if self.is_deepspeed_enabled:
            model.step()
        self._log_parts(losses)
        return self._weighted(losses).detach()

    def _gradients_of(self, vectors: Tensors, inputs: Batch) -> tuple[Tensors, Tensors]:
        """Return the detached losses on all vectors, and the loss's gradient for each of them."""
        if not vectors:
            return {}, {}
        leaves = {name: value.requires_grad_() for name, value in vectors.items()}
        parts = self._contrastive_losses(leaves, inputs)
        found = torch.autograd.grad(
            self._weighted(parts), list(leaves.values()), allow_unused=True, materialize_grads=True
        )
        losses = {name: part.detach() for name, part in parts.items()}
        return losses, dict(zip(leaves, found, strict=True))

    def _encode(self, chunks: Chunks, kind: str) -> None:
        """Encode the pictures of a kind, once for all that read them in this step.

        Features wait on the host: at a million picture tokens of a 2B model they are 4 GB.
        """
        if kind in chunks.encoded:
            return
        chunks.encoded.add(kind)
        for _, chunk, weight in self._in_step({kind: chunks.kinds[kind]}):
            # Those that have fewer chunks encode as the others do, under ZeRO-3.
            prompt: Any = send_to_device(chunk.prompt if weight else {}, self.args.device)
            with self.compute_loss_context_manager():
                prompt = encode_images(self.dual_model.backbone, prompt)
            if weight:
                kept: Any = send_to_device(prompt, "cpu")
                chunk.prompt = kept

    def _on_device(self, chunk: Chunk) -> tuple[Batch, dict[str, Tensors]]:
        """Return a chunk's prompts and completions."""
        parts: Any = send_to_device((chunk.prompt, chunk.completions), self.args.device)
        return parts

    def _in_step(self, kinds: Mapping[str, list[Chunk]]) -> list[tuple[str, Chunk, float]]:
        """Return (kind, chunk, weight) in the order that all processes go through."""
        counts = torch.tensor([len(own) for own in kinds.values()], device=self.args.device)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return [
            (kind, own[number] if number < len(own) else own[0], float(number < len(own)))
            for (kind, own), count in zip(kinds.items(), counts.tolist(), strict=True)
            for number in range(count)
        ]

    def _backward(self, model: Any, loss: Tensor) -> None:
        if self.is_deepspeed_enabled:
            model.backward(loss, scale_wrt_gas=False)
        else:
            self.accelerator.backward(loss)

    @contextmanager
    def _one_reduction(self, model: Any) -> Iterator[None]:
        """Leave gradients of the body on each process, then reduce them over processes once.

        DDP would reduce those of its last backward only, where not every parameter need take part:
        the module inside it is called, and its gradients are averaged here.
        """
        if self.is_deepspeed_enabled:
            model.set_gradient_accumulation_boundary(True)
        with model.coalesce_grad_reduction() if self.is_deepspeed_enabled else nullcontext():
            yield
        if not self.is_deepspeed_enabled and self.accelerator.num_processes > 1:
            trained = cast(nn.Module, self.model).parameters()
            _average_gradients([p for p in trained if p.requires_grad])


class _Dice:
    """The random state before a chunk, so that dropout falls the same way when it is repeated."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.host = device, torch.get_rng_state()
        self.module = None if device.type == "cpu" else torch.get_device_module(device)
        self.own = self.module and self.module.get_rng_state(device)

    @contextmanager
    def again(self) -> Iterator[None]:
        with torch.random.fork_rng(
            devices=[self.device] if self.module else [], device_type=self.device.type
        ):
            torch.set_rng_state(self.host)
            if self.module:
                self.module.set_rng_state(self.own, self.device)
            yield


def _scatter(found: Tensors, vectors: Tensors, rows: Tensor, chunks: list[Chunk]) -> None:
    """Write a chunk's vectors (n, D) into the tables (N, D) of the batch."""
    count = sum(len(chunk.rows) for chunk in chunks)
    for name, value in vectors.items():
        if name not in found:
            found[name] = value.new_zeros(count, value.shape[1], dtype=torch.float32)
        found[name][rows.to(value.device)] = value.float()


def _average_gradients(parameters: list[Any]) -> None:
    """Replace gradients by their means over processes, in one reduction a type."""
    by_type: dict[torch.dtype, list[Any]] = defaultdict(list)
    for parameter in parameters:
        by_type[parameter.dtype].append(parameter)
    for members in by_type.values():
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members]
        )
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for member, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            member.grad = part.view_as(member).clone()


def _refuse_markup(model: DualLoraModel, records: Sequence[Record]) -> None:
    """Refuse thoughts with markup of the model, on every process; each reads its share of them."""
    processes, problem = join_processes(), None
    share = -(-len(records) // processes.num_processes)
    parts = dict(enumerate(shard_ranges(len(records), share)))
    part = parts.get(processes.process_index, range(0))  # there may be fewer records
    try:
        refuse_markup_in_thoughts(records, model.backbone.markup(model.renderer), part)
    except RecordError as error:
        problem = error
    found = [each for each in gather_objects(problem) if each is not None]
    if found:
        raise found[0]
