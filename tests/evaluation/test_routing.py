"""What a gate's choices were worth, from rows: closed forms only, no model."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twn_rl.evaluation.gate_threshold import CurvePoint
from twn_rl.evaluation.modes import choose
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.evaluation.routing import (
    RoutedQuery,
    RoutingPoint,
    describe_routing,
    routed_queries,
    routing_curve,
    routing_points,
    routing_summary,
    spread_over_tasks,
)
from twn_rl.modeling.config import TwnConfig
from twn_rl.recipes import eval_embed

# (rank without, rank with, tokens of the thought): helped, harmed, indifferent twice, helped.
OUTCOMES = ((3, 1, 10), (1, 2, 4), (1, 1, 6), (5, 5, 8), (2, 1, 2))
HELPED = (1, 0, 0, 0, 1)


def make_row(index: int, mode: str, rank: int, tokens: int, split: str = "test") -> dict[str, Any]:
    return {
        "split": split,
        "id": f"q{index}",
        "task": "answer" if index % 2 else "find",
        "hop": None,
        "mode": mode,
        "ranks": [rank],
        "cot": "left" if tokens else "",
        "think_tokens": [tokens],
        "problems": [None],
        "nearest": [],
        "positive": "k",
        "query": {"instruction": None, "text": "a", "images": []},
        "think_rate": float(mode != "never"),
        "seconds": 1.0 + tokens,
    }


def make_rows(
    probabilities: Sequence[float],
    *,
    threshold: float = 0.5,
    split: str = "test",
    mode: str = "auto",
) -> list[dict[str, Any]]:
    rows = []
    for index, probability in enumerate(probabilities):
        without, thinking, tokens = OUTCOMES[index % len(OUTCOMES)]
        never = make_row(index, "never", without, 0, split)
        always = make_row(index, "always", thinking, tokens, split)
        auto = choose(mode, never, always, probability > threshold, probability=probability)
        assert auto is not None
        rows += [never, always, auto]
    return rows


def make_queries(probabilities: Sequence[float], *, threshold: float = 0.5) -> list[RoutedQuery]:
    return routed_queries(make_rows(probabilities, threshold=threshold))["test"]


def flat(point: RoutingPoint | CurvePoint) -> tuple[float, float, float]:
    return point.quality, point.think_rate, point.think_tokens


def test_every_rule_has_its_closed_form() -> None:
    points = routing_points(make_queries([0.9, 0.6, 0.1, 0.2, 0.3]))
    assert flat(points["never"]) == pytest.approx((2 / 5, 0.0, 0.0))
    assert flat(points["always"]) == pytest.approx((3 / 5, 1.0, 30 / 5))
    assert flat(points["decided"]) == pytest.approx(
        (2 / 5, 2 / 5, 14 / 5)
    )  # one helped, one harmed
    assert flat(points["random"]) == pytest.approx((0.4 * 3 / 5 + 0.6 * 2 / 5, 2 / 5, 0.4 * 30 / 5))
    assert flat(points["oracle"]) == pytest.approx((4 / 5, 2 / 5, 12 / 5))


def test_a_perfect_gate_reaches_the_oracle_and_a_reversed_one_the_worst() -> None:
    points = routing_points(make_queries(HELPED))
    assert points["decided"] == points["oracle"]
    assert routing_summary(make_queries(HELPED))["oracle_share"] == pytest.approx(1.0)
    curve = [flat(point) for point in routing_curve(make_queries(HELPED)).points]
    expected = [flat(points[mode]) for mode in ("never", "oracle", "always")]
    assert np.array(curve) == pytest.approx(np.array(expected))
    reversed_gate = make_queries([1 - helped for helped in HELPED])
    assert routing_points(reversed_gate)["decided"].quality == pytest.approx(1 / 5)
    assert routing_summary(reversed_gate)["oracle_share"] < 0


def test_a_constant_gate_lies_on_the_line_of_chance() -> None:
    for probability in (0.2, 0.8):
        queries = make_queries([probability] * 5)
        points, curve = routing_points(queries), routing_curve(queries).points
        assert len(curve) == 2  # never and always; the line between is chance
        assert flat(curve[0]) == pytest.approx(flat(points["never"]))
        assert flat(curve[1]) == pytest.approx(flat(points["always"]))
        assert flat(points["decided"]) == pytest.approx(flat(points["random"]))
        assert routing_summary(queries)["oracle_share"] == pytest.approx(0.0)


@settings(deadline=None)
@given(
    probabilities=st.lists(st.sampled_from([0.0, 0.1, 0.4, 0.7, 1.0]), min_size=1, max_size=12),
    threshold=st.sampled_from([0.0, 0.05, 0.1, 0.5, 0.7, 1.0]),
)
def test_the_gate_at_any_threshold_is_a_point_of_the_curve(
    probabilities: list[float], threshold: float
) -> None:
    queries = make_queries(probabilities, threshold=threshold)
    auto = routing_points(queries)["decided"]
    curve = {
        round(point.think_rate * len(queries)): point for point in routing_curve(queries).points
    }
    met = curve[round(auto.think_rate * len(queries))]
    assert flat(met) == pytest.approx(flat(auto))
    assert len(curve) == len(set(probabilities)) + 1


def test_the_highest_probabilities_think_first_and_any_metric_can_be_asked() -> None:
    curve = routing_curve(make_queries([0.1, 0.2, 0.3, 0.4, 0.9]), metric="mrr").points
    assert [point.think_tokens for point in curve] == pytest.approx([0, 0.4, 2, 3.2, 4, 6])
    gains = [0.5, 0, 0, -0.5, 2 / 3]  # of the reciprocal rank, from the last query to the first
    start = (1 / 3 + 1 + 1 + 1 / 5 + 1 / 2) / 5
    expected = [start + sum(gains[:count]) / 5 for count in range(6)]
    assert [point.quality for point in curve] == pytest.approx(expected)


def test_the_points_agree_with_the_metrics_of_the_rows() -> None:
    rows = make_rows([0.9, 0.6, 0.1, 0.2, 0.3])
    metrics = summarize(rows, split="test")
    points = routing_points(routed_queries(rows)["test"])
    for mode in ("never", "always", "auto"):
        cell = f"test/all/{mode}"
        values = [metrics[f"{cell}/{name}"] for name in ("hit@1", "think_rate", "think_tokens")]
        assert flat(points["decided" if mode == "auto" else mode]) == pytest.approx(tuple(values))


def test_the_summary_names_what_is_undefined_and_is_json() -> None:
    summary = routing_summary(make_queries([0.9, 0.6, 0.1, 0.2, 0.3]))
    assert summary["oracle_share"] == pytest.approx((0.4 - 0.48) / (0.8 - 0.48))
    assert summary["token_ratio"] == pytest.approx(14 / 30)
    assert summary["least_token_ratio"] == pytest.approx(10 / 30)  # the first alone is enough
    assert summary["quality_drop"] == pytest.approx(1 / 5)
    assert summary["quality_drop_low"] <= 1 / 5 <= summary["quality_drop_high"]
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert "20.0 points below always thinking" in describe_routing("test", summary)
    assert "-25 % of the way" in describe_routing("test", summary)
    # Only the harmed query, and it thinks: worse than the oracle by one, and than always by none.
    idle = routing_summary(make_queries([0.9] * 5)[2:4])
    assert idle["oracle_share"] is None
    assert "oracle" not in describe_routing("test", idle)


def test_a_gate_may_be_better_than_always_thinking() -> None:
    summary = routing_summary(make_queries([0.9, 0.1, 0.1, 0.1, 0.9]))
    assert summary["quality_drop"] == pytest.approx(-1 / 5)
    assert "20.0 points above always thinking" in describe_routing("test", summary)


def test_splits_are_apart_and_queries_without_both_ways_are_left_out_loudly(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = make_rows([0.9, 0.1]) + make_rows([0.9], split="ood")
    assert {split: len(queries) for split, queries in routed_queries(rows).items()} == {
        "test": 2,
        "ood": 1,
    }
    assert not caplog.records
    rows = [row for row in rows if (row["split"], row["mode"]) != ("ood", "always")]
    assert list(routed_queries(rows)) == ["test"]
    assert "'ood': 1 of 1 queries" in caplog.text
    assert not routed_queries([row for row in rows if row["mode"] != "auto"])


def test_examples_take_turns_over_tasks_and_begin_with_what_is_at_stake() -> None:
    queries = make_queries([0.9, 0.6, 0.1, 0.2, 0.3])
    ids = [query.never["id"] for query in spread_over_tasks(queries, 4)]
    # Stakes: find q0 2/3, q4 1/2, q2 0; answer q1 1/2, q3 0.
    assert ids == ["q1", "q0", "q3", "q4"]
    assert len(spread_over_tasks(queries, 9)) == 5
    assert [query.choice for query in queries] == [
        (True, True),
        (True, False),
        (False, False),
        (False, False),
        (False, True),
    ]


def test_a_gate_or_a_threshold_adds_the_modes_of_a_gate() -> None:
    script = eval_embed.EvalScriptArguments()
    assert not {"auto", "random"} & set(eval_embed.default_modes(script, TwnConfig()))
    gated = eval_embed.default_modes(script, TwnConfig(gate_threshold=0.4))
    asked = eval_embed.EvalScriptArguments(gate_threshold=0.0)
    assert gated == eval_embed.default_modes(asked, TwnConfig())
    assert {"never", "always", "oracle", "auto", "random"} <= set(gated)


def test_a_threshold_that_no_mode_looks_at_is_refused() -> None:
    with pytest.raises(ValueError, match=r"gate_threshold = 0\.3 with modes = \['never'\]"):
        eval_embed.EvalScriptArguments(gate_threshold=0.3, modes=["never"])


@pytest.mark.parametrize(
    ("mode", "field"), [("auto", "gate_threshold"), ("policy", "policy_threshold")]
)
def test_routing_json_holds_a_split_each_and_goes_with_who_decided(
    tmp_path: Path, mode: str, field: str
) -> None:
    path = tmp_path / "routing.json"
    rows = make_rows([0.9, 0.6, 0.1], mode=mode) + make_rows([0.9], split="ood", mode=mode)
    metrics = {f"{split}/all/{mode}/{field}": 0.5 for split in ("test", "ood")}
    eval_embed.write_routing(path, Evaluation(metrics, rows))
    written = json.loads(path.read_text(encoding="utf-8"))
    assert list(written) == [mode]
    assert list(written[mode]) == ["test", "ood"]
    assert written[mode]["test"]["threshold"] == 0.5
    assert written[mode]["test"]["decided"]["think_rate"] == pytest.approx(2 / 3)
    plain = [row for row in rows if row["mode"] != mode]
    eval_embed.write_routing(path, Evaluation({}, plain))
    assert not path.exists()
