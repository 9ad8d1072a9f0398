"""The recipe of RL with rollouts by a real vLLM beside each of two processes.

Skipped where vLLM is missing; `make test-vllm` runs it.
"""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: run `make test-vllm`", allow_module_level=True)

from launching import TORCHRUN, launch
from picture_rollouts import mixed_records
from vllm_models import make_vllm_model

REWARD = """
def variety(completions, *, completion_ids, **kwargs):
    return [sum(ids) % 31 / 31 for ids in completion_ids]
"""


@pytest.mark.distributed
def test_two_processes_have_a_vllm_each_and_write_with_the_policy(tmp_path: Path) -> None:
    make_vllm_model("qwen3_vl", tmp_path / "backbone").save_pretrained(tmp_path / "warm")
    (tmp_path / "records").mkdir()
    mixed_records(tmp_path / "records")
    (tmp_path / "mine.py").write_text(REWARD, encoding="utf-8")
    settings = {
        "warm_start": tmp_path / "warm",
        "rl_file": tmp_path / "records" / "records.jsonl",
        "rewards": f"{tmp_path / 'mine.py'}:variety",
        "output_dir": tmp_path / "run",
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": 2,
        "learning_rate": 3e-2,
        "warmup_steps": 0,
        "mask_truncated_completions": "false",  # no thought of a random model closes
        "evaluate": "true",
        "test_file": tmp_path / "records" / "records.jsonl",
        "use_cpu": "true",
        "use_vllm": "true",
        "vllm_max_model_length": 256,
    }
    flags = [f"--{name}={value}" for name, value in settings.items()]
    done = launch("grpo_embed.py", flags, config=TORCHRUN, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [
        row
        for line in lines
        if "sampling/sampling_logp_difference/max" in (row := json.loads(line))
    ]
    assert len(found) == 2
    assert all(row["sampling/sampling_logp_difference/max"] < 2e-4 for row in found)
    assert found[0]["grad_norm"] > 0
    # The processes still know each other when vLLM is gone: one model, and both evaluate it.
    assert (tmp_path / "run" / "reasoning" / "adapter_model.safetensors").is_file()
    assert (tmp_path / "run" / "evaluation" / "report.html").is_file()
