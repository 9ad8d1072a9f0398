"""The table of what the reward costs is made from a real step, and counted at real shapes."""

import sys

import pytest

from benchmarks import reward_cost


def test_every_part_of_a_step_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--tiny", "true", "--queries", "2", "--generations", "2", "--tokens", "4"]
    flags += ["--targets", "50", "--repeats", "1"]
    monkeypatch.setattr(sys, "argv", ["reward_cost.py", *flags])
    reward_cost.main()
    shown = capsys.readouterr().out
    parts = ("generation", "forward and backward", *reward_cost.REWARD, *reward_cost.OTHERS)
    assert all(f"\n{part}" in shown for part in parts)
    assert "PEFT's set_adapter" in shown
    assert "| 8B | 1024 |" in shown


def test_operations_of_a_layer_are_two_a_weight() -> None:
    model = reward_cost.Operations(reward_cost.SHAPES["2b"])
    weights = 28 * (2048 * 128 * (2 * 16 + 2 * 8) + 3 * 2048 * 6144)
    assert model.read(1, 0) == 2 * weights
    assert model.read(1, 100) - model.read(1, 0) == 4 * 28 * 16 * 128 * 100
