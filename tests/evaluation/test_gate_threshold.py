"""From probabilities to a threshold: closed forms, ties, and the three rules."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from twn_rl.evaluation.gate_threshold import (
    CurvePoint,
    ThresholdRule,
    curve_rows,
    gate_curve,
)
from twn_rl.evaluation.report.gate_chart import plot_gate_curves

# Four inputs: helped, helped, unchanged, hurt; the gate ranks them rightly.
GATE = [0.9, 0.7, 0.4, 0.1]
NEVER = [0.0, 0.0, 1.0, 1.0]
ALWAYS = [1.0, 1.0, 1.0, 0.0]
TOKENS = [10, 20, 30, 40]


def point(quality: float, tokens: float, rate: float) -> CurvePoint:
    return CurvePoint(1 - rate, quality, tokens, rate, 0.0)


POINTS = [point(0.5, 0, 0.0), point(0.7, 2, 0.2), point(0.796, 4, 0.4), point(0.8, 8, 0.9)]


def test_every_threshold_of_a_small_case_has_its_quality_tokens_and_rate():
    curve = gate_curve(GATE, NEVER, ALWAYS, TOKENS)
    found = [(p.quality, p.think_tokens, p.think_rate) for p in curve.points]
    assert found == [(0.5, 0, 0), (0.75, 2.5, 0.25), (1, 7.5, 0.5), (1, 15, 0.75), (0.75, 25, 1)]
    assert [p.threshold for p in curve.points] == pytest.approx([1.0, 0.8, 0.55, 0.25, 0.0])
    assert [p.random_quality for p in curve.points] == pytest.approx(
        [0.5, 0.5625, 0.625, 0.6875, 0.75]
    )
    assert (curve.never.think_rate, curve.always.think_rate) == (0.0, 1.0)
    assert (curve.oracle.quality, curve.oracle.think_tokens) == (1.0, 7.5)
    assert curve.oracle.threshold is None
    assert ThresholdRule().pick(curve.points).threshold == pytest.approx(0.55)


def test_a_gate_that_ranks_the_wrong_way_round_is_worse_than_chance():
    curve = gate_curve(GATE[::-1], NEVER, ALWAYS, TOKENS)
    assert curve.points[1].quality < curve.points[1].random_quality
    right = gate_curve(GATE, NEVER, ALWAYS, TOKENS)
    assert right.points[1].quality > right.points[1].random_quality


@given(
    st.lists(
        st.tuples(
            st.sampled_from([0.1, 0.3, 0.3 + 1e-9, 0.8, 1.0]),
            st.booleans(),
            st.booleans(),
            st.integers(0, 50),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_every_point_is_what_thinking_above_its_threshold_gives(rows):
    gate, never, always, tokens = (np.array(column, float) for column in zip(*rows, strict=True))
    curve = gate_curve(gate, never, always, tokens)
    for p in curve.points:
        thinks = gate > p.threshold
        assert p.quality == pytest.approx(np.where(thinks, always, never).mean())
        assert p.think_tokens == pytest.approx(np.where(thinks, tokens, 0).mean())
        assert p.think_rate == pytest.approx(thinks.mean())
        # The same in the precision of the gate.
        assert ((gate.astype(np.float32) > np.float32(p.threshold)) == thinks).all()
        assert p.quality <= curve.oracle.quality + 1e-12


def test_equal_probabilities_are_never_told_apart():
    curve = gate_curve([0.5] * 4, NEVER, ALWAYS, TOKENS)
    assert [p.think_rate for p in curve.points] == [0.0, 1.0]


def test_bad_columns_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[\(2,\), \(1,\)"):
        gate_curve([0.1, 0.2], [1.0], [1.0], [1])
    with pytest.raises(ValueError, match="N > 0"):
        gate_curve([], [], [], [])
    with pytest.raises(ValueError, match=r"non-finite numbers by column: \[0, 1, 0, 0\]"):
        gate_curve([0.5], [float("nan")], [1.0], [1])
    with pytest.raises(ValueError, match=r"from 0 to 0"):
        gate_curve([0.0], [1.0], [1.0], [1])


def test_the_knee_is_the_cheapest_point_near_the_best():
    assert ThresholdRule().pick(POINTS).think_rate == 0.4
    assert ThresholdRule(max_quality_drop=0.0).pick(POINTS).think_rate == 0.9
    assert ThresholdRule(max_quality_drop=0.2).pick(POINTS).think_rate == 0.2
    assert ThresholdRule(max_quality_drop=1.0).pick(POINTS).think_rate == 0.0
    with pytest.raises(ValueError, match="max_quality_drop = -1"):
        ThresholdRule(max_quality_drop=-1)


def test_where_thinking_hurts_the_knee_never_thinks():
    assert (
        ThresholdRule().pick([point(0.8, 0, 0), point(0.6, 5, 0.5), point(0.5, 9, 1)]).think_rate
        == 0.0
    )


def test_equal_costs_are_broken_by_quality():
    free = [point(0.5, 0, 0), point(0.6, 0, 0.5), point(0.6, 0, 1.0)]
    assert ThresholdRule(min_quality=0.1).pick(free).think_rate == 0.5


def test_a_rate_and_a_quality_can_be_asked_for_instead():
    assert ThresholdRule(think_rate=0.5).pick(POINTS).think_rate == 0.4
    assert ThresholdRule(think_rate=0.0).pick(POINTS).think_rate == 0.0
    # More thinking that gains nothing is not bought.
    assert (
        ThresholdRule(think_rate=0.3).pick([point(0.5, 0, 0), point(0.5, 3, 0.3)]).think_rate == 0.0
    )
    assert ThresholdRule(min_quality=0.7).pick(POINTS).think_rate == 0.2
    with pytest.raises(ValueError, match=r"min_quality = 0\.9; expected at most 0\.8000"):
        ThresholdRule(min_quality=0.9).pick(POINTS)
    with pytest.raises(ValueError, match="think_rate = 30"):
        ThresholdRule(think_rate=30)


def test_one_rule_at_a_time():
    assert ThresholdRule(think_rate=0.2).pick(POINTS).think_rate == 0.2
    assert ThresholdRule(min_quality=0.5).pick(POINTS).think_rate == 0.0
    with pytest.raises(ValueError, match=r"metric = .luck.*expected one of them"):
        ThresholdRule(metric="luck", think_rate=0.2, min_quality=0.5)


def test_rows_and_picture_hold_the_curve_and_its_references(tmp_path):
    curve = gate_curve(GATE, NEVER, ALWAYS, TOKENS)
    rows = curve_rows(curve, side="query")
    assert [row["name"] for row in rows] == ["curve"] * 5 + ["never", "always", "oracle"]
    assert {row["side"] for row in rows} == {"query"}
    plot_gate_curves({"query": (curve, curve.points[2])}, tmp_path / "curve.png", metric="hit@1")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]
