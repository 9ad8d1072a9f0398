"""Runs of several arms and seeds become means, a table and a plot; every number is by hand."""

import json

import pytest
from PIL import Image

from twn_rl.evaluation.ablation import (
    HEADLINE_GROUPS,
    HEADLINE_MODES,
    plot_summary,
    summarize_runs,
    table,
)

ALWAYS = "test/hop2/always/hit@1"
NEVER = "test/all/never/hit@1"


def _write_runs(folder, arms):
    """Write one metrics.json per arm and seed; return arm -> evaluation folders."""
    runs = {}
    for arm, seeds in arms.items():
        runs[arm] = []
        for seed, metrics in enumerate(seeds):
            place = folder / f"seed{seed}" / arm / "evaluation"
            place.mkdir(parents=True)
            (place / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
            runs[arm].append(place)
    return runs


@pytest.fixture
def two_arms(tmp_path):
    always = {"sft_only": (0.5, 0.6, 0.7), "grpo": (0.7, 0.8, 0.8)}
    arms = {
        arm: [{ALWAYS: value, NEVER: 0.25, "test/hop2/always/mrr": 0.9} for value in values]
        for arm, values in always.items()
    }
    return _write_runs(tmp_path, arms)


def test_every_arm_gets_mean_sample_deviation_and_values_by_seed(two_arms):
    summary = summarize_runs(two_arms)
    assert list(summary) == ["sft_only", "grpo"]
    assert set(summary["grpo"]) == {ALWAYS, NEVER, "test/hop2/always/mrr"}
    sft, grpo = summary["sft_only"][ALWAYS], summary["grpo"][ALWAYS]
    assert sft["values"] == [0.5, 0.6, 0.7]
    assert sft["mean"] == pytest.approx(0.6)
    assert sft["std"] == pytest.approx(0.1)  # sqrt(0.02 / 2); the population's would be 0.0816
    assert grpo["values"] == [0.7, 0.8, 0.8]
    assert grpo["mean"] == pytest.approx(2.3 / 3)
    assert grpo["std"] == pytest.approx(0.1 / 3**0.5)
    assert summary["grpo"][NEVER] == {"mean": 0.25, "std": 0.0, "values": [0.25] * 3}


def test_one_seed_has_no_spread(tmp_path):
    summary = summarize_runs(_write_runs(tmp_path, {"grpo": [{ALWAYS: 0.5}]}))
    assert summary["grpo"][ALWAYS] == {"mean": 0.5, "std": 0.0, "values": [0.5]}


def test_seeds_that_measured_different_metrics_are_refused(tmp_path):
    runs = _write_runs(tmp_path, {"grpo": [{ALWAYS: 0.5, NEVER: 0.5}, {ALWAYS: 0.5}]})
    with pytest.raises(ValueError, match="measured other metrics") as error:
        summarize_runs(runs)
    for part in (NEVER, *(str(folder) for folder in runs["grpo"])):
        assert part in str(error.value)


def test_the_table_has_one_row_per_headline_key(tmp_path):
    headline = [
        f"{split}/{group}/{mode}"
        for split in ("test", "ood")
        for group in HEADLINE_GROUPS
        for mode in HEADLINE_MODES
    ]
    others = ["test/find/always/hit@1", "test/hop2/shuffled/hit@1", "test/hop2/always/hit@1_low"]
    metrics = dict.fromkeys([*(f"{key}/hit@1" for key in headline), *others], 0.5)
    metrics |= dict.fromkeys([f"{key}/mrr" for key in headline], 0.25)
    summary = summarize_runs(_write_runs(tmp_path, {"sft_only": [metrics], "grpo": [metrics]}))
    for metric, cell in (("hit@1", "50.0 ± 0.0"), ("mrr", "25.0 ± 0.0")):
        head, rule, *rows = table(summary, metric=metric).splitlines()
        assert head == f"| {metric} in % | sft_only | grpo |"
        assert rule == "| --- | ---: | ---: |"
        assert rows == [f"| {key} | {cell} | {cell} |" for key in headline]


def test_the_table_rounds_to_tenths_and_marks_what_an_arm_did_not_measure(tmp_path):
    arms = {"sft_only": [{ALWAYS: 0.5}, {ALWAYS: 0.6}], "grpo": [{NEVER: 0.1234}, {NEVER: 0.1234}]}
    rows = table(summarize_runs(_write_runs(tmp_path, arms))).splitlines()[2:]
    assert rows == ["| test/hop2/always | 55.0 ± 7.1 | - |", "| test/all/never | - | 12.3 ± 0.0 |"]


def test_the_plot_is_a_picture_with_one_panel_a_split(two_arms, tmp_path):
    summary = summarize_runs(two_arms)
    plot_summary(summary, tmp_path / "one.png")
    for metrics in summary.values():
        metrics["ood/hop2/always/hit@1"] = metrics[ALWAYS]
    plot_summary(summary, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.format == two.format == "PNG"
        assert two.width == 2 * one.width
        assert len(one.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 3
