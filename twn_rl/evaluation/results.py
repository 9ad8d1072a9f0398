"""What an evaluation found, as numbers and on disk."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.metrics.ranking import bootstrap_interval
from twn_rl.runtime.whole_files import write_json_lines, write_text

METRICS_FILE = "metrics.json"
QUERIES_FILE = "per_query.jsonl"
TARGETS_FILE = "targets.json"
# Splits to report on, those of them that there are: the emoji scenes have all but the last, which
# is what given files may bring.
REPORTED_SPLITS = ("test", "unseen_pairs", "three_hops", "unseen_style", "ood")
# Metrics whose uncertainty is reported.
INTERVAL_METRICS = ("hit@1", "mrr", "ndcg@5")


@dataclass(frozen=True)
class Evaluation:
    """Metrics, one row for each query and mode, and the targets the rows name.

    Attributes:
        metrics: Flat, `<split>/<group>/<mode>/<metric>`; groups are `all`, tasks and hops.
        queries: Rows with `split, id, task, hop, mode, ranks, cot, think_tokens, problems,
            nearest, positive, query, think_rate, seconds`, and by mode `gate_probability,
            policy_probability, refused_rate, weights`.
        targets: Target key -> `instruction, text, images`.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    queries: list[dict[str, Any]] = field(default_factory=list)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)

    def save(self, directory: str | Path) -> None:
        """Write `metrics.json`, `per_query.jsonl` and `targets.json` into a folder."""
        folder = Path(directory)
        metrics = json.dumps(self.metrics, indent=1, allow_nan=False)
        write_text(folder / METRICS_FILE, metrics + "\n")
        write_json_lines(folder / QUERIES_FILE, self.queries)
        write_text(folder / TARGETS_FILE, json.dumps(self.targets, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, directory: str | Path) -> "Evaluation":
        """Return the evaluation that `save` wrote.

        Raises:
            FileNotFoundError: If the folder holds none.
        """
        paths = [Path(directory) / name for name in (METRICS_FILE, QUERIES_FILE, TARGETS_FILE)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise FileNotFoundError(
                f"{directory} has no {', '.join(missing)}; expected a folder written by an "
                "evaluation; run recipes/eval_embed.py first or correct the path"
            )
        metrics, queries, targets = (path.read_text(encoding="utf-8") for path in paths)
        rows = [json.loads(line) for line in queries.splitlines()]
        return cls(json.loads(metrics), rows, json.loads(targets))


def merge_evaluations(evaluations: Iterable[Evaluation]) -> Evaluation:
    """Return one evaluation of several splits."""
    merged = Evaluation()
    for evaluation in evaluations:
        merged.metrics.update(evaluation.metrics)
        merged.queries.extend(evaluation.queries)
        merged.targets.update(evaluation.targets)
    return merged


def ndcg_of_rank(rank: int, k: int) -> float:
    """Return nDCG@k of a query with one positive at `rank`, in [0, 1].

    >>> [round(ndcg_of_rank(rank, 5), 3) for rank in (1, 3, 6)]
    [1.0, 0.5, 0.0]
    """
    return float(1.0 / np.log2(1.0 + rank)) if rank <= k else 0.0


def query_values(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics of one row; over several thoughts, their (weighted) means.

    >>> query_values({"ranks": [1, 2], "think_tokens": [4, 6], "problems": [None, "truncated"]})
    ... # doctest: +ELLIPSIS
    {'hit@1': 0.5, 'mrr': 0.75, 'ndcg@5': 0.815..., 'think_tokens': 5.0, 'truncated_ratio': 0.5, ...
    """
    ranks, problems = row["ranks"], row["problems"]
    weights = row.get("weights")

    def mean(values: Sequence[float]) -> float:
        return float(np.average(values, weights=weights))

    metrics = {
        "hit@1": mean([rank == 1 for rank in ranks]),
        "mrr": mean([1.0 / rank for rank in ranks]),
        "ndcg@5": mean([ndcg_of_rank(rank, 5) for rank in ranks]),
        "think_tokens": mean(row["think_tokens"]),
        "truncated_ratio": mean([problem == "truncated" for problem in problems]),
        "malformed_ratio": mean([problem is not None for problem in problems]),
    }
    own = ("think_rate", "refused_rate", "seconds")
    return metrics | {key: float(row[key]) for key in own if key in row}


def summarize(
    rows: Sequence[Mapping[str, Any]], *, split: str, confidence: float = 0.95, seed: int = 0
) -> dict[str, float]:
    """Return flat metrics of all groups and modes, with bootstrap bounds `_low` and `_high`."""
    cells: dict[str, list[dict[str, float]]] = {}
    for row in rows:
        values = query_values(row)
        groups = dict.fromkeys(["all", row["task"], *([row["hop"]] if row["hop"] else [])])
        for group in groups:
            cells.setdefault(f"{split}/{group}/{row['mode']}", []).append(values)
    metrics: dict[str, float] = {}
    for cell, members in cells.items():
        metrics[f"{cell}/num_queries"] = float(len(members))
        for name in members[0]:
            column = [values[name] for values in members]
            metrics[f"{cell}/{name}"] = float(np.mean(column))
            if name in INTERVAL_METRICS:
                interval = bootstrap_interval(column, confidence=confidence, seed=seed)
                metrics[f"{cell}/{name}_low"] = interval.low
                metrics[f"{cell}/{name}_high"] = interval.high
    return metrics
