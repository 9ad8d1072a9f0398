"""Launches that must work, and launches that must say what to do: files, precision, processes."""

import json
import os
import shutil
import socket
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from launching import ROOT, launch, skip_without_compiler
from torch.multiprocessing.spawn import spawn

from twn_rl.launch.arguments import ModelArguments
from twn_rl.runtime import processes
from twn_rl.runtime.processes import check_engaged, check_launch
from twn_rl.runtime.zero import fill_auto_sizes
from twn_rl.training.gate_labels import read_labels
from twn_rl.training.sft import SftConfig

FILES = ROOT / "recipes" / "accelerate"
ZERO = ("zero2_cpu.yaml", "zero3_cpu.yaml")


def settings_of(name: str) -> dict[str, Any]:
    return yaml.safe_load((FILES / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("stage", [2, 3])
def test_files_for_gpus_and_for_cpus_differ_in_what_the_machine_asks_for_only(stage: int) -> None:
    gpu, cpu = settings_of(f"zero{stage}.yaml"), settings_of(f"zero{stage}_cpu.yaml")
    assert gpu["deepspeed_config"] == cpu["deepspeed_config"]
    assert gpu["deepspeed_config"]["zero_stage"] == stage
    assert (gpu["mixed_precision"], gpu["num_processes"]) == ("bf16", "auto")
    assert "use_cpu" not in gpu
    assert (cpu["use_cpu"], cpu["gpu_ids"], cpu["mixed_precision"]) == (True, "", "no")


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that makes this machine look like another one."""

    def pretend(gpus: int = 0, **environment: str) -> None:
        for name in [n for n in os.environ if n.startswith("ACCELERATE_")]:
            monkeypatch.delenv(name)
        for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE", "CUDA_VISIBLE_DEVICES"):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(torch.accelerator, "device_count", lambda: gpus)

    return pretend


def test_a_file_for_gpus_on_a_machine_without_says_which_to_take(machine: Any) -> None:
    machine(ACCELERATE_USE_DEEPSPEED="true", LOCAL_RANK="0", LOCAL_WORLD_SIZE="2")
    with pytest.raises(ValueError, match=r"take recipes/accelerate/zero2_cpu\.yaml or zero3_cpu"):
        check_launch(use_cpu=False)
    machine(ACCELERATE_USE_DEEPSPEED="true", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    check_launch(use_cpu=False)


def test_more_processes_than_gpus_are_refused_with_the_number_to_pass(machine: Any) -> None:
    machine(2, ACCELERATE_USE_DEEPSPEED="true", LOCAL_RANK="0", LOCAL_WORLD_SIZE="4")
    with pytest.raises(ValueError, match="pass --num_processes 2 to accelerate launch"):
        check_launch(use_cpu=False)


def test_a_file_for_cpus_on_a_machine_with_gpus_warns(
    machine: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine(ACCELERATE_USE_DEEPSPEED="true", LOCAL_RANK="0", CUDA_VISIBLE_DEVICES="")
    monkeypatch.setattr(processes, "has_hidden_gpu", lambda: True)
    check_launch(use_cpu=False)
    assert "recipes/accelerate/zero2.yaml or zero3.yaml to use them" in caplog.text


def test_deepspeed_without_a_launcher_and_fsdp_are_refused_together(machine: Any) -> None:
    machine(ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_FSDP="true", CUDA_VISIBLE_DEVICES="")
    with pytest.raises(ValueError, match="distributed_type = FSDP, expected DEEPSPEED") as error:
        check_launch(use_cpu=False)
    assert "DeepSpeed without a launcher" in str(error.value)


def test_precision_given_twice_and_differently_is_refused(machine: Any, tmp_path: Path) -> None:
    machine(ACCELERATE_MIXED_PRECISION="bf16")
    with pytest.raises(ValueError, match="bf16 = False, fp16 = False in the recipe and mixed_prec"):
        SftConfig(output_dir=str(tmp_path), bf16=False, use_cpu=True)
    assert SftConfig(output_dir=str(tmp_path), use_cpu=True).bf16
    machine(ACCELERATE_MIXED_PRECISION="no")
    assert not SftConfig(output_dir=str(tmp_path), use_cpu=True).bf16
    assert SftConfig(output_dir=str(tmp_path), bf16=True, use_cpu=True).bf16


def test_a_run_that_accelerate_made_a_plain_one_is_stopped(machine: Any) -> None:
    class Trainer:
        class args:  # noqa: N801
            deepspeed = None

        class accelerator:  # noqa: N801
            distributed_type = "MULTI_CPU"

    machine(ACCELERATE_USE_DEEPSPEED="true")
    with pytest.raises(RuntimeError, match="accelerate runs MULTI_CPU; expected"):
        check_engaged(Trainer())
    machine()
    check_engaged(Trainer())


def test_sizes_that_are_numbers_stay() -> None:
    config = {"zero_optimization": {"stage": 3, "reduce_bucket_size": 7, "sub_group_size": "auto"}}
    fill_auto_sizes(config, 64)
    assert config["zero_optimization"] == {
        "stage": 3,
        "reduce_bucket_size": 7,
        "sub_group_size": "auto",
    }


def _wait_for_a_slow_process(rank: int, folder: str) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    os.environ["MASTER_PORT"] = Path(folder, "port").read_text(encoding="utf-8")
    here = processes.join_processes(use_cpu=True, timeout_seconds=2)
    with here.one_first():
        if rank == 0:
            time.sleep(5)  # more than twice what a collective of training may take
    here.wait_for_everyone()
    Path(folder, f"done-{rank}").touch()
    if rank == 0:
        time.sleep(5)
    try:
        dist.all_reduce(torch.ones(1))
    except RuntimeError:
        Path(folder, "timed-out").touch()
    # Gloo's threads of a group that timed out may abort the interpreter's own ending.
    os._exit(0)


@pytest.mark.slow
@pytest.mark.distributed
def test_long_work_of_one_process_outlives_the_time_out_of_collectives(tmp_path: Path) -> None:

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        (tmp_path / "port").write_text(str(probe.getsockname()[1]), encoding="utf-8")
    assert timedelta(hours=1) < processes.WAIT_TIMEOUT
    spawn(_wait_for_a_slow_process, (str(tmp_path),), nprocs=2)
    assert (tmp_path / "done-0").exists()
    assert (tmp_path / "done-1").exists()
    assert (tmp_path / "timed-out").exists(), "the short time-out was not that of the group"


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("file", ["zero3.yaml", "fsdp2.yaml"])
def test_a_launch_that_cannot_work_ends_before_anything_is_loaded(
    file: str, tmp_path: Path
) -> None:
    path = FILES / file
    if file == "fsdp2.yaml":
        path = tmp_path / file
        fsdp = {"fsdp_version": 2, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
        text = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP"}
        text |= {"fsdp_config": fsdp, "num_processes": 2, "num_machines": 1, "machine_rank": 0}
        path.write_text(yaml.safe_dump({**text, "use_cpu": True}), encoding="utf-8")
    elif torch.accelerator.is_available():
        pytest.skip("this machine has a GPU")
    flags = ["--output_dir=out", "--demo_dir=data"]
    done = launch("sft_embed.py", flags, config=str(path), cwd=tmp_path)
    assert done.returncode != 0
    assert ("zero3_cpu.yaml" if file == "zero3.yaml" else "distributed_type = FSDP") in done.stderr
    assert not (tmp_path / "data").exists()
    assert not (tmp_path / "out").exists()


def write_deepspeed_files(folder: Path, **changes: Any) -> Path:
    """Write a DeepSpeed file with `auto` values, and a launch file that names it."""
    zero = {"stage": 3, "stage3_param_persistence_threshold": "auto", "reduce_bucket_size": "auto"}
    zero |= {"stage3_prefetch_bucket_size": "auto", "contiguous_gradients": True}
    rates: dict[str, Any] = {"lr": "auto", "betas": "auto", "eps": "auto", "weight_decay": "auto"}
    rates |= {"torch_adam": True}  # DeepSpeed's own would be compiled first, for minutes
    config = {
        "zero_optimization": zero,
        "bf16": {"enabled": "auto"},
        "optimizer": {"type": "AdamW", "params": rates},
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        **changes,
    }
    (folder / "deepspeed.json").write_text(json.dumps(config), encoding="utf-8")
    launch_file = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "deepspeed_config_file": str(folder / "deepspeed.json"),
            "zero3_init_flag": False,
        },
        "gpu_ids": "",
        "use_cpu": True,
        "num_machines": 1,
        "num_processes": 2,
        "machine_rank": 0,
    }
    (folder / "launch.yaml").write_text(yaml.safe_dump(launch_file), encoding="utf-8")
    return folder / "launch.yaml"


SHORT_SFT = {
    "demo_scale": 0.02,
    "max_steps": 1,
    "per_device_train_batch_size": 4,
    "contrastive_from": 0.0,
    "output_dir": "out",
    "demo_dir": "data",
}


@pytest.mark.slow
@pytest.mark.distributed
def test_a_deepspeed_file_with_auto_values_works_and_one_that_contradicts_is_named(
    tmp_path: Path,
) -> None:
    skip_without_compiler("zero3")
    flags = [f"--{name}={value}" for name, value in SHORT_SFT.items()]
    file = str(write_deepspeed_files(tmp_path))
    done = launch("sft_embed.py", flags, config=file, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert "DeepSpeedEngine, ZeRO-3 on 2 processes, 1" in done.stderr
    assert "of 205 parameters partitioned" in done.stderr
    write_deepspeed_files(tmp_path, train_micro_batch_size_per_gpu=7)
    other = [*flags, "--output_dir=other"]
    done = launch("sft_embed.py", other, config=file, cwd=tmp_path)
    assert done.returncode != 0
    assert "ds train_micro_batch_size_per_gpu=7 vs hf per_device_train_batch_size=4" in done.stderr


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("untrained") / "model"
    arguments = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6)
    arguments.build(0).save_pretrained(path)
    return path


def passes(folder: Path, config: str | None, model: Path) -> Path:
    """Label for a gate, select thoughts and evaluate under one launch file each."""
    shutil.copytree(model, folder / "model")
    data = ["--demo_scale=0.01", "--demo_dir=data"]
    commands = {
        "gate_embed.py": ["--model=model", "--max_examples=24", "--batch_size=8"],
        "select_thoughts.py": [
            "--model=model",
            "--output_dir=selection",
            "--demo_teachers=2",
            "--split=validation",
        ],
        "eval_embed.py": ["--model=model", "--splits=test", "--modes", "never", "always"],
    }
    for recipe, flags in commands.items():
        done = launch(recipe, [*flags, *data], config=config, cwd=folder)
        assert done.returncode == 0, (recipe, (done.stdout + done.stderr)[-4000:])
    return folder


@pytest.fixture(scope="module")
def alone(untrained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return passes(tmp_path_factory.mktemp("alone"), None, untrained)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("config", ZERO)
def test_passes_under_a_launch_file_give_what_one_process_gives(
    config: str, untrained: Path, alone: Path, tmp_path: Path
) -> None:
    skip_without_compiler(config)
    together = passes(tmp_path, config, untrained)
    labels = [read_labels(run / "model/gate/labels/query/gate") for run in (alone, together)]
    assert labels[0].rows == labels[1].rows
    assert len(labels[0].rows) == 24
    file = "selection/drafts.jsonl"
    selected = [(run / file).read_text(encoding="utf-8") for run in (alone, together)]
    assert selected[0] == selected[1]
    assert len(selected[0].splitlines()) == 10
    measured = [
        json.loads((run / "model/evaluation/metrics.json").read_text("utf-8"))
        for run in (alone, together)
    ]
    for metrics in measured:  # what was measured, not how fast
        assert len(metrics) > 20
        for name in [name for name in metrics if "seconds" in name]:
            del metrics[name]
    # Both embed: which inputs share a batch differs, and with it the last bits of vectors.
    environment = json.loads((together / "model/evaluation/environment.json").read_text("utf-8"))
    assert environment["num_processes"] == 2
    assert measured[1] == pytest.approx(measured[0], rel=1e-6, abs=1e-6)
    environment = json.loads((together / "model/gate/environment.json").read_text("utf-8"))
    assert environment["num_processes"] == 2
    assert environment["distributed_type"] == "DEEPSPEED"
