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
        # With so small an epsilon the scale of a state does not matter: a unit vector does as well.
        self.norm = nn.LayerNorm(width, eps=1e-12, dtype=torch.float32)
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
        hidden_size: Width of the hidden layer.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW, on the matrices.
        batch_size: Labelled states a step.
        max_epochs: Passes over the fitting part at most.
        patience: Epochs without a better held-out loss before stopping.
        held_out_share: Share of the labelled states kept for stopping and reporting.
        seed: Decides the split, the initial weights and the order.
    """

    hidden_size: int = 256
    learning_rate: float = 1e-3
    weight_decay: float = 0.1
    batch_size: int = 256
    max_epochs: int = 200
    patience: int = 20
    held_out_share: float = 0.2
    seed: int = 0

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        problems.expect(self, ">= 1", "hidden_size", "batch_size", "max_epochs", "patience")
        problems.expect(self, "> 0", "learning_rate")
        problems.expect(self, "in (0, 1)", "held_out_share")
        problems.refuse("FitSettings")


def fit_gate(
    states: Tensor, targets: Tensor, settings: FitSettings | None = None
) -> tuple[Gate, dict[str, Any]]:
    """Return a frozen gate on the CPU and a report of its quality on held-out states.

    Binary cross-entropy with both classes weighted alike; afterwards the bias is moved back by the
    log odds of the classes, so that probabilities are those of the data. The epoch with the lowest
    held-out loss is kept. With fewer than two targets of a class the gate is constant, and a
    warning says so.

    Args:
        states: (N, D) no-think states; the fit runs on their device.
        targets: (N,) in [0, 1]: labels, or soft labels, which count as class 1 from 0.5 on.
        settings: Of the fit; defaults if None.

    Returns:
        The gate, and `num_examples`, `num_positive`, `num_held_out`, `epochs`, `is_constant`,
        `held_out_loss`, `held_out_auc` (None without both classes), `held_out_ece`.

    Raises:
        ValueError: For shapes that do not fit, or numbers that are not finite or not in [0, 1].
    """
    settings = settings or FitSettings()
    states, targets = states.detach().float(), targets.detach().float().to(states.device)
    _check(states, targets)
    is_positive = targets >= 0.5
    num_positive = int(is_positive.sum())
    report: dict[str, Any] = {
        "num_examples": len(targets),
        "num_positive": num_positive,
        "num_held_out": 0,
        "epochs": 0,
        "is_constant": min(num_positive, len(targets) - num_positive) < 2,
        "held_out_loss": None,
        "held_out_auc": None,
        "held_out_ece": None,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        gate = Gate(states.shape[1], settings.hidden_size)
        if report["is_constant"]:
            _make_constant(gate, num_positive, len(targets))
            return gate, report
        held_out = _held_out(is_positive.cpu(), settings.held_out_share).to(states.device)
        gate = gate.to(states.device)
        fit = (states[~held_out], targets[~held_out])
        check = (states[held_out], targets[held_out])
        report["epochs"], report["held_out_loss"] = _train(gate, fit, check, settings)
    report["num_held_out"] = len(check[1])
    probability = gate.probability(check[0]).cpu()
    labels = (check[1] >= 0.5).cpu()
    report["held_out_auc"] = roc_auc(probability, labels)
    report["held_out_ece"] = expected_calibration_error(probability, labels)
    return gate.cpu(), report


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


def _make_constant(gate: Gate, num_positive: int, num_examples: int) -> None:
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


def _held_out(is_positive: Tensor, share: float) -> Tensor:
    """Return the mask (N,) of held-out examples: the same share of each class, at least one.

    Each class has two examples or more.
    """
    mask = torch.zeros_like(is_positive)
    for label in (False, True):
        members = torch.nonzero(is_positive == label).flatten()
        count = min(max(1, round(share * len(members))), len(members) - 1)
        mask[members[torch.randperm(len(members))[:count]]] = True
    return mask


def _train(
    gate: Gate, fit: tuple[Tensor, Tensor], check: tuple[Tensor, Tensor], settings: FitSettings
) -> tuple[int, float]:
    """Fit the gate in place; return the epoch that was kept and its held-out loss."""
    positive_mass = fit[1].sum()
    pos_weight = (len(fit[1]) - positive_mass) / positive_mass

    def loss(part: tuple[Tensor, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(gate(part[0]), part[1], pos_weight=pos_weight)

    gate.requires_grad_(True)
    matrices = [p for p in gate.parameters() if p.ndim > 1]
    rest = [p for p in gate.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices}, {"params": rest, "weight_decay": 0.0}],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
    )
    best, best_epoch, best_state = float("inf"), 0, {}
    for epoch in range(1, settings.max_epochs + 1):
        for rows in torch.randperm(len(fit[1])).split(settings.batch_size):
            rows = rows.to(fit[0].device)
            optimizer.zero_grad()
            loss((fit[0][rows], fit[1][rows])).backward()
            optimizer.step()
        with torch.no_grad():
            held_out = float(loss(check))
        if held_out < best:
            best, best_epoch = held_out, epoch
            best_state = {key: value.clone() for key, value in gate.state_dict().items()}
        elif epoch - best_epoch >= settings.patience:
            break
    gate.load_state_dict(best_state)
    gate.requires_grad_(False)
    # Weighting the classes alike has moved the log odds by log(pos_weight).
    gate.output.bias.sub_(pos_weight.log())
    return best_epoch, best
