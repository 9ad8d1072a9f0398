"""The threshold of a policy that decides: chosen on one split, kept by the model, dropped by RL."""

import json
from pathlib import Path

import pytest
from short_runs import small_model
from tiny_backbones import make_idefics3

from twn_rl.data.record_files import RecordSet
from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.evaluation.routing import RoutedQuery
from twn_rl.launch.arguments import DataArguments
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import policy_threshold


def query(probability: float, before: int, after: int, tokens: int, task: str) -> RoutedQuery:
    """A query whose positive has rank `before` without and `after` with its thought."""
    row = {"task": task, "hop": None, "problems": [None]}
    return RoutedQuery(
        {**row, "ranks": [before], "think_tokens": [0]},
        {**row, "ranks": [after], "think_tokens": [tokens]},
        probability,
        probability > 0.5,
    )


def test_the_cheapest_threshold_close_to_the_best_quality_is_chosen() -> None:
    queries = [
        *[query(0.9, 2, 1, 10, "hard")] * 2,
        *[query(0.7, 1, 1, 10, "easy")] * 2,  # thought about by default, for nothing
        query(0.0, 1, 3, 10, "harmed"),
    ]
    found = policy_threshold.choose(queries, ThresholdRule())
    assert found.chosen.threshold == pytest.approx(0.8)
    assert found.chosen.quality == 1.0
    assert found.chosen.think_tokens == 4.0
    assert found.curve.always.quality == 0.8
    assert found.metrics["think_rate_by_group"] == {"easy": 0.0, "hard": 1.0, "harmed": 0.0}
    assert found.metrics["validation_auc"] == 1.0
    half = policy_threshold.choose(queries, ThresholdRule(think_rate=0.1))
    assert half.chosen.think_rate == 0.0


def test_the_model_keeps_the_threshold_and_everything_else(
    records: RecordSet, tmp_path: Path
) -> None:
    path = tmp_path / "model"
    small_model(thinking_decision="policy", max_think_tokens=8).save_pretrained(path)
    before = {file: file.read_bytes() for file in path.rglob("*") if file.is_file()}
    script = policy_threshold.PolicyScriptArguments(model=str(path), batch_size=2)
    data = DataArguments(
        validation_file=str(records.data_root / "records.jsonl"), train_file="unused.jsonl"
    )
    load = DualLoraModel.from_pretrained
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DualLoraModel, "from_pretrained", lambda p: load(p, backbone=make_idefics3()))
        policy_threshold.main(script, ThresholdRule(think_rate=0.5), data)
    metrics = json.loads((path / "policy" / "metrics.json").read_text(encoding="utf-8"))
    chosen = metrics["policy"]["chosen"]
    again = load(path, backbone=make_idefics3())
    assert again.config.policy_threshold == chosen["threshold"]
    assert chosen["think_rate"] == 0.0, "nothing helps a random model"
    assert (path / "policy" / "curve.png").stat().st_size > 1000
    assert "policy" in (path / "policy" / "curve.csv").read_text(encoding="utf-8")
    changed = [file.name for file, content in before.items() if file.read_bytes() != content]
    assert changed == ["twn_config.json"]
