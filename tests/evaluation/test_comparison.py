"""Methods next to each other: every number is by hand."""

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

from twn_rl.evaluation.comparison import Measured, compare, comparison_table, plot_comparison
from twn_rl.launch.arguments import DataArguments
from twn_rl.recipes.experiments import compare_methods


def measured(hit: float, milliseconds: float = 2.0) -> Measured:
    metrics = {
        "test/hop2/auto/hit@1": hit,
        "test/all/auto/hit@1": hit / 2,
        "test/all/auto/think_tokens": 4.0,
        "test/hop2/always/hit@1": 0.0,
    }
    return Measured(metrics, "auto", milliseconds, 1500, 90.0)


def test_a_method_is_the_mean_and_spread_of_its_own_mode_over_seeds():
    cells = compare({"gate": [measured(0.4), measured(0.8)]})["gate"]
    assert cells["test/hop2/hit@1"]["values"] == [0.4, 0.8]
    assert cells["test/all/hit@1"]["mean"] == pytest.approx(0.3)
    assert cells["test/all/hit@1"]["std"] == pytest.approx(0.1 * 2**0.5)
    assert cells["training_minutes"]["mean"] == 1.5
    assert "ood/hop2/hit@1" not in cells


def test_the_table_has_a_row_a_method_and_marks_what_was_not_measured():
    other = Measured({"ood/hop1/latent/hit@1": 1.0}, "latent", 1.0, 7, 60.0)
    text = comparison_table(compare({"gate": [measured(0.5)], "latent": [other]}))
    header, _, gate, latent = text.strip().split("\n")
    assert [cell.strip() for cell in header.split("|")[1:-1]] == [
        "method",
        "test hop2",
        "test all",
        "test think tokens",
        "ms a query",
        "trained parameters",
        "training minutes",
        "ood hop1",
    ]
    row = "| gate | 50.0 ± 0.0 | 25.0 ± 0.0 | 4.0 ± 0.0 | 2.0 ± 0.0 | 1,500 | 1.5 ± 0.0 | - |"
    assert gate == row
    assert latent == "| latent | - | - | - | 1.0 ± 0.0 | 7 | 1.0 ± 0.0 | 100.0 ± 0.0 |"


def test_runs_without_their_mode_and_seeds_that_differ_are_refused():
    with pytest.raises(ValueError, match="without hit@1 of its mode"):
        compare({"policy": [Measured({"test/all/never/hit@1": 1.0}, "policy", 1.0, 1, 1.0)]})
    other = Measured({"test/hop2/auto/hit@1": 0.1}, "auto", 1.0, 1, 1.0)
    with pytest.raises(ValueError, match=r"differ in .*test/all/hit@1"):
        compare({"gate": [measured(0.5), other]})


def test_the_plot_has_a_panel_for_each_measured_quality(tmp_path):
    comparison = compare({"gate": [measured(0.5), measured(0.7, 3.0)]})
    plot_comparison(comparison, tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width == pytest.approx(2 * 5.2 * 150, abs=2)


@pytest.fixture
def started(monkeypatch):
    """Note the stages instead of running them."""
    stages: list[tuple[str, str, list[str]]] = []

    def run(self, recipe, flags, target, *, is_cheap=False):
        stages.append((recipe, "/".join(target.parts[target.parts.index("seed3") + 1 :]), flags))
        return True

    monkeypatch.setattr(compare_methods.Stages, "run", run)
    return stages


def test_every_stage_of_a_seed_sees_the_same_records_and_only_what_is_needed_runs(
    started, tmp_path
):
    script = compare_methods.CompareArguments(output_dir=str(tmp_path))
    compare_methods.run_seed(script, DataArguments(), 3)
    assert [(recipe, place) for recipe, place, _ in started] == [
        ("sft_embed.py", "warm_start"),
        ("grpo_embed.py", "grpo"),
        ("gate_embed.py", "grpo/gate"),
        ("eval_embed.py", "grpo/evaluation"),
        ("adaptive_embed.py", "adaptive"),
        ("policy_threshold.py", "adaptive/policy"),
        ("eval_embed.py", "adaptive/evaluation"),
        ("latent_embed.py", "latent"),
        ("eval_embed.py", "latent/evaluation"),
        ("latent_embed.py", "direct"),
        ("eval_embed.py", "direct/evaluation"),
    ]
    assert all(f"--demo_dir={tmp_path / 'seed3' / 'data'}" in flags for *_, flags in started)
    evaluations = [stage for stage in started if stage[0] == "eval_embed.py"]
    modes = {place: flags[flags.index("--modes") + 1 :] for _, place, flags in evaluations}
    assert modes["grpo/evaluation"] == ["never", "always", "auto", "random", "oracle"]
    assert modes["adaptive/evaluation"] == ["policy", "never", "always", "oracle"]
    assert modes["latent/evaluation"] == ["latent"]

    started.clear()
    script = compare_methods.CompareArguments(output_dir=str(tmp_path), methods=["policy"])
    compare_methods.run_seed(script, DataArguments(), 3)
    places = [place for _, place, _ in started]
    assert places == ["warm_start", "adaptive", "adaptive/policy", "adaptive/evaluation"]
    with pytest.raises(ValueError, match=r"methods = \['thinking'\]"):
        compare_methods.CompareArguments(methods=["thinking"])


def test_parameters_are_counted_in_the_folders_and_files_that_serve_a_method(tmp_path):
    (tmp_path / "embedding").mkdir()
    save_file(
        {"a": np.zeros((2, 3)), "b": np.zeros(4)}, tmp_path / "embedding" / "adapter.safetensors"
    )
    save_file({"w": np.zeros(5)}, tmp_path / "gate.safetensors")
    count = compare_methods.count_parameters
    assert count(tmp_path, ("embedding",)) == 10
    assert count(tmp_path, ("embedding", "gate.safetensors")) == 15
