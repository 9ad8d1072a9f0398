"""The judge: after thinking, tells whether a thought is as thoughts that helped are; its fit.

It sees both states of an input, without and with the thought. Where thoughts helped, the two go
together in a certain way; a Gaussian of such pairs says how far from it a new pair lies. Either
state alone does not tell: an unfinished thought about a question longer than any of training has
a usual state, and so has the question.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)

# Pairs a direction of the Gaussian is estimated from, at least, and directions at most.
PAIRS_PER_AXIS = 8
MAX_AXES = 512


class Judge(nn.Module):
    """A Gaussian of (no-think state, think state) pairs; frozen, always float32.

    A pair is whitened along the K widest axes; what is left of it counts with one common spread
    (probabilistic PCA, Tipping and Bishop 1999).

    Attributes:
        width: Width D of a state.
        mean: (2D,) centre of the pairs whose thought helped.
        axes: (K, 2D) orthonormal.
        spread: (K + 1,) standard deviations along the axes, and of everything else.
        reference: (M,) sorted distances of held-out pairs whose thought helped.
        level: () a thought is kept if its plausibility is above it.
    """

    def __init__(self, width: int, num_axes: int, num_reference: int) -> None:
        super().__init__()
        self.width = width
        self.mean: Tensor
        self.axes: Tensor
        self.spread: Tensor
        self.reference: Tensor
        self.level: Tensor
        for name, shape in {
            "mean": (2 * width,),
            "axes": (num_axes, 2 * width),
            "spread": (num_axes + 1,),
            "reference": (num_reference,),
            "level": (),
        }.items():
            self.register_buffer(name, torch.zeros(shape))

    @property
    def sizes(self) -> tuple[int, int]:
        """K axes and M reference distances."""
        return len(self.axes), len(self.reference)

    def distance(self, no_think: Tensor, think: Tensor) -> Tensor:
        """Return (N,) squared distances of pairs from those whose thought helped.

        Args:
            no_think: (N, D) states without the thought, of any length.
            think: (N, D) states of the same inputs with it, of any length.
        """
        with torch.autocast(no_think.device.type, enabled=False):
            offset = _pairs(no_think, think).to(self.mean.device) - self.mean  # (N, 2D)
            along = offset @ self.axes.T  # (N, K)
            rest = offset - along @ self.axes
            squares = (along / self.spread[:-1]).square().sum(1)
            return squares + (rest / self.spread[-1]).square().sum(1)

    def plausibility(self, no_think: Tensor, think: Tensor) -> Tensor:
        """Return (N,) in (0, 1]: the share of helpful thoughts that lie at least as far out.

        A conformal p-value (Vovk et al. 2005): of thoughts that help, on inputs like those it was
        fitted on, at most a share a gets a plausibility of at most a. No gradient.
        """
        with torch.no_grad():
            distance = self.distance(no_think, think)
            nearer = torch.searchsorted(self.reference, distance)  # those below it
            count = len(self.reference)
            return (count - nearer + 1).float() / (count + 1)

    def keeps(self, plausibility: float) -> bool:
        """Tell whether a thought of this plausibility is used."""
        return plausibility > float(self.level)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Judge:
        """Follow the model to its device but never to a lower precision."""
        return super()._apply(lambda tensor: tensor.to(fn(tensor).device), recurse)


def fit_judge(
    fit: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], *, max_refused: float = 0.05
) -> Judge | None:
    """Return the judge of pairs whose thought helped; None, with a warning, if they are too few.

    Args:
        fit: (N, D) states without and with thoughts that helped; the Gaussian is theirs.
        held_out: (M, D) the same of inputs nothing was trained on; they say how far is far.
        max_refused: Share of thoughts that help which may be refused, in (0, 1).

    Raises:
        ValueError: For a share out of range, or states that do not fit or are not finite.
    """
    if not 0 < max_refused < 1:
        raise ValueError(f"max_refused = {max_refused}; expected in (0, 1); change it")
    pairs, others = (_checked(*part) for part in (fit, held_out))
    num_axes = min(len(pairs) // PAIRS_PER_AXIS, MAX_AXES, pairs.shape[1] - 1)
    needed = int(1 / max_refused)  # below it not even the farthest pair could be refused
    if num_axes < 1 or len(others) < needed:
        logger.warning(
            "%d helpful thoughts to learn from and %d held out: a judge needs %d and %d; thoughts "
            "are not judged. Label more records, or raise max_refused",
            *(len(pairs), len(others), PAIRS_PER_AXIS, needed),
        )
        return None
    judge = Judge(pairs.shape[1] // 2, num_axes, len(others))
    mean = pairs.mean(0)
    _, singular, axes = torch.linalg.svd(pairs - mean, full_matrices=False)
    variance = singular.square() / max(1, len(pairs) - 1)
    rest = variance[num_axes:].sum() / (pairs.shape[1] - num_axes)
    floor = 1e-6 * variance[0]  # pairs that are all alike would give distances without bound
    spread = torch.cat([variance[:num_axes], rest[None]]).clamp(min=float(floor)).sqrt()
    judge.mean.copy_(mean)
    judge.axes.copy_(axes[:num_axes])
    judge.spread.copy_(spread)
    judge.level.fill_(max_refused)
    judge.reference.copy_(judge.distance(*held_out).sort().values)
    return judge


def judge_report(
    judge: Judge | None, states: tuple[Tensor, Tensor], gains: Tensor
) -> dict[str, Any]:
    """Return how many of some thoughts the judge keeps: all, those that helped, those that hurt.

    Args:
        judge: None keeps everything.
        states: (N, D) states without and with the thought.
        gains: (N,) nats each thought saved.
    """
    if judge is None:
        return {"num_axes": None}
    is_kept = judge.plausibility(*states) > judge.level
    parts = {"all": torch.ones_like(gains).bool(), "helps": gains > 0, "hurts": gains < 0}
    shares = {
        f"kept_share_{name}": float(is_kept[part].float().mean()) if bool(part.any()) else None
        for name, part in parts.items()
    }
    sizes = {"num_axes": judge.sizes[0], "num_reference": judge.sizes[1]}
    return {**sizes, "level": float(judge.level), **shares}


def _pairs(no_think: Tensor, think: Tensor) -> Tensor:
    """Return (N, 2D) pairs whose halves have mean 0 and variance 1, as the gate sees states."""
    halves = [state.detach().float() for state in (no_think, think)]
    return torch.cat([F.layer_norm(half, half.shape[-1:], eps=1e-12) for half in halves], dim=1)


def _checked(no_think: Tensor, think: Tensor) -> Tensor:
    if no_think.ndim != 2 or no_think.shape != think.shape:
        raise ValueError(
            f"states have shapes {tuple(no_think.shape)} and {tuple(think.shape)}; expected (N, D) "
            "for both; pass both states of each input"
        )
    pairs = _pairs(no_think, think)
    bad = torch.nonzero(~pairs.isfinite().all(dim=1)).flatten().tolist()
    if bad:
        raise ValueError(
            f"states rows {bad[:5]} ({len(bad)} in all) hold NaN or infinity; expected finite "
            "numbers; check the precision of the model that made them"
        )
    return pairs
