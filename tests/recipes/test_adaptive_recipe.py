"""The recipe of adaptive control under a real launcher: two steps in two processes."""

import json
from pathlib import Path

import pytest
import yaml
from launching import GLOBAL_BATCH, ROOT, TORCHRUN, launch, skip_without_compiler

from twn_rl.modeling.model import DualLoraModel

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

SFT = {
    "output_dir": "sft",
    "reasoning_rank": 4,
    "embedding_rank": 4,
    "max_think_tokens": 12,
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_drop_last": True,
    "dataloader_pin_memory": False,
    "ddp_find_unused_parameters": True,
}


@pytest.mark.parametrize("config", [TORCHRUN, "zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_mix_groups_that_span_both_and_leave_a_policy_that_decides(
    config: str, tmp_path: Path
) -> None:
    skip_without_compiler(config)
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(SFT), encoding="utf-8")
    flags = {
        "config": ROOT / "recipes" / "configs" / "demo_adaptive.yaml",
        "warm_start": tmp_path / "sft",
        "warm_start_config": tmp_path / "sft.yaml",
        "output_dir": tmp_path / "adaptive",
        "demo_dir": tmp_path / "data",
        "demo_scale": 0.02,
        "max_steps": 2,
        "per_device_train_batch_size": GLOBAL_BATCH // 2,
        "num_generations": GLOBAL_BATCH,  # one group, half of it on each process
        "max_completion_length": 8,
        "evaluate": "false",
    }
    done = launch(
        "adaptive_embed.py",
        [f"--{name}={value}" for name, value in flags.items()],
        config=config,
        cwd=tmp_path,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    assert done.stderr.count("DeepSpeedEngine, ZeRO-") == (2 if "zero" in config else 0)
    text = (tmp_path / "adaptive" / "metrics.jsonl").read_text(encoding="utf-8")
    first = json.loads(text.splitlines()[0])
    # The one group spans both processes: a rollout is pinned only if all of both agree.
    rate, pin = first["rollouts/think_rate"], pytest.approx(1 / GLOBAL_BATCH)
    assert first["rollouts/pinned_direct"] == (pin if rate == 1.0 else 0.0)
    assert first["rollouts/pinned_think"] == (pin if rate == 0.0 else 0.0)
    model = DualLoraModel.from_pretrained(tmp_path / "adaptive")
    assert model.is_policy_deciding
