"""Contrastive losses as pure tensor functions.

Similarities here are unscaled dot products of embeddings; `temperature` divides them. A mask is
True where a target is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def info_nce(
    query_embeds: Tensor,
    target_embeds: Tensor,
    *,
    temperature: float | Tensor,
    positive_index: Tensor | None = None,
    mask: Tensor | None = None,
    symmetric: bool = True,
) -> Tensor:
    """Return the mean InfoNCE loss, a float32 scalar of at least 0.

    Oord et al. 2018 (arXiv 1807.03748), eq. 4, with every target of the batch as a candidate. The
    symmetric form averages query -> target and target -> query (CLIP, arXiv 2103.00020). In the
    second direction a positive is classified among the N queries; queries that share the positive,
    or for which it is ignored, are no negatives of each other.

    Args:
        query_embeds: (N, D), any float type; the gradient flows into it.
        target_embeds: (M, D): positives and hard negatives; the gradient flows into it.
        temperature: Divides the similarities; positive.
        positive_index: (N,) int64 row of each query's positive in `target_embeds`; 0..N-1 if None.
        mask: (N, M) bool, True = ignore that target for that query. Positives are never ignored.
        symmetric: Average both directions; otherwise query -> target only.

    Raises:
        ValueError: For shapes that do not fit or a temperature that is not positive.
    """
    logits, positive_index, mask = _masked_logits(
        query_embeds, target_embeds, temperature, positive_index, mask
    )
    loss = F.cross_entropy(logits.masked_fill(mask, -torch.inf), positive_index)
    if not symmetric:
        return loss
    queries = torch.arange(len(logits), device=logits.device)
    shares_positive = positive_index[:, None] == positive_index[None, :]
    # Row n of both: the positive of query n, against all N queries.
    reverse_mask = mask[:, positive_index].T | shares_positive.fill_diagonal_(False)
    reverse = logits[:, positive_index].T.masked_fill(reverse_mask, -torch.inf)
    return (loss + F.cross_entropy(reverse, queries)) / 2


@torch.no_grad()
def contrastive_accuracy(
    query_embeds: Tensor,
    target_embeds: Tensor,
    *,
    positive_index: Tensor | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Return the share of queries nearer to their positive than to any other target, in [0, 1].

    A tie counts against the model, so equal embeddings score 0. Arguments as in `info_nce`; the
    result is a detached float32 scalar.
    """
    logits, positive_index, mask = _masked_logits(
        query_embeds, target_embeds, 1.0, positive_index, mask
    )
    positive = logits.gather(1, positive_index[:, None])
    is_rival = ~mask.scatter(1, positive_index[:, None], True)
    # "Not below" instead of "above": a tie, a tie up to float32 rounding, and NaN all lose.
    is_beaten = (~(logits < positive - 1e-6) & is_rival).any(dim=1)
    return (~is_beaten & positive[:, 0].isfinite()).float().mean()


def false_negative_mask(query_ids: Tensor, target_ids: Tensor, positive_index: Tensor) -> Tensor:
    """Return the (N, M) bool mask of targets that must not count as negatives, True = ignore.

    Ignored are: copies of the positive, positives of other queries with the same id, and targets
    that are the query itself.

    Args:
        query_ids: (N,) int64; equal numbers mean equal content, see `key_ids`.
        target_ids: (M,) int64 in the same numbering.
        positive_index: (N,) int64 row of each query's positive among the targets.
    """
    is_positive_copy = target_ids[positive_index][:, None] == target_ids[None, :]
    _, group = torch.unique(query_ids, return_inverse=True)
    # A group is the queries of one id; its positives are everybody's positives in it.
    group_counts = is_positive_copy.new_zeros(len(query_ids), len(target_ids), dtype=torch.int32)
    group_counts.index_add_(0, group, is_positive_copy.int())
    mask = (group_counts > 0)[group] | (query_ids[:, None] == target_ids[None, :])
    return mask.scatter(1, positive_index[:, None], False)


def key_ids(keys: Sequence[str]) -> Tensor:
    """Return (N,) int64 numbers of sha256 hex keys (`Item.content_key`), so ranks can gather them.

    >>> key_ids(["0f" * 32, "0f" * 32]).unique().numel()
    1
    """
    return torch.tensor([int(key[:16], 16) >> 1 for key in keys], dtype=torch.int64)


def gather_with_grad(tensor: Tensor) -> Tensor:
    """Return the rows of all processes in rank order; the gradient flows back to each of them.

    The backward pass sums over ranks what each rank's loss asks of the local rows. When every rank
    computes the same loss on the gathered rows, DDP's mean over ranks is then exactly the gradient
    of that loss in one process. With one process the tensor is returned as it is.

    Args:
        tensor: (n, ...) local rows, of the same shape on every rank. Integers carry no gradient.

    Raises:
        ValueError: On every rank, if the ranks hold different shapes.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return tensor
    shape = torch.tensor(tensor.shape, device=tensor.device)
    shapes = [torch.empty_like(shape) for _ in range(dist.get_world_size())]
    dist.all_gather(shapes, shape)
    if any(not torch.equal(shape, other) for other in shapes):
        raise ValueError(
            f"shapes by rank = {[other.tolist() for other in shapes]}; expected the same on every "
            "rank; drop the last incomplete batch (dataloader_drop_last=True)"
        )
    return _GatherRows.apply(tensor)  # pyright: ignore[reportReturnType]


@dataclass(frozen=True)
class GatheredPairs:
    """Which gathered target is whose positive, and which are no negatives.

    Targets are the positives of all processes, then the negatives of all processes.

    Attributes:
        count: Number n of local queries.
        positive_index: (N,) int64 row of each gathered query's positive.
        mask: (N, M) bool, True = no negative of that query.
    """

    count: int
    positive_index: Tensor
    mask: Tensor

    @classmethod
    def of(cls, query_keys: Tensor, target_keys: Tensor) -> GatheredPairs:
        """Gather content keys: (n,) of local queries, (n * (1 + k),) of local targets.

        The first n targets are the queries' positives. Every process must call this.
        """
        count = len(query_keys)
        positives = gather_with_grad(target_keys[:count])
        keys = torch.cat([positives, gather_with_grad(target_keys[count:])])
        index = torch.arange(len(positives), device=keys.device)
        queries = gather_with_grad(query_keys)
        return cls(count, index, false_negative_mask(queries, keys, index))

    def only(self, rows: Tensor) -> GatheredPairs:
        """Return the pairs of some queries, (N,) bool; `gather_targets` stays with the whole."""
        return replace(self, positive_index=self.positive_index[rows], mask=self.mask[rows])

    def without_twins(self, targets: Tensor, max_similarity: float | None) -> GatheredPairs:
        """Return the pairs without negatives that are as good as positives.

        A target whose cosine to the positive target reaches `max_similarity` is taken for one that
        nobody labelled, as in the rewards (`similarity_columns`); it is decided on the
        targets alone, so that a query cannot lose a hard negative by drifting away.

        Args:
            targets: (M, D) gathered unit vectors; detached here.
            max_similarity: In (-1, 1]; None is off.
        """
        if max_similarity is None:
            return self
        vectors = targets.detach().float()
        is_twin = vectors[self.positive_index] @ vectors.T >= max_similarity
        mask = (self.mask | is_twin).scatter(1, self.positive_index[:, None], False)
        return replace(self, mask=mask)

    def gather_targets(self, vectors: Tensor) -> Tensor:
        """Return (M, D) targets of all processes of (n * (1 + k), D) local ones; gradient flows."""
        parts = vectors[: self.count], vectors[self.count :]
        return torch.cat([gather_with_grad(part) for part in parts])

    def loss(self, queries: Tensor, targets: Tensor, *, temperature: float) -> Tensor:
        """Return `info_nce` of gathered queries (N, D) and targets (M, D); 0 for no queries."""
        if not len(queries):
            return 0 * queries.sum()  # still part of the graph
        index, mask = self.positive_index, self.mask
        return info_nce(queries, targets, temperature=temperature, positive_index=index, mask=mask)

    def accuracy(self, queries: Tensor, targets: Tensor) -> Tensor:
        """Return `contrastive_accuracy` of gathered queries (N, D) and targets (M, D)."""
        index, mask = self.positive_index, self.mask
        return contrastive_accuracy(queries, targets, positive_index=index, mask=mask)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, tensor: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        rows = [torch.empty_like(tensor) for _ in range(dist.get_world_size())]
        dist.all_gather(rows, tensor.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad_output: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad_output.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)  # in place, hence the clone; Gloo has no reduce_scatter
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


def _masked_logits(
    query_embeds: Tensor,
    target_embeds: Tensor,
    temperature: float | Tensor,
    positive_index: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float32 (N, M) scaled similarities, (N,) positives, (N, M) mask; all checked."""
    n, m = len(query_embeds), len(target_embeds)
    problems = []
    if query_embeds.dim() != 2 or query_embeds.shape[1:] != target_embeds.shape[1:] or not n:
        problems.append("expected (N, D) and (M, D) embeddings with N > 0")
    if positive_index is None and n > m:
        problems.append(f"expected at least N targets or positive_index, got {m} for {n} queries")
    if positive_index is not None and positive_index.shape != (n,):
        problems.append(f"expected positive_index of shape ({n},): {tuple(positive_index.shape)}")
    if mask is not None and (mask.shape != (n, m) or mask.dtype != torch.bool):
        problems.append(f"expected a bool mask ({n}, {m}): {mask.dtype} {tuple(mask.shape)}")
    if not temperature > 0:
        problems.append(f"expected temperature > 0: {temperature}")
    if problems:
        raise ValueError(
            f"query_embeds {tuple(query_embeds.shape)}, target_embeds {tuple(target_embeds.shape)}:"
            f" {'; '.join(problems)}; correct the arguments"
        )
    logits = query_embeds.float() @ target_embeds.float().T / temperature
    if positive_index is None:
        positive_index = torch.arange(n, device=logits.device)
    if mask is None:
        mask = torch.zeros_like(logits, dtype=torch.bool)
    return logits, positive_index, mask.scatter(1, positive_index[:, None], False)
