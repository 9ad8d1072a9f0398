"""How tests start recipes as their users do: accelerate launch, torchrun, DeepSpeed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parents[1]
GLOBAL_BATCH = 8
TORCHRUN = "torchrun"
WORKER = Path(__file__).parent / "zero_worker.py"
ADAPTERS = ("reasoning", "embedding")


def skip_without_compiler(config: str | None) -> None:
    """Skip the test where DeepSpeed is asked for and cannot build its operator for CPU."""
    if str(config).startswith("zero") and shutil.which("g++") is None:
        pytest.skip("DeepSpeed compiles an operator on CPU and needs a C++ compiler (g++)")


def launch(
    recipe: str, flags: list[str], *, config: str | None, cwd: Path
) -> subprocess.CompletedProcess:
    """Run a recipe as a user would and return what it printed."""
    if config == TORCHRUN:
        # accelerate starts several CPU processes through MPI only.
        launcher = ["torch.distributed.run", "--nproc_per_node=2"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=localhost:0"]
    else:
        launcher = ["accelerate.commands.launch"]
        file = ["--config_file", str(ROOT / "recipes" / "accelerate" / str(config))]
        launcher += ["--num_processes=1"] if config is None else [*file, "--main_process_port=0"]
    command = [sys.executable, "-m", *launcher]
    return subprocess.run(
        [*command, str(ROOT / "recipes" / recipe), *flags],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def launch_worker(
    folder: Path,
    config: str | None,
    *flags: str,
    fails: bool = False,
    environment: dict[str, str] | None = None,
    restarts: int = 0,
) -> subprocess.CompletedProcess:
    """Run the worker on one process (None), under torchrun, or under a launch file."""
    command, more = [sys.executable, str(WORKER)], [f"--max_restarts={restarts}", str(WORKER)]
    if config == TORCHRUN:
        launcher = ["torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        command = [sys.executable, "-m", *launcher, "--rdzv_endpoint=localhost:0", *more]
    elif config is not None:
        path = ROOT / "recipes" / "accelerate" / config
        launcher = ["accelerate.commands.launch", "--config_file", str(path)]
        command = [sys.executable, "-m", *launcher, "--main_process_port=0", *more]
    done = subprocess.run(
        [*command, str(folder), *flags],
        cwd=WORKER.parent,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            **(environment or {}),
        },
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert (done.returncode != 0) == fails, (done.stdout + done.stderr)[-4000:]
    return done


def adapters_of(folder: Path) -> dict[str, torch.Tensor]:
    """Return all adapter weights of a model's folder."""
    return {
        f"{name}/{key}": tensor
        for name in ADAPTERS
        for key, tensor in load_file(folder / name / "adapter_model.safetensors").items()
    }


def farthest(one: Path, other: Path) -> float:
    """Return the largest difference of any adapter weight."""
    a, b = adapters_of(one), adapters_of(other)
    assert a.keys() == b.keys()
    return max(float((a[key] - b[key]).abs().max()) for key in a)
