"""Runs of several arms and seeds become means, a table and a plot; every number is by hand."""

import json
import logging
import sys
from pathlib import Path

import pytest
from PIL import Image

from twn_rl.evaluation.seed_tables import (
    HEADLINE_GROUPS,
    HEADLINE_MODES,
    plot_summary,
    summarize_runs,
    table,
    tables,
)
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.launch.stages import FINISHED_FILE, Stages
from twn_rl.recipes import eval_embed
from twn_rl.recipes.experiments import ablate

ALWAYS = "test/hop2/always/hit@1"
NEVER = "test/all/never/hit@1"


ROOT = Path(__file__).parents[2]


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


def test_the_cost_of_thinking_gets_tables_of_its_own_where_it_was_measured(tmp_path):
    plain = {ALWAYS: 0.5, "test/hop2/never/think_rate": 0.0, "test/hop2/always/think_tokens": 9.26}
    gated = {
        **plain,
        "test/hop2/auto/hit@1": 0.75,
        "test/hop2/auto/think_tokens": 4.5,
        "test/hop2/auto/think_rate": 0.5,
    }
    text = tables(summarize_runs(_write_runs(tmp_path, {"sft_only": [plain], "grpo": [gated]})))
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
    ungated = tables(summarize_runs(_write_runs(tmp_path / "b", {"sft_only": [plain]})))
    assert "auto" not in ungated
    assert "think_rate" not in ungated


def test_a_measured_gate_gets_a_second_row_of_panels(two_arms, tmp_path):
    summary = summarize_runs(two_arms)
    plot_summary(summary, tmp_path / "plain.png")
    summary["grpo"]["test/hop2/auto/hit@1"] = summary["grpo"][ALWAYS]
    plot_summary(summary, tmp_path / "gated.png")
    with Image.open(tmp_path / "plain.png") as plain, Image.open(tmp_path / "gated.png") as gated:
        assert gated.size == (plain.width, 2 * plain.height)


@pytest.fixture
def launched(tmp_path, monkeypatch):
    """Let `accelerate launch` be a program that leaves its recipe and flags in a file."""
    log = tmp_path / "launched.jsonl"
    program = tmp_path / "program.py"
    program.write_text(
        "import json, pathlib, sys\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    words = [pathlib.Path(sys.argv[4]).name, *sys.argv[5:]]\n"
        "    file.write(json.dumps(words) + '\\n')\n",
        encoding="utf-8",
    )
    starter = tmp_path / "python"
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n', encoding="utf-8")
    starter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(starter))

    def read():
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read


def test_the_flags_of_the_gate_recipe_name_the_model_its_data_and_its_seed(tmp_path):
    plain, own = ablate.AblateArguments(), ablate.AblateArguments(gate_config="gate.yaml")
    flags = [f"--model={tmp_path / 'grpo'}", "--demo_seed=3", "--seed=3"]
    assert ablate.gate_flags(plain, tmp_path / "grpo", ["--demo_seed=3"], 3) == flags
    assert ablate.gate_flags(own, tmp_path / "grpo", ["--demo_seed=3"], 3) == [
        "--config=gate.yaml",
        *flags,
    ]


def test_the_flags_of_an_evaluation_are_understood_and_ask_for_the_gate_only_if_there_is_one(
    tmp_path,
):
    for gate in (False, True):
        script = ablate.AblateArguments(gate=gate)
        flags = ablate.evaluation_flags(script, tmp_path, ["--demo_seed=3"])
        types = (eval_embed.EvalScriptArguments, DataArguments)
        parsed, data = parse_arguments(types, arguments=flags)
        assert data.demo_seed == 3
        assert set(ablate.GATE_MODES) <= set(parsed.modes) if gate else "auto" not in parsed.modes


def test_a_gate_is_fitted_before_the_evaluation_and_both_are_kept(launched, tmp_path):
    model, gated = tmp_path / "model", ablate.AblateArguments(gate=True, launcher=["--quiet"])
    ablate.measure(gated, model, [], 0)
    assert [words[0] for words in launched()] == ["gate_embed.py", "eval_embed.py"]
    ablate.measure(gated, model, [], 0)
    assert launched() == []
    (model / "gate" / FINISHED_FILE).unlink()  # a gate fitted anew is measured anew
    ablate.measure(gated, model, [], 0)
    assert [words[0] for words in launched()] == ["gate_embed.py", "eval_embed.py"]


def test_an_evaluation_without_the_gate_is_not_taken_for_one_with_it(launched, tmp_path):
    model = tmp_path / "model"
    plain, gated = (
        ablate.AblateArguments(gate=gate, launcher=["--quiet"]) for gate in (False, True)
    )
    ablate.measure(plain, model, [], 0)
    assert [words[0] for words in launched()] == ["eval_embed.py"]
    ablate.measure(gated, model, [], 0)
    gate, evaluation = launched()
    assert gate == ["gate_embed.py", f"--model={model}", "--seed=0"]
    assert "auto" in evaluation


def test_training_anew_forgets_what_was_measured_and_other_flags_are_reported(
    launched, tmp_path, caplog
):
    model, script = tmp_path / "model", ablate.AblateArguments(gate=True, launcher=["--quiet"])
    run_stage = Stages(ROOT / "recipes", ["--quiet"]).run
    assert run_stage("sft_embed.py", ["--seed=0"], model)
    ablate.measure(script, model, [], 0)
    with caplog.at_level(logging.WARNING):
        assert not run_stage("sft_embed.py", ["--seed=0"], model)
        assert not caplog.records
        assert not run_stage("sft_embed.py", ["--seed=1"], model)
    assert "other flags" in caplog.text
    assert len(launched()) == 3
    (model / FINISHED_FILE).unlink()
    assert run_stage("sft_embed.py", ["--seed=1"], model)
    ablate.measure(script, model, [], 0)
    assert [words[0] for words in launched()] == ["sft_embed.py", "gate_embed.py", "eval_embed.py"]
