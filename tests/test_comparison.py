"""Methods next to each other: every number is by hand."""

import pytest
from PIL import Image

from twn_rl.evaluation.comparison import Measured, compare, comparison_table, plot_comparison


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
