"""From probabilities of thinking to one threshold: what quality costs in tokens.

An input thinks when its probability is above the threshold.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twn_rl.evaluation.results import INTERVAL_METRICS
from twn_rl.metrics.calibration import expected_calibration_error, roc_auc
from twn_rl.runtime.problems import Problems

# Nearer probabilities are one: padding alone moves them by less.
TIE_TOLERANCE = 1e-6
# Means that differ by less are equal.
ROUNDING = 1e-9


@dataclass(frozen=True)
class CurvePoint:
    """What one threshold gives on the data it was measured on.

    Attributes:
        threshold: In [0, 1]; None for the oracle, which no threshold gives.
        quality: Mean of the metric.
        think_tokens: Mean tokens written per input.
        think_rate: Share of inputs that think.
        random_quality: Quality of thinking at the same rate by chance, as expected value.
    """

    threshold: float | None
    quality: float
    think_tokens: float
    think_rate: float
    random_quality: float


@dataclass(frozen=True)
class GateCurve:
    """All thresholds that differ on the data, and what to compare them with.

    Attributes:
        points: By rising think rate; the first never thinks, the last always does.
        oracle: The better mode of each input, thinking only where that is better: the ceiling.
    """

    points: list[CurvePoint]
    oracle: CurvePoint

    @property
    def never(self) -> CurvePoint:
        """The point without thinking."""
        return self.points[0]

    @property
    def always(self) -> CurvePoint:
        """The point with thinking everywhere."""
        return self.points[-1]


def gate_curve(
    probabilities: ArrayLike, no_think: ArrayLike, think: ArrayLike, think_tokens: ArrayLike
) -> GateCurve:
    """Return quality and cost at every threshold that matters.

    >>> curve = gate_curve([0.9, 0.2], [0.0, 1.0], [1.0, 0.0], [10, 30])
    >>> [(p.threshold, p.quality, p.think_tokens, p.think_rate) for p in curve.points]
    [(1.0, 0.5, 0.0, 0.0), (0.55, 1.0, 5.0, 0.5), (0.0, 0.5, 20.0, 1.0)]

    Args:
        probabilities: (N,) in (0, 1] of the gate or the policy.
        no_think: (N,) the metric of each input without thinking.
        think: (N,) the same with its thought.
        think_tokens: (N,) tokens of the thought, also where it was of no use.

    Raises:
        ValueError: For other shapes, no inputs, numbers not finite, probabilities out of range.
    """
    gate, before, after, tokens = _checked(probabilities, no_think, think, think_tokens)
    order = np.argsort(-gate, kind="stable")
    gate, count = gate[order], len(gate)
    # Cuts between inputs whose probabilities differ; position = how many think.
    cuts = 1 + np.flatnonzero(gate[:-1] - gate[1:] > TIE_TOLERANCE)
    numbers = [0, *cuts.tolist(), count]
    thresholds = [1.0, *((gate[cuts - 1] + gate[cuts]) / 2).tolist(), 0.0]
    gained = np.concatenate([[0.0], np.cumsum((after - before)[order])])
    spent = np.concatenate([[0.0], np.cumsum(tokens[order])])
    points = [
        CurvePoint(
            threshold=float(threshold),
            quality=float(before.mean() + gained[number] / count),
            think_tokens=float(spent[number] / count),
            think_rate=number / count,
            random_quality=_mix(before, after, number / count),
        )
        for threshold, number in zip(thresholds, numbers, strict=True)
    ]
    thinks = after > before
    rate = float(thinks.mean())
    oracle = CurvePoint(
        threshold=None,
        quality=float(np.maximum(before, after).mean()),
        think_tokens=float(np.where(thinks, tokens, 0).mean()),
        think_rate=rate,
        random_quality=_mix(before, after, rate),
    )
    return GateCurve(points, oracle)


def _mix(before: NDArray[Any], after: NDArray[Any], rate: float) -> float:
    return float((1 - rate) * before.mean() + rate * after.mean())


def _checked(*columns: ArrayLike) -> list[NDArray[np.float64]]:
    arrays = [np.asarray(column, dtype=np.float64) for column in columns]
    shapes = [array.shape for array in arrays]
    if arrays[0].ndim != 1 or not len(arrays[0]) or len(set(shapes)) != 1:
        raise ValueError(
            f"probabilities, no_think, think, think_tokens have shapes {shapes}; expected (N,) "
            "with N > 0 for all; pass one number an input"
        )
    bad = [int((~np.isfinite(array)).sum()) for array in arrays]
    if any(bad) or arrays[0].min() <= 0 or arrays[0].max() > 1:
        raise ValueError(
            f"probabilities reach from {arrays[0].min():.3g} to {arrays[0].max():.3g}, non-finite "
            f"numbers by column: {bad}; expected probabilities in (0, 1] and finite numbers; look "
            "for the input that gives NaN"
        )
    return arrays


def curve_rows(curve: GateCurve, **fixed: Any) -> list[dict[str, Any]]:
    """Return the rows of a CSV file: every point under the name "curve", then the references."""
    named = [("curve", point) for point in curve.points]
    named += [("never", curve.never), ("always", curve.always), ("oracle", curve.oracle)]
    return [{**fixed, "name": name, **asdict(point)} for name, point in named]


@dataclass(frozen=True)
class ThresholdRule:
    """Which point of a curve is served; a recipe's flags have the same names."""

    metric: str = field(
        default="hit@1", metadata={"help": f"Quality of the curve: {', '.join(INTERVAL_METRICS)}."}
    )
    max_quality_drop: float = field(
        default=0.005,
        metadata={
            "help": "Threshold: the cheapest this close to the best quality (0.005: half a point)."
        },
    )
    think_rate: float | None = field(
        default=None, metadata={"help": "Threshold instead: the best that thinks at most so often."}
    )
    min_quality: float | None = field(
        default=None, metadata={"help": "Threshold instead: the cheapest with this quality."}
    )

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        problems.unless(
            self.metric in INTERVAL_METRICS,
            f"metric = {self.metric!r}, expected one of {INTERVAL_METRICS}",
        )
        problems.expect(self, ">= 0", "max_quality_drop")
        problems.expect(self, "None or in [0, 1]", "think_rate")
        problems.unless(
            self.think_rate is None or self.min_quality is None,
            f"think_rate = {self.think_rate} and min_quality = {self.min_quality}, expected one of "
            "them",
        )
        problems.refuse("ThresholdRule")

    def pick(self, points: Sequence[CurvePoint]) -> CurvePoint:
        """Return the point of the rule asked for; the knee if neither rate nor quality is given.

        The knee is the cheapest point whose quality is within `max_quality_drop` of the best;
        `think_rate` takes the best point that thinks at most so often, `min_quality` the cheapest
        point that reaches it. Cheapest is fewest think tokens; among equals the better quality,
        then the higher threshold.

        Raises:
            ValueError: If no threshold reaches `min_quality`.
        """
        best = max(point.quality for point in points)
        drop, wanted = self.max_quality_drop, self.min_quality
        if self.think_rate is not None:
            points = [p for p in points if p.think_rate <= self.think_rate + ROUNDING]
            best, drop = max(point.quality for point in points), 0.0
        elif wanted is not None:
            if not wanted <= best + ROUNDING:
                raise ValueError(
                    f"min_quality = {wanted}; expected at most {best:.4f}, the best any threshold "
                    "reaches; lower it"
                )
            best, drop = wanted, 0.0
        good = [point for point in points if point.quality >= best - drop - ROUNDING]
        # Points come by rising think rate, so that the first of equals has the highest threshold.
        return min(good, key=lambda point: (point.think_tokens, -point.quality))


@dataclass(frozen=True)
class ChosenThreshold:
    """A curve, the point of it that is served, and figures for metrics.json."""

    curve: GateCurve
    chosen: CurvePoint
    metrics: dict[str, Any]


def choose_threshold(
    rule: ThresholdRule,
    curve: GateCurve,
    *,
    probability: NDArray[Any],
    is_worth_it: NDArray[np.bool_],
    rows: Sequence[Mapping[str, Any]],
) -> ChosenThreshold:
    """Return the point of a rule, with what decisions by it do on the validation split.

    Args:
        rule: Which point.
        curve: Of these inputs.
        probability: (N,) of thinking.
        is_worth_it: (N,) whether the thought helped.
        rows: (N,) with `task` and `hop`, the groups each input counts in.
    """
    chosen = rule.pick(curve.points)
    assert chosen.threshold is not None
    rates: dict[str, list[bool]] = {}
    for row, thinks in zip(rows, probability > chosen.threshold, strict=True):
        for name in dict.fromkeys([row["task"], *([row["hop"]] if row["hop"] else [])]):
            rates.setdefault(str(name), []).append(bool(thinks))
    metrics = {
        "validation_auc": roc_auc(probability, is_worth_it),
        "validation_ece": expected_calibration_error(probability, is_worth_it),
        "chosen": asdict(chosen),
        "never": asdict(curve.never),
        "always": asdict(curve.always),
        "oracle": asdict(curve.oracle),
        "think_rate_by_group": {n: float(np.mean(t)) for n, t in sorted(rates.items())},
    }
    return ChosenThreshold(curve, chosen, metrics)
