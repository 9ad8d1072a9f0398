"""The InfoNCE family: closed forms, naive float64 loops, symmetries, two processes = one."""

import math
import socket
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from torch import Tensor

from twn_rl.training.losses import (
    GatheredPairs,
    contrastive_accuracy,
    false_negative_mask,
    gather_with_grad,
    info_nce,
    key_ids,
)

TEMPERATURE = 0.1


def _unit(n: int, d: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def _naive_info_nce(
    queries: Tensor, targets: Tensor, positives: list[int], mask: Tensor, symmetric: bool
) -> float:
    """Loops in float64, one softmax term at a time, straight from the definition."""
    n, m = len(queries), len(targets)

    def weight(i: int, j: int) -> float:
        return math.exp(float(queries[i] @ targets[j]) / TEMPERATURE)

    forward, backward = 0.0, 0.0
    for i in range(n):
        p = positives[i]
        rivals = sum(weight(i, j) for j in range(m) if j != p and not mask[i, j])
        forward -= math.log(weight(i, p) / (weight(i, p) + rivals)) / n
        rivals = sum(
            weight(q, p) for q in range(n) if q != i and positives[q] != p and not mask[q, p]
        )
        backward -= math.log(weight(i, p) / (weight(i, p) + rivals)) / n
    return (forward + backward) / 2 if symmetric else forward


def test_zero_embeddings_give_log_of_the_number_of_candidates() -> None:
    queries, targets = torch.zeros(3, 8), torch.zeros(7, 8)
    one_way = info_nce(queries, targets, temperature=0.02, symmetric=False)
    both_ways = info_nce(queries, targets, temperature=0.02)
    assert one_way.item() == pytest.approx(math.log(7))
    assert both_ways.item() == pytest.approx((math.log(7) + math.log(3)) / 2)


def test_orthogonal_embeddings_have_their_closed_form() -> None:
    eye = torch.eye(4)
    expected = math.log(1 + 3 * math.exp(-1 / TEMPERATURE))
    assert info_nce(eye, eye, temperature=TEMPERATURE).item() == pytest.approx(expected, rel=1e-3)


def test_a_sign_flip_turns_the_best_loss_into_the_worst() -> None:
    eye = torch.eye(4)
    right = info_nce(eye, eye, temperature=TEMPERATURE)
    assert info_nce(eye, -eye, temperature=TEMPERATURE) > math.log(4) > right


@given(
    n=st.integers(1, 6),
    extra=st.integers(0, 5),
    seed=st.integers(0, 10_000),
    symmetric=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_info_nce_equals_naive_float64_loops(
    n: int, extra: int, seed: int, symmetric: bool
) -> None:
    queries, targets = _unit(n, 5, seed), _unit(n + extra, 5, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    positives = torch.randint(n + extra, (n,), generator=generator)  # shared positives included
    mask = torch.rand(n, n + extra, generator=generator) < 0.3
    loss = info_nce(
        queries,
        targets,
        temperature=TEMPERATURE,
        positive_index=positives,
        mask=mask,
        symmetric=symmetric,
    )
    expected = _naive_info_nce(queries, targets, positives.tolist(), mask, symmetric)
    assert loss.item() == pytest.approx(expected, rel=1e-4, abs=1e-5)


@given(seed=st.integers(0, 10_000), symmetric=st.booleans())
@settings(max_examples=25, deadline=None)
def test_permuting_queries_and_targets_does_not_change_the_loss(seed: int, symmetric: bool) -> None:
    queries, targets = _unit(5, 6, seed), _unit(8, 6, seed + 1)
    generator = torch.Generator().manual_seed(seed)
    rows, columns = torch.randperm(5, generator=generator), torch.randperm(8, generator=generator)
    mask = torch.rand(5, 8, generator=generator) < 0.3
    plain = info_nce(queries, targets, temperature=TEMPERATURE, mask=mask, symmetric=symmetric)
    permuted = info_nce(
        queries[rows],
        targets[columns],
        temperature=TEMPERATURE,
        positive_index=torch.argsort(columns)[rows],
        mask=mask[rows][:, columns],
        symmetric=symmetric,
    )
    torch.testing.assert_close(plain, permuted)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_rotating_the_space_does_not_change_the_loss(seed: int) -> None:
    queries, targets = _unit(5, 6, seed), _unit(8, 6, seed + 1)
    rotation, _ = torch.linalg.qr(_unit(6, 6, seed + 2))
    plain = info_nce(queries, targets, temperature=TEMPERATURE)
    rotated = info_nce(queries @ rotation, targets @ rotation, temperature=TEMPERATURE)
    torch.testing.assert_close(plain, rotated, rtol=1e-4, atol=1e-5)


def test_masked_targets_get_no_gradient_and_the_positive_is_never_masked() -> None:
    queries, targets = _unit(2, 4, 0), _unit(4, 4, 1).requires_grad_()
    mask = torch.ones(2, 4, dtype=torch.bool)
    mask[:, 3] = False
    info_nce(queries, targets, temperature=TEMPERATURE, mask=mask, symmetric=False).backward()
    assert targets.grad is not None
    assert targets.grad[2].eq(0).all()
    assert targets.grad[[0, 1, 3]].ne(0).any(dim=1).all()


def test_bfloat16_embeddings_are_scored_in_float32() -> None:
    queries, targets = _unit(4, 8, 0).bfloat16(), _unit(4, 8, 1).bfloat16()
    loss = info_nce(queries, targets, temperature=0.02)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, info_nce(queries.float(), targets.float(), temperature=0.02))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"temperature": 0.0}, "temperature > 0"),
        ({"temperature": 0.1, "mask": torch.zeros(2, 3)}, "bool mask"),
        ({"temperature": 0.1, "positive_index": torch.zeros(3, dtype=torch.long)}, r"shape \(2,\)"),
    ],
)
def test_arguments_that_do_not_fit_are_named(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        info_nce(torch.zeros(2, 4), torch.zeros(3, 4), **arguments)
    with pytest.raises(ValueError, match="at least N targets"):
        info_nce(torch.zeros(3, 4), torch.zeros(2, 4), temperature=0.1)


def test_copies_of_the_positive_and_siblings_positives_are_masked() -> None:
    query_ids = torch.tensor([1, 1, 2])
    target_ids = torch.tensor([10, 11, 12, 10, 2, 13])  # a copy of target 0, and query 2 itself
    mask = false_negative_mask(query_ids, target_ids, torch.tensor([0, 1, 2]))
    assert mask.tolist() == [
        [False, True, False, True, False, False],
        [True, False, False, True, False, False],
        [False, False, False, False, True, False],
    ]


def test_a_duplicate_positive_does_not_cost_loss_once_masked() -> None:
    queries = torch.eye(2)
    targets = torch.eye(2)[[0, 1, 0]]
    ids = torch.tensor([5, 6, 5])
    mask = false_negative_mask(torch.tensor([1, 2]), ids, torch.tensor([0, 1]))
    masked = info_nce(queries, targets, temperature=TEMPERATURE, mask=mask, symmetric=False)
    assert masked.item() == pytest.approx(0.0, abs=1e-4)
    assert info_nce(queries, targets, temperature=TEMPERATURE, symmetric=False) > 0.3


def test_key_ids_tell_different_contents_apart() -> None:
    ids = key_ids(["ff" * 32, "00" * 32, "ff" * 32])
    assert ids.dtype == torch.int64
    assert ids[0] == ids[2] != ids[1]


def test_accuracy_counts_ties_and_nan_against_the_model() -> None:
    eye = torch.eye(4)
    assert contrastive_accuracy(eye, eye).item() == 1.0
    assert contrastive_accuracy(torch.ones(4, 3), torch.ones(4, 3)).item() == 0.0
    assert contrastive_accuracy(torch.full((4, 3), torch.nan), torch.ones(4, 3)).item() == 0.0
    duplicate = torch.tensor([[False, True], [True, False]])
    assert contrastive_accuracy(torch.ones(2, 3), torch.ones(2, 3), mask=duplicate).item() == 1.0


def test_gathering_is_the_identity_in_one_process() -> None:
    rows = torch.randn(2, 3, requires_grad=True)
    assert gather_with_grad(rows) is rows


# Two processes: each holds 2 queries and 3 targets (2 positives, 1 hard negative).
def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    weight = torch.linspace(-1, 1, 24, dtype=torch.float64).reshape(6, 4).sin()
    return _unit(4, 6, 0), _unit(6, 6, 1), weight


def _loss(queries: Tensor, targets: Tensor, positives: Tensor) -> Tensor:
    mask = false_negative_mask(torch.arange(4), torch.tensor([9, 8, 7, 9, 5, 4]), positives)
    return info_nce(queries, targets, temperature=TEMPERATURE, positive_index=positives, mask=mask)


def _run_rank(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    queries, targets, weight = _inputs()
    weight.requires_grad_()
    with pytest.raises(ValueError, match=r"\[\[1, 6\], \[2, 6\]\].*dataloader_drop_last"):
        gather_with_grad(queries[: rank + 1])
    local_queries, local_targets = queries.chunk(2)[rank], targets.chunk(2)[rank]
    loss = _loss(
        gather_with_grad(local_queries @ weight),
        gather_with_grad(local_targets @ weight),
        gather_with_grad(torch.tensor([0, 1]) + 3 * rank),
    )
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    result = {"loss": loss.detach(), "grad": weight.grad / 2}  # DDP: the mean over ranks
    torch.save(result, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.distributed
def test_two_gloo_processes_give_the_loss_and_gradient_of_one_and_refuse_uneven_batches(
    tmp_path: Path,
) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_run_rank, args=(port, str(tmp_path)), nprocs=2)  # pyright: ignore
    queries, targets, weight = _inputs()
    weight.requires_grad_()
    loss = _loss(queries @ weight, targets @ weight, torch.tensor([0, 1, 3, 4]))
    loss.backward()
    for rank in range(2):
        result = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        torch.testing.assert_close(result["loss"], loss.detach())
        torch.testing.assert_close(result["grad"], weight.grad)


def test_a_target_as_good_as_the_positive_is_no_negative() -> None:
    """Targets at 0, 10 and 80 degrees: the second is a twin of the first, and the other way."""
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 80.0]))
    targets = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    pairs = GatheredPairs.of(torch.arange(3), torch.arange(10, 13))
    assert pairs.without_twins(targets, None) is pairs
    found = pairs.without_twins(targets, 0.95)
    assert found.mask.tolist() == [[False, True, False], [True, False, False], [False] * 3]
    assert pairs.without_twins(targets, -0.99).mask.sum() == 6  # never the positive itself
    queries = targets.detach().flip(1)
    expected = info_nce(queries, targets, temperature=0.1, mask=found.mask)
    assert torch.equal(found.loss(queries, targets, temperature=0.1), expected)
