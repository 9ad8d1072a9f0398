"""The GPU battery on a CPU: every part does its work at tiny size, and none spoils another."""

import json
import re
import runpy
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT, skip_without_compiler
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

BATTERY = ROOT / "benchmarks" / "gpu.py"
# vLLM may be absent; ZeRO-2 has a test of its own, which needs a compiler.
OWN_TESTS = ("grpo_vllm", "zero2")
STAND_INS = """
import os, time
import gpu_sizes
def tells_and_hangs(bench):
    bench.tell(seconds_a_step=1.5)
    time.sleep(600)
def raises(bench):
    bench.tell(first=1)
    raise MemoryError("too large | for this device")
def dies(bench):
    os._exit(9)
def works(bench):
    bench.tell(second=2.0)
PARTS = {"machine": tells_and_hangs, "grpo": raises, "encode": dies, "gate_labels": works}
"""


def run_battery(
    script: Path, out: Path, *flags: str
) -> tuple[subprocess.CompletedProcess, dict[str, Any]]:
    command = [sys.executable, str(script), "--device", "cpu", "--tiny", "--out", str(out), *flags]
    done = subprocess.run(
        command, cwd=out.parent, capture_output=True, text=True, timeout=400, check=False
    )
    return done, json.loads((out / "gpu.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def battery(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("battery") / "out"
    slots = runpy.run_path(str(BATTERY))["SLOTS"]
    parts = [name for name in slots if name not in OWN_TESTS]
    done, found = run_battery(BATTERY, out, "--minutes", "9", "--parts", *parts)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert done.stdout.strip() == (out / "gpu.md").read_text(encoding="utf-8").strip()
    for name in parts:
        assert found["parts"][name]["state"] == "done"
        assert f"| {name} | done |" in done.stdout
    return found


def figures(battery: dict[str, Any], part: str) -> dict[str, Any]:
    return battery["parts"][part]


@pytest.mark.slow
@pytest.mark.distributed
def test_every_part_does_its_work_and_tells_what_it_cost(battery: dict[str, Any]) -> None:
    assert figures(battery, "machine")["matmul_tflops"] > 0
    warm_start = figures(battery, "warm_start")
    assert warm_start["timed_steps"] == 2
    assert warm_start["last_grad_norm"] > 0
    # 19 tokens of a query (8 words, a picture of 4, the template), 6 of a thought, 9 of a target.
    assert warm_start["tokens_a_record"] == 3 * 19 + 2 * 6 + 2 * 9
    rl = figures(battery, "grpo")
    shares = {name: value for name, value in rl.items() if name.startswith("share_")}
    assert sum(shares.values()) == pytest.approx(1, abs=1e-4)
    assert min(shares[f"share_{n}"] for n in ("generation", "scorer", "similarity", "backward")) > 0
    assert rl["think_tokens"] == 4
    assert rl["last_grad_norm"] > 0
    assert rl["targets"] == 16
    encode = figures(battery, "encode")
    ways = ("never", "auto_half", "always", "latent")
    assert all(encode[f"{way}_queries_a_second"] > 0 for way in ways)
    assert figures(battery, "gate_labels")["inputs"] == 4
    assert figures(battery, "gate_labels")["think_tokens"] == 4
    for size in (8, 16):
        assert figures(battery, "chunks")[f"batch_{size}_last_grad_norm"] > 0
    demo = figures(battery, "demo")
    assert demo["warm_start_last_grad_norm"] > 0
    assert demo["rl_timed_steps"] == 1
    assert demo["encode_always_queries_a_second"] > 0


@pytest.mark.slow
@pytest.mark.distributed
def test_the_resumed_run_does_the_step_that_was_left_and_arrives_at_the_same_loss(
    battery: dict[str, Any],
) -> None:
    resume = figures(battery, "resume")
    assert resume["resumed_steps"] == 1
    assert resume["resumed_last_loss"] == pytest.approx(resume["unbroken_last_loss"], rel=1e-5)
    assert resume["checkpoint_mb"] > 0.1
    assert 0 < resume["save_seconds"] < resume["seconds"]


@pytest.mark.slow
@pytest.mark.distributed
def test_the_part_about_zero_runs_on_an_engine(tmp_path: Path) -> None:
    skip_without_compiler("zero2")
    done, found = run_battery(BATTERY, tmp_path / "out", "--minutes", "60", "--parts", "zero2")
    assert done.returncode == 0, found
    assert "DeepSpeedEngine, ZeRO-2 on 1 processes" in found["parts"]["zero2"]["engine"]
    assert found["parts"]["zero2"]["last_grad_norm"] > 0


@pytest.mark.distributed
def test_parts_that_hang_raise_or_die_are_told_and_leave_the_others_alone(tmp_path: Path) -> None:
    for name in ("gpu.py", "gpu_sizes.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    (tmp_path / "gpu_parts.py").write_text(STAND_INS, encoding="utf-8")
    parts = ["machine", "grpo", "encode", "gate_labels"]
    done, found = run_battery(
        tmp_path / "gpu.py", tmp_path / "out", "--minutes", "1", "--parts", *parts
    )
    hung, raised, died, worked = (found["parts"][name] for name in parts)
    assert (hung["state"], hung["seconds_a_step"]) == ("out of time", 1.5)
    assert hung["seconds"] < hung["limit_seconds"] + 5
    assert raised["state"] == "failed"
    assert raised["first"] == 1
    assert raised["error"] == "MemoryError: too large | for this device"
    assert died["error"] == "its process ended with 9, see parts/encode.log"
    assert (worked["state"], worked["second"]) == ("done", 2.0)
    assert done.returncode == 1
    assert "MemoryError: too large / for this device" in done.stdout
    assert "MemoryError" in (tmp_path / "out" / "parts" / "grpo.log").read_text(encoding="utf-8")


@pytest.mark.distributed
def test_what_no_time_is_left_for_is_told_by_the_exit_status(tmp_path: Path) -> None:
    for name in ("gpu.py", "gpu_sizes.py"):
        shutil.copy(ROOT / "benchmarks" / name, tmp_path)
    (tmp_path / "gpu_parts.py").write_text(STAND_INS, encoding="utf-8")
    flags = ("--minutes", "0.05", "--parts", "machine", "gate_labels")
    done, found = run_battery(tmp_path / "gpu.py", tmp_path / "out", *flags)
    states = {part["state"] for part in found["parts"].values()}
    assert states <= {"out of time", "not started"}
    assert done.returncode == 3


def test_the_lowest_versions_that_are_tried_are_those_that_are_promised() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (line,) = re.findall(r"^LOWEST := (.*)$", makefile, re.MULTILINE)
    tried = dict(pin.split("==") for pin in line.split())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    asked = [Requirement(each) for each in project["dependencies"]]
    asked += [Requirement(each) for extra in extras.values() for each in extra]
    for name, version in tried.items():
        bounds = {
            each.version
            for requirement in asked
            if requirement.name == name
            for each in requirement.specifier
            if each.operator == ">="
        }
        assert {f"{bound}.0"[: len(version)] for bound in bounds} == {version}, name


def test_the_wheels_are_all_that_training_needs_beside_torch_and_transformers() -> None:
    script = (ROOT / "benchmarks" / "gpu_wheels.sh").read_text(encoding="utf-8")
    (names,) = re.findall(r'^packages="([^"]*)"', script, re.MULTILINE)
    brought = set(names.split())
    there = closure("torch", "transformers", "accelerate")
    needed = closure("twn-rl[train,deepspeed]") - there - {"twn-rl"}
    left_out = closure("httpx2") - there  # for endpoints that draft thoughts
    assert needed - left_out <= brought
    assert brought <= needed | there | {"pillow", "six"}


def closure(*requirements: str) -> set[str]:
    """Return the distributions that requirements bring here, by their normal names."""
    found: set[str] = set()
    queue = [Requirement(each) for each in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if {name, f"{name}{sorted(requirement.extras)}"} <= found:
            continue
        found |= {name, f"{name}{sorted(requirement.extras)}"}
        for each in map(Requirement, distribution(requirement.name).requires or []):
            extras = [{"extra": extra} for extra in (*requirement.extras, "")]
            if each.marker is None or any(each.marker.evaluate(extra) for extra in extras):
                queue.append(each)
    return {name for name in found if "[" not in name}
