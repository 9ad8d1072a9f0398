"""Runs of several arms and seeds become means, tables and plots; every number is by hand."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from PIL import Image

from twn_rl.evaluation.seed_tables import (
    GROUPS,
    MODES,
    Summary,
    method_table,
    plot_methods,
    plot_summary,
    save_arms,
    served_metrics,
    summarize,
    table,
    tables,
)

ALWAYS = "test/hop2/always/hit@1"
NEVER = "test/all/never/hit@1"


def summary_of(arms: Mapping[str, Sequence[Mapping[str, float]]]) -> Summary:
    """Return the summary of arms with one dictionary of metrics a seed."""
    return summarize({arm: {f"seed{n}": m for n, m in enumerate(s)} for arm, s in arms.items()})


ALWAYS_VALUES = {"sft_only": (0.5, 0.6, 0.7), "grpo": (0.7, 0.8, 0.8)}
TWO_ARMS = {
    arm: [{ALWAYS: value, NEVER: 0.25, "test/hop2/always/mrr": 0.9} for value in values]
    for arm, values in ALWAYS_VALUES.items()
}


def test_every_arm_gets_mean_sample_deviation_and_values_by_seed() -> None:
    summary = summary_of(TWO_ARMS)
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


def test_one_seed_has_no_spread() -> None:
    summary = summary_of({"grpo": [{ALWAYS: 0.5}]})
    assert summary["grpo"][ALWAYS] == {"mean": 0.5, "std": 0.0, "values": [0.5]}


def test_seeds_that_measured_different_metrics_are_refused() -> None:
    with pytest.raises(ValueError, match="seed1 measured other metrics than seed0") as error:
        summary_of({"grpo": [{ALWAYS: 0.5, NEVER: 0.5}, {ALWAYS: 0.5}]})
    assert NEVER in str(error.value)


def test_evaluated_arms_become_numbers_tables_and_a_picture(tmp_path: Path) -> None:
    arms: dict[str, list[Path]] = {}
    for arm, seeds in TWO_ARMS.items():
        for seed, metrics in enumerate(seeds):
            folder = tmp_path / f"seed{seed}" / arm / "evaluation"
            folder.mkdir(parents=True)
            (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
            arms.setdefault(arm, []).append(folder)
    text = save_arms(tmp_path, arms)
    assert (tmp_path / "summary.md").read_text(encoding="utf-8") == text
    assert text == tables(summary_of(TWO_ARMS))
    written = json.loads((tmp_path / "summary.json").read_text(encoding="utf-8"))
    assert written == summary_of(TWO_ARMS)
    assert (tmp_path / "summary.png").is_file()


def test_the_table_has_one_row_per_headline_key() -> None:
    headline = [
        f"{split}/{group}/{mode}"
        for split in ("test", "unseen_pairs")
        for group in GROUPS
        for mode in MODES
    ]
    others = ["test/find/always/hit@1", "test/hop2/shuffled/hit@1", "test/hop2/always/hit@1_low"]
    metrics = dict.fromkeys([*(f"{key}/hit@1" for key in headline), *others], 0.5)
    metrics |= dict.fromkeys([f"{key}/mrr" for key in headline], 0.25)
    summary = summary_of({"sft_only": [metrics], "grpo": [metrics]})
    for metric, cell in (("hit@1", "50.0 ± 0.0"), ("mrr", "25.0 ± 0.0")):
        head, rule, *rows = table(summary, metric=metric).splitlines()
        assert head == f"| {metric} in % | sft_only | grpo |"
        assert rule == "| --- | ---: | ---: |"
        assert rows == [f"| {key} | {cell} | {cell} |" for key in headline]


def test_the_table_rounds_to_tenths_and_marks_what_an_arm_did_not_measure() -> None:
    arms = {"sft_only": [{ALWAYS: 0.5}, {ALWAYS: 0.6}], "grpo": [{NEVER: 0.1234}, {NEVER: 0.1234}]}
    rows = table(summary_of(arms)).splitlines()[2:]
    assert rows == ["| test/hop2/always | 55.0 ± 7.1 | - |", "| test/all/never | - | 12.3 ± 0.0 |"]


def test_the_worst_and_the_best_of_many_runs_are_told() -> None:
    runs = [{ALWAYS: value} for value in (0.5, 0.7, 0.9, 0.7)]
    assert "| test/hop2/always | 70.0 ± 16.3 (50.0 to 90.0) |" in table(summary_of({"grpo": runs}))


def test_the_plot_is_a_picture_with_one_panel_a_split(tmp_path: Path) -> None:
    summary = summary_of(TWO_ARMS)
    plot_summary(summary, tmp_path / "one.png")
    for metrics in summary.values():
        metrics["unseen_pairs/hop2/always/hit@1"] = metrics[ALWAYS]
    plot_summary(summary, tmp_path / "two.png")
    with Image.open(tmp_path / "one.png") as one, Image.open(tmp_path / "two.png") as two:
        assert one.format == two.format == "PNG"
        assert two.width == 2 * one.width
        assert len(one.convert("RGB").getcolors(maxcolors=1 << 20) or []) > 3


def test_the_cost_of_thinking_gets_tables_of_its_own_where_it_was_measured() -> None:
    plain = {ALWAYS: 0.5, "test/hop2/never/think_rate": 0.0, "test/hop2/always/think_tokens": 9.26}
    gated = {
        **plain,
        "test/hop2/auto/hit@1": 0.75,
        "test/hop2/auto/think_tokens": 4.5,
        "test/hop2/auto/think_rate": 0.5,
    }
    text = tables(summary_of({"sft_only": [plain], "grpo": [gated]}))
    quality, tokens, rate = text.split("\n\n")
    assert quality.splitlines()[2:] == [
        "| test/hop2/always | 50.0 ± 0.0 | 50.0 ± 0.0 |",
        "| test/hop2/auto | - | 75.0 ± 0.0 |",
    ]
    head, _, *rows = tokens.splitlines()
    assert head == "| think_tokens | sft_only | grpo |"
    assert rows == [
        "| test/hop2/always | 9.3 ± 0.0 | 9.3 ± 0.0 |",
        "| test/hop2/auto | - | 4.5 ± 0.0 |",
    ]
    head, _, *rows = rate.splitlines()
    assert head == "| think_rate in % | sft_only | grpo |"
    assert rows == ["| test/hop2/auto | - | 50.0 ± 0.0 |"]
    ungated = tables(summary_of({"sft_only": [plain]}))
    assert "auto" not in ungated
    assert "think_rate" not in ungated


def test_a_measured_gate_gets_a_second_row_of_panels(tmp_path: Path) -> None:
    summary = summary_of(TWO_ARMS)
    plot_summary(summary, tmp_path / "plain.png")
    summary["grpo"]["test/hop2/auto/hit@1"] = summary["grpo"][ALWAYS]
    plot_summary(summary, tmp_path / "gated.png")
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "gated.png") as gated:
        assert gated.size == (plain.width, 2 * plain.height)


AUTO = {
    "test/hop2/auto/hit@1": 0.4,
    "test/all/auto/hit@1": 0.2,
    "test/all/auto/think_tokens": 4.0,
    "test/hop2/always/hit@1": 0.0,
}
COSTS = {"milliseconds": 2.0, "trainable_parameters": 1500.0, "training_minutes": 1.5}


def test_a_method_is_measured_in_the_mode_in_which_it_serves() -> None:
    assert served_metrics(AUTO, "auto") == {
        "test/hop2/hit@1": 0.4,
        "test/all/hit@1": 0.2,
        "test/all/think_tokens": 4.0,
    }
    with pytest.raises(ValueError, match="without hit@1 of mode 'policy'"):
        served_metrics(AUTO, "policy")


def test_the_table_of_methods_has_a_row_a_method_and_marks_what_was_not_measured() -> None:
    gate = {**served_metrics(AUTO, "auto"), **COSTS}
    latent = {
        "unseen_pairs/hop1/hit@1": 1.0,
        **COSTS,
        "milliseconds": 1.0,
        "trainable_parameters": 7.0,
    }
    header, _, *rows = method_table(summary_of({"gate": [gate], "latent": [latent]})).splitlines()
    assert header == (
        "| method | test hop2 | test all | test think tokens | ms a query | trained parameters "
        "| training minutes | unseen_pairs hop1 |"
    )
    assert rows == [
        "| gate | 40.0 ± 0.0 | 20.0 ± 0.0 | 4.0 ± 0.0 | 2.0 ± 0.0 | 1,500 | 1.5 ± 0.0 | - |",
        "| latent | - | - | - | 1.0 ± 0.0 | 7 | 1.5 ± 0.0 | 100.0 ± 0.0 |",
    ]


def test_the_plot_of_methods_has_a_panel_for_each_measured_quality(tmp_path: Path) -> None:
    gate = {**served_metrics(AUTO, "auto"), **COSTS}
    summary = summary_of({"gate": [gate, {**gate, "milliseconds": 3.0}]})
    plot_methods(summary, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width == pytest.approx(2 * 5.2 * 150, abs=2)
