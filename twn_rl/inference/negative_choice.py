"""Hard negatives from similarities: which candidates, and why not the others.

Settings are named as in sentence-transformers' `mine_hard_negatives`; the relative margin is that
of NV-Retriever (arXiv 2407.15831, "TopK-PercPos"): 0.05 keeps negatives at most 95 % as similar as
the positive.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from twn_rl.inference.search import top_k
from twn_rl.runtime.problems import Problems


@dataclass(frozen=True)
class MiningSettings:
    """Which candidates of a query become its negatives.

    Attributes:
        num_negatives: How many to mine at most.
        range_min: Skip this many nearest candidates, which may be unlabelled positives.
        range_max: Look at this many nearest candidates only; None looks at all.
        max_score: Largest similarity of a negative; None is off.
        absolute_margin: A negative is at least this much less similar than the positive; None is
            off, 0 still demands that it is not more similar.
        relative_margin: A negative is at least this share of the positive's similarity less
            similar than the positive; None is off.
        sampling: "top" takes the most similar of what is left, "random" draws.
        seed: Of the draws; each query has its own stream.
    """

    num_negatives: int = 5
    range_min: int = 0
    range_max: int | None = 100
    max_score: float | None = None
    absolute_margin: float | None = None
    relative_margin: float | None = None
    sampling: Literal["top", "random"] = "top"
    seed: int = 0

    def __post_init__(self) -> None:
        """Collect every problem of the settings into one error."""
        problems, least = Problems(), self.range_min + self.num_negatives
        problems.expect(self, ">= 1", "num_negatives")
        problems.expect(self, ">= 0", "range_min", "seed")
        problems.unless(
            self.range_max is None or self.range_max >= least,
            f"range_max = {self.range_max}, expected at least range_min + num_negatives = {least}",
        )
        problems.expect(self, "None or in [0, 2]", "absolute_margin")
        problems.expect(self, "None or in [0, 1]", "relative_margin")
        problems.expect(self, "None or in [-1, 1]", "max_score")
        problems.unless(
            self.sampling in ("top", "random"),
            f"sampling = {self.sampling!r}, expected 'top' or 'random'",
        )
        problems.refuse("MiningSettings", "change these settings")


@dataclass
class MiningReport:
    """What mining found: what became of the candidates of all queries.

    Attributes:
        records: Records written.
        left_out: Bad records of the file, which were not written.
        failed_records: Records whose query or positive has no vector; written as they were.
        candidates: (query, candidate) pairs within the pools.
        mined: Pairs that became negatives.
        dropped: Pairs by the first filter that dropped them; `unused` passed all of them.
        positive_scores: Similarity of each query to its positive.
        negative_scores: Similarity of each query to each of its negatives.
        short_queries: Queries with fewer than `num_negatives`.
    """

    records: int = 0
    left_out: int = 0
    failed_records: int = 0
    candidates: int = 0
    mined: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    positive_scores: list[float] = field(default_factory=list)
    negative_scores: list[float] = field(default_factory=list)
    short_queries: int = 0

    def lines(self) -> Iterator[str]:
        """Yield the report for people."""
        yield (
            f"{self.mined} negatives mined for {self.records} records: {self.short_queries} got "
            f"fewer than asked for, {self.failed_records} could not be embedded, {self.left_out} "
            "bad rows left out"
        )
        yield f"{self.candidates} candidates: pairs of a record and an item of its pool"
        for name, dropped in self.dropped.items():
            share = 100 * dropped / max(self.candidates, 1)
            yield f"  {name}: {dropped} ({share:.1f} %)"
        for name in ("positive_scores", "negative_scores"):
            if scores := getattr(self, name):
                low, middle, high = np.quantile(scores, [0.05, 0.5, 0.95])
                yield f"{name}: median {middle:.3f}, from {low:.3f} (5 %) to {high:.3f} (95 %)"


def select_negatives(
    scores: NDArray[np.float32],
    positive_score: float,
    excluded: Mapping[str, Collection[int]],
    settings: MiningSettings,
    report: MiningReport,
    *,
    stream: int = 0,
) -> NDArray[np.int64]:
    """Return the columns of the negatives of one query, most similar first.

    Ranks are counted among the candidates that are not excluded, before the margins; equal scores
    are ranked by column.

    >>> report = MiningReport()
    >>> settings = MiningSettings(num_negatives=2, absolute_margin=0.1)
    >>> scores = np.array([0.9, 0.85, 0.7, 0.75, 0.1], dtype=np.float32)
    >>> select_negatives(scores, 0.9, {"positive": [0]}, settings, report)
    array([3, 2])
    >>> dict(report.dropped)
    {'positive': 1, 'absolute_margin': 1, 'unused': 1}

    Args:
        scores: (M,) similarities of the query to its candidates.
        positive_score: Its similarity to its positive.
        excluded: Reason -> columns that must never be negatives.
        settings: What to select.
        report: Counted into.
        stream: Number of the query, for the draws.
    """
    dropped, barred = report.dropped, set[int]()
    for name, reserved in excluded.items():
        dropped[name] += len(set(reserved) - barred)
        barred |= set(reserved)
    columns = nearest_allowed(scores, barred, settings.range_max)
    dropped["range_max"] += len(scores) - len(barred) - len(columns)
    dropped["range_min"] += min(settings.range_min, len(columns))
    columns = columns[settings.range_min :]
    for name, threshold in thresholds(positive_score, settings).items():
        is_low = scores[columns] <= threshold
        dropped[name] += int(len(columns) - is_low.sum())
        columns = columns[is_low]
    chosen = columns[: settings.num_negatives]
    if settings.sampling == "random" and len(columns) > settings.num_negatives:
        generator = np.random.default_rng([settings.seed, stream])
        drawn = generator.choice(len(columns), settings.num_negatives, replace=False)
        chosen = columns[np.sort(drawn)]
    dropped["unused"] += len(columns) - len(chosen)
    for name in [name for name, count in dropped.items() if not count]:
        del dropped[name]
    report.candidates += len(scores)
    report.mined += len(chosen)
    report.short_queries += len(chosen) < settings.num_negatives
    report.positive_scores.append(float(positive_score))
    report.negative_scores += scores[chosen].tolist()
    return chosen


def thresholds(positive_score: float, settings: MiningSettings) -> dict[str, float]:
    """Return the largest similarity each filter lets through, for the filters that are on.

    The relative margin is taken of the similarity's size: of a negative similarity, too, a larger
    margin asks for less similar negatives.

    >>> thresholds(-0.5, MiningSettings(relative_margin=0.1))
    {'relative_margin': -0.55}
    """
    limits: dict[str, float] = {}
    if settings.max_score is not None:
        limits["max_score"] = settings.max_score
    if settings.absolute_margin is not None:
        limits["absolute_margin"] = positive_score - settings.absolute_margin
    if settings.relative_margin is not None:
        limits["relative_margin"] = positive_score - abs(positive_score) * settings.relative_margin
    return limits


def nearest_allowed(
    scores: NDArray[np.float32], excluded: Collection[int], count: int | None
) -> NDArray[np.int64]:
    """Return the columns of the `count` largest scores that are not excluded, largest first."""
    is_allowed = np.ones(len(scores), dtype=bool)
    is_allowed[list(excluded)] = False
    allowed = np.flatnonzero(is_allowed)
    count = len(allowed) if count is None else min(count, len(allowed))
    return allowed[top_k(scores[None, allowed], count)[1][0]]
