"""The routing gate, a small network on the no-think state that says whether to think; its fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twn_rl.metrics.calibration import expected_calibration_error, roc_auc
from twn_rl.modeling.judge import Judge
from twn_rl.runtime.problems import Problems

logger = logging.getLogger(__name__)

# So small that the scale of a state does not matter: a unit vector does as well.
NORM_EPSILON = 1e-12
QUERY_SIDE = "query"
DOCUMENT_SIDE = "document"
SIDES = (QUERY_SIDE, DOCUMENT_SIDE)
# Of a model's settings.
THRESHOLD_FIELDS = {QUERY_SIDE: "gate_threshold", DOCUMENT_SIDE: "document_gate_threshold"}


class Gate(nn.Module):
    """LayerNorm, one hidden layer, one logit; frozen, always float32.

    Attributes:
        width: Width D of the states it reads.
        hidden_size: Width of the hidden layer.
        fitted_to: What it was fitted to, see `Fingerprints.gate_origin`; empty if unknown.
        judge: Judges the thoughts of those that thought; None where none was fitted.
    """

    def __init__(self, width: int, hidden_size: int = 256) -> None:
        super().__init__()
        self.width, self.hidden_size = width, hidden_size
        self.fitted_to: dict[str, str] = {}
        self.judge: Judge | None = None
        self.norm = nn.LayerNorm(width, eps=NORM_EPSILON, dtype=torch.float32)
        self.hidden = nn.Linear(width, hidden_size, dtype=torch.float32)
        self.output = nn.Linear(hidden_size, 1, dtype=torch.float32)
        self.requires_grad_(False)

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (N,) of no-think states (N, D); above 0 thinking rather helps.

        Args:
            states: Mean read-out states before normalisation, as `DualLoraModel.read_out` returns
                them without completions; any float type, detached here.
        """
        with torch.autocast(states.device.type, enabled=False):
            hidden = F.gelu(self.hidden(self.norm(states.detach().float())))
            return self.output(hidden)[:, 0]

    def probability(self, states: Tensor) -> Tensor:
        """Return the probability (N,) in (0, 1] that thinking helps; no gradient.

        Threshold 0 thinks about everything and threshold 1 about nothing: think if above.
        """
        with torch.no_grad():
            return self(states).sigmoid().clamp(min=torch.finfo(torch.float32).tiny)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Gate:
        """Follow the model to its device but never to a lower precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


@dataclass(frozen=True)
class FitSettings:
    """How a gate is fitted.

    Attributes:
        num_folds: Parts of the labelled states, and members of the gate: each is fitted without one
            part, which stops it and judges it. At most as many as the rarer class has examples.
        hidden_size: Width of a member's hidden layer.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, on the matrices.
        batch_size: Labelled states a step.
        max_epochs: Passes over what a member is fitted to at most.
        patience: Epochs without a better held-out loss before stopping.
        seed: Decides the folds, the initial weights and the order.
    """

    num_folds: int = 10
    hidden_size: int = 64
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 256
    max_epochs: int = 200
    patience: int = 20
    seed: int = 0

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        problems.expect(self, ">= 2", "num_folds")
        problems.expect(self, ">= 1", "hidden_size", "batch_size", "max_epochs", "patience")
        problems.expect(self, "> 0", "learning_rate")
        problems.refuse("FitSettings")


def fit_gate(
    states: Tensor, targets: Tensor, settings: FitSettings | None = None
) -> tuple[Gate, dict[str, Any]]:
    """Return a frozen gate on the CPU and a report of its quality on held-out states.

    Cross-validated bagging: the states are dealt into folds, each with the same share of both
    classes; one member a fold is fitted to the others, and the gate's logit is the mean of its
    members'. So all labels are used, and each is judged by a member that has not seen it. Members
    that merge into one network cost no second forward: their hidden layers stand side by side.

    A member minimises binary cross-entropy with both classes weighted alike; afterwards the bias is
    moved back by the log odds of the classes, so that probabilities are those of the data. Its
    epoch with the lowest held-out loss is kept. With fewer than two targets of a class the gate is
    constant, and a warning says so.

    Args:
        states: (N, D) no-think states; the fit runs on their device.
        targets: (N,) in [0, 1]: labels, or soft labels, which count as class 1 from 0.5 on.
        settings: Of the fit; defaults if None.

    Returns:
        The gate, and `num_examples`, `num_positive`, `is_constant`, `num_folds`, `epochs` (one a
        member), and of every example, judged by the member that was fitted without it:
        `held_out_loss` (mean over members), `held_out_auc`, `held_out_ece`; None if constant.

    Raises:
        ValueError: For shapes that do not fit, or numbers that are not finite or not in [0, 1].
    """
    settings = settings or FitSettings()
    states, targets = states.detach().float(), targets.detach().float().to(states.device)
    _check(states, targets)
    is_positive = (targets >= 0.5).cpu()
    num_positive = int(is_positive.sum())
    smaller_class = min(num_positive, len(targets) - num_positive)
    report: dict[str, Any] = {
        "num_examples": len(targets),
        "num_positive": num_positive,
        "is_constant": smaller_class < 2,
        "num_folds": 0,
        "epochs": [],
        "held_out_loss": None,
        "held_out_auc": None,
        "held_out_ece": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        if report["is_constant"]:
            return _constant_gate(states.shape[1], num_positive, len(targets)), report
        num_folds = min(settings.num_folds, smaller_class)
        folds = _deal(is_positive, num_folds).to(states.device)
        members = Members(states.shape[1], settings.hidden_size, num_folds).to(states.device)
        report["epochs"], report["held_out_loss"] = _train(
            members, states, targets, folds, settings
        )
        gate = members.merge()
    with torch.no_grad():
        probability = members(states).gather(1, folds[:, None])[:, 0].sigmoid().cpu()
    report["num_folds"] = num_folds
    report["held_out_auc"] = roc_auc(probability, is_positive)
    report["held_out_ece"] = expected_calibration_error(probability, is_positive)
    return gate.cpu(), report


class Members(nn.Module):
    """Several gates of equal size side by side, which share nothing but the norm.

    Attributes:
        hidden: The hidden layers of K members of width H, below each other: (K * H, D).
        heads: The output layers of all: (K, H).
    """

    def __init__(self, width: int, hidden_size: int, count: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, count * hidden_size, dtype=torch.float32)
        self.heads = nn.Linear(hidden_size, count, dtype=torch.float32)

    def forward(self, states: Tensor) -> Tensor:
        """Return the logits (N, K) of all members."""
        hidden = F.gelu(self.hidden(F.layer_norm(states, states.shape[1:], eps=NORM_EPSILON)))
        each = hidden.unflatten(1, self.heads.weight.shape)
        return torch.einsum("nkh,kh->nk", each, self.heads.weight) + self.heads.bias

    def merge(self) -> Gate:
        """Return the one gate, frozen, whose logit is the mean of the members'."""
        gate = Gate(self.hidden.in_features, self.hidden.out_features).to(self.hidden.weight.device)
        with torch.no_grad():
            gate.hidden.weight.copy_(self.hidden.weight)
            gate.hidden.bias.copy_(self.hidden.bias)
            gate.output.weight.copy_(self.heads.weight.reshape(1, -1) / len(self.heads.bias))
            gate.output.bias.copy_(self.heads.bias.mean())
        return gate


def _check(states: Tensor, targets: Tensor) -> None:
    if states.ndim != 2 or targets.shape != (len(states),):
        raise ValueError(
            f"states has shape {tuple(states.shape)}, targets {tuple(targets.shape)}; expected "
            "(N, D) and (N,); pass one target a state"
        )
    bad = torch.nonzero(~states.isfinite().all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"states rows {bad[:5]} ({len(bad)} in all) hold NaN or infinity; expected finite "
            "numbers; check the precision of the model that made them"
        )
    if not bool(((targets >= 0) & (targets <= 1)).all()):
        raise ValueError(
            f"targets reach from {targets.min():.3g} to {targets.max():.3g}; expected numbers in "
            "[0, 1]; leave ignored examples out"
        )


def _constant_gate(width: int, num_positive: int, num_examples: int) -> Gate:
    """Return a gate, one unit wide, that gives everything the share of positive labels."""
    gate = Gate(width, 1)
    share = (num_positive + 1) / (num_examples + 2)  # Laplace's rule keeps the logit finite
    gate.output.weight.zero_()
    gate.output.bias.fill_(torch.tensor(share).logit())
    logger.warning(
        "%d of %d labels say that thinking helps: a gate needs two of each class; every input gets "
        "the same probability %.3f. Label more records, or change the margin",
        num_positive,
        num_examples,
        share,
    )
    return gate


def _deal(is_positive: Tensor, num_folds: int) -> Tensor:
    """Return the fold (N,) of every example: each class is dealt out in turn, in random order."""
    folds = torch.empty(len(is_positive), dtype=torch.long)
    for label in (False, True):
        members = torch.nonzero(is_positive == label).flatten()
        folds[members[torch.randperm(len(members))]] = torch.arange(len(members)) % num_folds
    return folds


def _train(
    members: Members, states: Tensor, targets: Tensor, folds: Tensor, settings: FitSettings
) -> tuple[list[int], float]:
    """Fit every member to all folds but its own; return the epochs kept and the held-out loss.

    They train in one go, each with its own loss and its own best epoch, until none gets better.
    """
    count = len(members.heads.bias)
    is_held_out = folds[:, None] == torch.arange(count, device=folds.device)
    positive_mass = (~is_held_out * targets[:, None]).sum(dim=0)
    pos_weight = ((~is_held_out).sum(dim=0) - positive_mass) / positive_mass

    def losses(rows: Tensor | slice, is_asked: Tensor) -> Tensor:
        """Return the mean loss (K,) of every member over those of the rows it is asked about."""
        logits, expected = members(states[rows]), targets[rows, None].expand(-1, count)
        each = F.binary_cross_entropy_with_logits(
            logits, expected, pos_weight=pos_weight, reduction="none"
        )
        return (each * is_asked[rows]).sum(dim=0) / is_asked[rows].sum(dim=0).clamp(min=1)

    parameters = [
        members.hidden.weight,
        members.heads.weight,
        members.hidden.bias,
        members.heads.bias,
    ]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:2]}, {"params": parameters[2:], "weight_decay": 0.0}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    best, best_epochs = torch.full((count,), float("inf")), torch.zeros(count, dtype=torch.long)
    kept = [parameter.detach().clone() for parameter in parameters]
    for epoch in range(1, settings.max_epochs + 1):
        for rows in torch.randperm(len(targets)).split(settings.batch_size):
            optimizer.zero_grad()
            losses(rows.to(states.device), ~is_held_out).sum().backward()
            optimizer.step()
        with torch.no_grad():
            held_out = losses(slice(None), is_held_out).cpu()
            better = held_out < best
            for old, new in zip(kept, parameters, strict=True):
                by_member = (count, -1)  # rows of a member lie together in all four
                old.view(by_member)[better] = new.view(by_member)[better]
        best = torch.where(better, held_out, best)
        best_epochs[better] = epoch
        if epoch - int(best_epochs.max()) >= settings.patience:
            break
    with torch.no_grad():
        for old, new in zip(kept, parameters, strict=True):
            new.copy_(old)
        # Weighting the classes alike has moved the log odds by log(pos_weight).
        members.heads.bias.sub_(pos_weight.log())
    return best_epochs.tolist(), float(best.mean())
