"""What choices of thinking were worth, from the rows of an evaluation.

The rows hold every query both without and with its thought, so any rule of thinking can be judged
without running a model again: a rule is a share of thinking for each query.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from twn_rl.evaluation.gate_threshold import GateCurve, gate_curve
from twn_rl.evaluation.results import query_values
from twn_rl.metrics.ranking import bootstrap_interval

logger = logging.getLogger(__name__)

# Differences of means below this are rounding.
TOLERANCE = 1e-9
# What "as good as always thinking" may lack, of a metric in [0, 1].
ALLOWED_DROP = 0.005
# (Did it think?, would the thought have helped?) -> what to call it.
CHOICES = {
    (True, True): "thought, and it helped",
    (False, False): "did not think, and lost nothing",
    (True, False): "thought although it did not help",
    (False, True): "did not think although it would have helped",
}


@dataclass(frozen=True)
class Decider:
    """Who decides in a mode.

    Attributes:
        name: For readers.
        probability: Field of its rows with the probability of thinking.
        threshold: Metric with the threshold it was measured at.
    """

    name: str
    probability: str
    threshold: str


# Mode -> who decides in it.
DECIDERS = {
    "auto": Decider("the gate", "gate_probability", "gate_threshold"),
    "policy": Decider("the policy", "policy_probability", "policy_threshold"),
}


@dataclass(frozen=True)
class RoutedQuery:
    """One query measured both ways, and which was chosen.

    Attributes:
        never: Its row without thinking.
        always: Its row with its own thought.
        probability: What the gate or the policy said.
        is_thinking: Whether it thought.
    """

    never: Mapping[str, Any]
    always: Mapping[str, Any]
    probability: float
    is_thinking: bool

    @property
    def is_helped(self) -> bool:
        """Tell whether the positive ranks higher with the thought, as mode "oracle" asks."""
        return self.always["ranks"][0] < self.never["ranks"][0]

    @property
    def choice(self) -> tuple[bool, bool]:
        """Key of `CHOICES`."""
        return self.is_thinking, self.is_helped

    @property
    def stake(self) -> float:
        """Return what the choice moves, |difference of the reciprocal ranks|, in [0, 1)."""
        return abs(1.0 / self.always["ranks"][0] - 1.0 / self.never["ranks"][0])


@dataclass(frozen=True)
class RoutingPoint:
    """Quality and cost of one rule of thinking.

    Attributes:
        quality: Mean of the metric.
        think_rate: Mean share of queries that think, in [0, 1].
        think_tokens: Mean tokens of thinking a query.
    """

    quality: float
    think_rate: float
    think_tokens: float


def routed_queries(
    rows: Iterable[Mapping[str, Any]], mode: str = "auto"
) -> dict[str, list[RoutedQuery]]:
    """Return split -> queries measured in modes "never", "always" and one that decides.

    A split where one of the modes was not measured is left out, with a warning if one decided.

    Args:
        rows: Of an evaluation.
        mode: Which decides, of `DECIDERS`.
    """
    found: dict[str, dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in rows:
        found.setdefault(row["split"], {}).setdefault(row["id"], {})[row["mode"]] = row
    routed: dict[str, list[RoutedQuery]] = {}
    for split, queries in found.items():
        chosen = [modes for modes in queries.values() if mode in modes]
        whole = [modes for modes in chosen if "never" in modes and "always" in modes]
        if len(whole) < len(chosen):
            logger.warning(
                "split %r: %d of %d queries with mode %s lack never or always: left out of the "
                "judgement of it; measure all three modes",
                split,
                len(chosen) - len(whole),
                len(chosen),
                mode,
            )
        if whole:
            routed[split] = [
                RoutedQuery(
                    modes["never"],
                    modes["always"],
                    modes[mode][DECIDERS[mode].probability],
                    bool(modes[mode]["think_rate"]),
                )
                for modes in whole
            ]
    return routed


def routing_points(
    queries: Sequence[RoutedQuery], *, metric: str = "hit@1"
) -> dict[str, RoutingPoint]:
    """Return what never, always, the decisions, chance at their rate and the oracle reach.

    Args:
        queries: Of one split.
        metric: Any of `query_values`.
    """
    thinks = np.array([query.is_thinking for query in queries], dtype=float)
    shares = {
        "never": np.zeros(len(queries)),
        "always": np.ones(len(queries)),
        "decided": thinks,
        "random": np.full(len(queries), thinks.mean()),
        "oracle": np.array([query.is_helped for query in queries], dtype=float),
    }
    quality, tokens = _both_ways(queries, metric), _both_ways(queries, "think_tokens")
    return {
        mode: RoutingPoint(
            _mixed_mean(quality, share), float(share.mean()), _mixed_mean(tokens, share)
        )
        for mode, share in shares.items()
    }


def routing_curve(queries: Sequence[RoutedQuery], *, metric: str = "hit@1") -> GateCurve:
    """Return what every threshold would have given, from never to always thinking.

    Queries with equal probabilities think together, so a decider that says the same of all has
    two points, and the line between them is chance.
    """
    # A probability may round to 0, which is as good as the smallest number above it.
    smallest = np.finfo(np.float32).tiny
    probability = np.maximum([query.probability for query in queries], smallest)
    _, tokens = _both_ways(queries, "think_tokens")
    return gate_curve(probability, *_both_ways(queries, metric), tokens)


def routing_summary(
    queries: Sequence[RoutedQuery],
    *,
    metric: str = "hit@1",
    confidence: float = 0.95,
    seed: int = 0,
) -> dict[str, Any]:
    """Return quality and cost of the decisions beside the other rules, ready for JSON.

    Args:
        queries: Of one split.
        metric: Any of `query_values`.
        confidence: Of the paired bootstrap bounds of `quality_drop`.
        seed: Of the bootstrap.

    Returns:
        `metric`, `num_queries`; for each of never, always, decided, random, oracle its `quality`,
        `think_rate`, `think_tokens`; `oracle_share`, (decided - random) / (oracle - random), and
        `token_ratio`, decided's tokens / always's, each None where the divisor is 0;
        `least_token_ratio`, the same at the cheapest threshold that is at most `ALLOWED_DROP` below
        always on these queries: with the answers known, so what no chosen threshold can promise;
        `quality_drop`, always - decided, with `quality_drop_low` and `quality_drop_high`.
    """
    points = routing_points(queries, metric=metric)
    never, always = _both_ways(queries, metric)
    thinks = np.array([query.is_thinking for query in queries])
    drop = bootstrap_interval(
        always - np.where(thinks, always, never), confidence=confidence, seed=seed
    )
    gained = points["decided"].quality - points["random"].quality
    enough = points["always"].quality - ALLOWED_DROP - TOLERANCE
    curve = routing_curve(queries, metric=metric).points
    least = min(point.think_tokens for point in curve if point.quality >= enough)
    return {
        "metric": metric,
        "num_queries": len(queries),
        **{mode: asdict(point) for mode, point in points.items()},
        "oracle_share": _ratio(gained, points["oracle"].quality - points["random"].quality),
        "token_ratio": _ratio(points["decided"].think_tokens, points["always"].think_tokens),
        "least_token_ratio": _ratio(least, points["always"].think_tokens),
        "quality_drop": drop.mean,
        "quality_drop_low": drop.low,
        "quality_drop_high": drop.high,
    }


def describe_routing(split: str, summary: Mapping[str, Any], mode: str = "auto") -> str:
    """Return a `routing_summary` as a sentence."""
    decided, ratio, share = summary["decided"], summary["token_ratio"], summary["oracle_share"]
    drop = 100 * summary["quality_drop"]
    parts = [
        f"On {split} {DECIDERS[mode].name} thinks about {100 * decided['think_rate']:.0f} % of "
        f"{summary['num_queries']} queries",
        f"reaches a {summary['metric']} of {decided['quality']:.2f}, {abs(drop):.1f} points "
        f"{'below' if drop >= 0 else 'above'} always thinking",
    ]
    if ratio is not None:
        parts.insert(
            1,
            f"writes {100 * ratio:.0f} % of the tokens of always thinking (within "
            f"{100 * ALLOWED_DROP:g} points of it, the best threshold of these queries writes "
            f"{100 * summary['least_token_ratio']:.0f} %)",
        )
    if share is not None:
        parts.append(
            f"covers {100 * share:.0f} % of the way from chance at the same rate to the oracle"
        )
    return ", ".join(parts[:-1]) + f", and {parts[-1]}."


def spread_over_tasks(queries: Sequence[RoutedQuery], count: int) -> list[RoutedQuery]:
    """Return at most `count` queries, one a task in turn, those with the highest stake first."""
    tasks: dict[str, list[RoutedQuery]] = {}
    for query in sorted(queries, key=lambda query: -query.stake):
        tasks.setdefault(query.never["task"], []).append(query)
    rounds = zip_longest(*(members for _, members in sorted(tasks.items())))
    return [query for turn in rounds for query in turn if query is not None][:count]


def _both_ways(queries: Sequence[RoutedQuery], metric: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """Return a metric (N,) without and with thinking."""
    never = np.array([query_values(query.never)[metric] for query in queries])
    always = np.array([query_values(query.always)[metric] for query in queries])
    return never, always


def _mixed_mean(values: tuple[NDArray[Any], NDArray[Any]], share: ArrayLike) -> float:
    never, always = values
    return float(np.mean(never + np.asarray(share) * (always - never)))


def _ratio(part: float, whole: float) -> float | None:
    return part / whole if abs(whole) > TOLERANCE else None
