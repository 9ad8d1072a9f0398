"""Contrastive batches beyond memory: vectors first, then gradients chunk by chunk.

Gradient caching (GradCache, Gao et al., arXiv 2101.06983): all vectors are made without gradient,
the loss on all of them gives the gradient of each vector, and every chunk is computed again to
carry its share into the weights. The result is the gradient of the whole batch at the memory of a
chunk. Here it also works under DeepSpeed ZeRO, whose gradients are reduced once, at the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import send_to_device
from torch import Tensor

from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encode_images
from twn_rl.training.chunking import Chunk, Chunks


class ChunkedContrast:
    """Mixin, before an HF trainer: steps on batches that a collator has cut into `Chunks`.

    A trainer says how a chunk goes through its model (`_chunk_call`, `_chunk_vectors`), what the
    loss on all vectors is (`_contrastive_losses`) and which belongs to single rows (`_row_losses`).
    Every process runs as many chunks of a kind as the one with most; those that have fewer repeat
    their first one with weight 0, so that ZeRO-3 stays in step.
    """

    args: Any
    accelerator: Any
    model: Any
    optimizer: Any
    is_deepspeed_enabled: bool
    dual_model: DualLoraModel

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the detached loss of a step whose gradients are in place; see the class."""
        trainer: Any = self
        if "chunks" not in inputs:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        model.train()
        inputs = trainer._prepare_inputs(inputs)
        chunks: Chunks = inputs["chunks"]
        self._prepare_chunks(inputs, chunks)
        call = model if self.is_deepspeed_enabled else self.model  # gradients of DDP: see below
        dice: dict[tuple[str, int], _Dice] = {}
        plan = self._in_step(chunks)

        found: dict[str, Tensor] = {}
        with torch.no_grad(), trainer.compute_loss_context_manager():
            for kind, number, chunk, weight in plan:
                if not weight:
                    encode_images(self.dual_model.backbone, {})  # as the others do, under ZeRO-3
                prompt = self._encoded(chunk)
                dice[kind, number] = _Dice(self.args.device)
                arguments = self._chunk_call(kind, chunk, prompt, inputs, is_second=False)
                if arguments is None:
                    continue
                vectors = self._chunk_vectors(kind, call(**arguments))
                if weight:
                    _scatter(found, vectors, chunk.rows, chunks.kinds[kind])
        parts, wanted = self._gradients_of(found, inputs)
        detached = {name: value.detach() for name, value in found.items()}
        rows: dict[str, Tensor] = {}
        with self._one_reduction(model):
            for kind, number, chunk, weight in plan:
                prompt = self._encoded(chunk)
                with dice[kind, number].again(), trainer.compute_loss_context_manager():
                    arguments = self._chunk_call(kind, chunk, prompt, inputs, is_second=True)
                    assert arguments is not None
                    outputs = call(**arguments)
                    own = self._row_losses(kind, outputs, chunk, detached, inputs)
                    terms = [
                        (value * wanted[name][chunk.rows.to(value.device)]).sum()
                        for name, value in self._chunk_vectors(kind, outputs).items()
                    ]
                    if own:
                        terms.append(self._weighted(own))
                    surrogate = weight * torch.stack(terms).sum()
                self._backward(model, surrogate)
                if weight:
                    for name, value in own.items():
                        rows[name] = rows.get(name, 0) + value.detach()
        if self.is_deepspeed_enabled:
            model.step()
        everything = {**parts, **rows}
        trainer._log_parts(everything)
        return self._weighted(everything).detach()

    def _gradients_of(
        self, vectors: dict[str, Tensor], inputs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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

    def _prepare_chunks(self, inputs: dict[str, Any], chunks: Chunks) -> None:
        """Add to `inputs` what all chunks depend on; every process must take part."""

    def _chunk_call(
        self,
        kind: str,
        chunk: Chunk,
        prompt: dict[str, Any],
        inputs: dict[str, Any],
        *,
        is_second: bool,
    ) -> dict[str, Any] | None:
        """Return the arguments of the model's forward for one chunk; None has no vectors to make.

        Args:
            kind: Of the chunk.
            chunk: Its completions and rows.
            prompt: Its prompts, on the device, pictures encoded.
            inputs: The batch.
            is_second: Whether row losses are wanted, too.
        """
        raise NotImplementedError

    def _chunk_vectors(self, kind: str, outputs: Any) -> dict[str, Tensor]:
        """Return name -> vectors (n, D) of a chunk's outputs."""
        raise NotImplementedError

    def _contrastive_losses(
        self, vectors: dict[str, Tensor], inputs: dict[str, Any]
    ) -> dict[str, Tensor]:
        """Return the losses on the vectors of the whole local batch, gathered over processes."""
        raise NotImplementedError

    def _row_losses(
        self,
        kind: str,
        outputs: Any,
        chunk: Chunk,
        vectors: Mapping[str, Tensor],
        inputs: dict[str, Any],
    ) -> dict[str, Tensor]:
        """Return a chunk's share of the losses that are sums over rows.

        Args:
            kind: Of the chunk.
            outputs: Of the model, with gradient.
            chunk: Whose they are.
            vectors: Detached vectors of the whole local batch.
            inputs: The batch.
        """
        return {}

    def _weighted(self, parts: Mapping[str, Tensor]) -> Tensor:
        """Return the weighted sum of losses."""
        raise NotImplementedError

    def _encoded(self, chunk: Chunk) -> dict[str, Any]:
        """Return a chunk's prompts on the device; pictures are encoded once for both phases.

        Features wait on the host: at a million picture tokens of a 2B model they are 4 GB.
        """
        device = self.args.device
        prompt: Any = encode_images(self.dual_model.backbone, send_to_device(chunk.prompt, device))
        if not chunk.is_encoded:
            kept: Any = send_to_device(prompt, "cpu")
            chunk.prompt, chunk.is_encoded = kept, True
        return prompt

    def _in_step(self, chunks: Chunks) -> list[tuple[str, int, Chunk, float]]:
        """Return (kind, number, chunk, weight) in the order that all processes go through."""
        counts = torch.tensor([len(own) for own in chunks.kinds.values()], device=self.args.device)
        if self.accelerator.num_processes > 1:
            dist.all_reduce(counts, op=dist.ReduceOp.MAX)
        return [
            (kind, number, own[number] if number < len(own) else own[0], float(number < len(own)))
            for (kind, own), count in zip(chunks.kinds.items(), counts.tolist(), strict=True)
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
            _average_gradients([p for p in self.model.parameters() if p.requires_grad])


class _Dice:
    """The random state before a chunk, so that dropout falls the same way when it is repeated."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.host = torch.get_rng_state()
        self.own = None if device.type == "cpu" else self._module.get_rng_state(device)

    @property
    def _module(self) -> Any:
        return torch.get_device_module(self.device)

    @contextmanager
    def again(self) -> Iterator[None]:
        now = _Dice(self.device)
        self._throw()
        try:
            yield
        finally:
            now._throw()

    def _throw(self) -> None:
        torch.set_rng_state(self.host)
        if self.own is not None:
            self._module.set_rng_state(self.own, self.device)


def _scatter(
    found: dict[str, Tensor], vectors: Mapping[str, Tensor], rows: Tensor, chunks: list[Chunk]
) -> None:
    """Write a chunk's vectors (n, D) into the tables (N, D) of the batch."""
    count = sum(len(chunk.rows) for chunk in chunks)
    for name, value in vectors.items():
        if name not in found:
            found[name] = value.new_zeros(count, value.shape[1], dtype=torch.float32)
        found[name][rows.to(value.device)] = value.float()


def _average_gradients(parameters: list[Any]) -> None:
    """Replace gradients by their means over processes, in one reduction a type."""
    by_type: dict[torch.dtype, list[Any]] = {}
    for parameter in parameters:
        by_type.setdefault(parameter.dtype, []).append(parameter)
    for members in by_type.values():
        flat = torch.cat(
            [(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in members]
        )
        dist.all_reduce(flat)
        flat /= dist.get_world_size()
        for member, part in zip(members, flat.split([p.numel() for p in members]), strict=True):
            member.grad = part.view_as(member).clone()
