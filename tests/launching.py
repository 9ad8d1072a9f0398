"""How tests start recipes as their users do: accelerate launch, torchrun, DeepSpeed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GLOBAL_BATCH = 8
TORCHRUN = "torchrun"


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
