"""The benchmarks of the reward's cost run, and what they print adds up."""

import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(name: str, flags: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", [name, *flags])
    runpy.run_path(str(BENCHMARKS / name), run_name="__main__")


def test_the_parts_of_a_step_are_measured_and_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = "--tiny true --queries 2 --generations 3 --tokens 4 --targets 300 --repeats 1"
    run("reward_cost.py", flags.split(), monkeypatch)
    printed = capsys.readouterr().out
    shares = dict(re.findall(r"^(\S.*?) +[\d.]+ s +([\d.]+)%", printed, re.MULTILINE))
    reward = ("scorer: reading", "similarity", "host work of the reward")
    parts = [float(shares[name]) for name in ("generation", "forward and backward", *reward)]
    assert min(parts) >= 0
    assert sum(parts) == pytest.approx(100, abs=0.5)
    together = sum(float(shares[name]) for name in reward)
    assert float(shares["reward, together"]) == pytest.approx(together, abs=0.5)
    assert "2 queries" in printed
    assert "300 targets" in printed
    counted = [line.split("|") for line in printed.splitlines() if re.match(r"\| [248]B", line)]
    assert len(counted) == 6
    for row in counted:  # ours, UME-R1's way, naive
        ours, naive, anew = (float(cell.strip(" %")) for cell in row[-4:-1])
        assert ours < anew < naive


def test_products_with_many_targets_are_exact_in_every_arm(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    flags = ["--sizes", "3000", "--width", "24", "--repeats", "1", "--folder", str(tmp_path)]
    run("targets.py", flags, monkeypatch)
    printed = capsys.readouterr().out
    exact = re.findall(r"(?:at once|in blocks).*  (\S+) from float64, (\S+)% of ranks", printed)
    assert len(exact) == 4  # two ways in two types
    assert all(float(gap) < 1e-6 and float(ranks) == 0 for gap, ranks in exact)
    assert len(re.findall(r"candidates of 8 queries found in", printed)) == 2
    assert not list(tmp_path.iterdir())
