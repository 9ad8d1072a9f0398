"""Ready configurations on tiny twins of their backbones, every stage of them; two processes.

Skipped where the extra `vision` is missing; `make test-vision` runs it.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torchvision", reason="needs the extra `vision`: run `make test-vision`")

import torch
from launching import ROOT, TORCHRUN, launch
from picture_rollouts import mixed_records
from tokenizers import processors
from torch.nn.functional import normalize
from vision_families import VISION_BACKBONES, mixed_items

from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.backbone import load_backbone
from twn_rl.modeling.collator import collate_opened
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.gate import QUERY_SIDE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.readout import position_ids
from twn_rl.recipes import gate_embed, grpo_embed, sft_embed
from twn_rl.recipes.gate_embed import GateScriptArguments

CONFIGS = ROOT / "recipes" / "configs"
TWINS = {
    "qwen3_vl_2b": "qwen3_vl",
    "qwen3_vl_8b": "qwen3_vl",
    "qwen3_vl_embedding_2b": "qwen3_vl",
    "smolvlm": "smolvlm",
}
SMALL: dict[str, dict[str, Any]] = {
    "sft": {"per_device_train_batch_size": 4, "max_think_tokens": 8, "dataloader_num_workers": 0},
    "grpo": {"per_device_train_batch_size": 4, "num_generations": 2, "max_completion_length": 8},
    "refit": {"per_device_train_batch_size": 4, "dataloader_num_workers": 0},
    "gate": {"max_examples": 8, "batch_size": 4},
}
# A fresh policy writes no thought that closes; its length must give the reward a gradient.
BREVITY = """
def brevity(completions, *, think_tokens, **kwargs):
    return [-count / 8 for count in think_tokens]
"""


def save_twin(name: str, folder: Path, *, appends: bool = False) -> Path:
    """Write a tiny backbone as the hub has big ones; `appends` lets its tokenizer end texts."""
    backbone = VISION_BACKBONES[name]()
    if appends:
        tokenizer = backbone.tokenizer
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <|im_end|>", special_tokens=[("<|im_end|>", tokenizer.eos_token_id)]
        )
    backbone.model.bfloat16().save_pretrained(folder)
    backbone.processor.save_pretrained(folder)
    return folder


def stage_flags(stage: str, folder: Path, twin: Path, **settings: Any) -> list[str]:
    """Return the flags that make a configuration's stage small, and its own in a folder."""
    records = folder / "records" / "records.jsonl"
    values: dict[str, Any] = {f"{split}_file": records for split in ("train", "rl", "validation")}
    values |= SMALL[stage]
    if stage == "gate":
        values["model"] = folder / "refit"
    else:
        values |= {"max_steps": 2, "output_dir": folder / stage, "use_cpu": "true"}
        values |= {"logging_steps": 1, "dataloader_pin_memory": "false"}
    if stage == "sft":
        values |= {"backbone": twin, "reasoning_rank": 2, "embedding_rank": 3}
    if stage == "refit":
        values["checkpoint"] = folder / "grpo"
    if stage == "grpo":
        values["warm_start"] = folder / "sft"
        (folder / "mine.py").write_text(BREVITY, encoding="utf-8")
    flags = [f"--{key}={value}" for key, value in {**values, **settings}.items()]
    if stage == "grpo":
        flags += ["--rewards", f"{folder / 'mine.py'}:brevity", "--reward_weights", "1"]
    return flags


def make_folder(folder: Path) -> Path:
    (folder / "records").mkdir(parents=True)
    mixed_records(folder / "records")
    return folder


def losses(folder: Path) -> list[float]:
    """Return the losses a run logged."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for line in lines if "loss" in (row := json.loads(line))]


@pytest.mark.parametrize("name", TWINS)
def test_a_ready_configuration_runs_on_the_twin_of_its_backbone(name: str, tmp_path: Path) -> None:
    folder, twin = make_folder(tmp_path), save_twin(TWINS[name], tmp_path / "twin")
    stages = {
        "sft": (sft_embed.main, sft_embed.ARGUMENTS),
        "grpo": (grpo_embed.main, grpo_embed.ARGUMENTS),
        "refit": (sft_embed.main, sft_embed.ARGUMENTS),
        "gate": (gate_embed.main, (GateScriptArguments, ThresholdRule, DataArguments)),
    }
    for stage, (main, arguments) in stages.items():
        flags = ["--config", str(CONFIGS / f"{name}_{stage}.yaml")]
        main(*parse_arguments(arguments, arguments=[*flags, *stage_flags(stage, folder, twin)]))
    for stage in ("sft", "grpo", "refit"):
        found = losses(folder / stage)
        assert len(found) == 2
        assert all(map(math.isfinite, found))
    model = DualLoraModel.from_pretrained(folder / "refit")
    assert QUERY_SIDE in model.gates
    assert type(model.processor).__module__.startswith("transformers.models.")
    assert model.backbone.model.dtype == torch.bfloat16
    assert model.config.readout_start == ("pooled_token" if "embedding" in name else "random")
    warm = DualLoraModel.from_pretrained(folder / "sft")
    policy = DualLoraModel.from_pretrained(folder / "grpo")
    batch = model.collate(mixed_items())
    assert torch.equal(policy.embed(batch), warm.embed(batch)), "RL moved the scorer"
    assert not torch.equal(model.embed(batch), policy.embed(batch)), "the refit moved nothing"


@pytest.mark.parametrize("appends", [False, True])
def test_an_embedder_starts_with_its_own_vectors(appends: bool, tmp_path: Path) -> None:
    twin = save_twin("qwen3_vl", tmp_path / "twin", appends=appends)
    flags = ["--config", str(CONFIGS / "qwen3_vl_embedding_2b_sft.yaml"), f"--backbone={twin}"]
    _, settings, _, _ = parse_arguments(sft_embed.ARGUMENTS, arguments=flags)
    model = settings.build(seed=0).eval()
    config: TwnConfig = model.config
    assert config.renderer.instruction_in_system
    items = mixed_items()
    # Its own way: a fresh copy, the token its tokenizer appends included, the last state.
    own = load_backbone(twin, dtype="bfloat16")
    assert (own.appended_token_id is not None) == appends
    batch = collate_opened(own, config.renderer, items)
    if own.appended_token_id is not None:
        ends = torch.full((len(items), 1), own.appended_token_id)
        batch["input_ids"] = torch.cat([batch["input_ids"], ends], 1)
        for key in ("attention_mask", "mm_token_type_ids"):
            fill = int(key == "attention_mask")
            batch[key] = torch.nn.functional.pad(batch[key], (0, 1), value=fill)
    with torch.no_grad():
        states = own.inner_model(**batch, position_ids=position_ids(own, batch)).last_hidden_state
        expected = normalize(states[:, -1].float(), dim=-1)
        found = model.embed(model.collate(items))
    assert (found * expected).sum(1).min() >= 0.99


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ["qwen3_vl", "smolvlm", "gemma3"])
def test_two_processes_train_like_one(name: str, tmp_path: Path) -> None:
    twin = save_twin(name, tmp_path / "twin")
    found: dict[str, dict[str, list[float]]] = {}
    for config, share in ((None, 4), (TORCHRUN, 2)):
        folder = make_folder(tmp_path / str(share))
        settings: dict[str, Any] = {
            "dtype": "float32",
            "bf16": "false",
            "gradient_checkpointing": "false",
        }
        settings |= {"self_written_from": 1.0, "contrastive_from": 0.0}
        settings |= {"per_device_train_batch_size": share}
        flags = ["--config", str(CONFIGS / "qwen3_vl_2b_sft.yaml")]
        flags += stage_flags("sft", folder, twin, **settings)
        done = launch("sft_embed.py", flags, config=config, cwd=folder)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        settings = {"bf16": "false", "per_device_train_batch_size": share}
        flags = ["--config", str(CONFIGS / "qwen3_vl_2b_grpo.yaml")]
        flags += stage_flags("grpo", folder, twin, **settings)
        done = launch("grpo_embed.py", flags, config=config, cwd=folder)
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
        found[str(share)] = {stage: losses(folder / stage) for stage in ("sft", "grpo")}
        model = DualLoraModel.from_pretrained(folder / "grpo")
        assert torch.isfinite(model.embed(model.collate(mixed_items()))).all()
    assert found["2"]["sft"] == pytest.approx(found["4"]["sft"], rel=2e-3)
    assert len(found["2"]["grpo"]) == len(found["4"]["grpo"]) == 2
