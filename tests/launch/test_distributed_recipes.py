"""The recipes under real `accelerate launch`: one process, two processes, ZeRO-2 and ZeRO-3."""

import json
from pathlib import Path

import pytest
import torch
from launching import GLOBAL_BATCH, ROOT, TORCHRUN, farthest, launch, skip_without_compiler

from twn_rl.data.record import Item
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.whole_files import read_json

pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def train(folder: Path, config: str | None, num_processes: int) -> dict[str, list[dict]]:
    """Warm-start and run GRPO for two steps each in one launch; return both metrics files."""
    sft = (ROOT / "recipes" / "configs" / "demo_sft.yaml").read_text(encoding="utf-8")
    share = GLOBAL_BATCH // num_processes
    replaced = {
        "max_steps": 2,
        "per_device_train_batch_size": share,
        "logging_steps": 1,
        "contrastive_from": 0.0,
        "self_written_from": 0.5,
        "self_written_share": 1.0,
        "warmup_steps": 0,
    }
    lines = [line for line in sft.splitlines() if line.split(":")[0] not in replaced]
    lines += [f"{name}: {value}" for name, value in replaced.items()]
    (folder / "sft.yaml").write_text("\n".join(lines), encoding="utf-8")
    flags = {
        "warm_start": folder / "sft",
        "warm_start_config": folder / "sft.yaml",
        "output_dir": folder / "grpo",
        "demo_dir": folder / "data",
        "demo_scale": 0.02,
        "max_steps": 2,
        "per_device_train_batch_size": share,
        "num_generations": 4,
        # Nearly greedy, so that one and two processes sample the same thoughts.
        "temperature": 0.01,
        "max_completion_length": 12,
        "evaluate": str(str(config).startswith("zero3")).lower(),  # once is enough
        "save_strategy": "steps",
        "save_steps": 1,
        "load_best_model_at_end": "true",
        "metric_for_best_model": "no_think_hit@1",  # the scorer is frozen: the first stays best
        "validation_records": 8,
    }
    done = launch(
        "grpo_embed.py",
        [f"--{name}={value}" for name, value in flags.items()],
        config=config,
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    if config is not None and config.startswith("zero"):
        # Both stages of the one launch, on an engine each; ZeRO-3 has all parameters in parts.
        parts = "205 of 205" if config.startswith("zero3") else "0 of 205"
        engine = f"DeepSpeedEngine, ZeRO-{config[4]} on 2 processes, {parts} parameters partitioned"
        assert done.stderr.count(engine) == 2, done.stderr[-4000:]
    return {
        stage: [
            json.loads(line)
            for line in (folder / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        ]
        for stage in ("sft", "grpo")
    }


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict]]:
    return train(tmp_path_factory.mktemp("one"), None, 1)


@pytest.mark.parametrize("config", [TORCHRUN, "zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_two_processes_train_like_one_and_leave_a_model_that_one_process_loads(
    config: str, one_process: dict[str, list[dict]], tmp_path: Path
) -> None:
    skip_without_compiler(config)
    two = train(tmp_path, config, 2)
    for name in ("loss", "loss_think", "loss_no_think", "loss_token"):
        alone = [row[name] for row in one_process["sft"] if name in row]
        together = [row[name] for row in two["sft"] if name in row]
        assert together == pytest.approx(alone, rel=2e-3), name
    rewards = [
        [row["reward"] for row in run["grpo"] if "reward" in row] for run in (one_process, two)
    ]
    assert rewards[1][0] == pytest.approx(rewards[0][0], abs=0.02)
    measured = [[row for row in run["grpo"] if "eval_hit@1" in row] for run in (one_process, two)]
    for name in ("eval_hit@1", "eval_no_think_hit@1"):
        alone, together = ([row[name] for row in rows] for rows in measured)
        assert len(together) == 2
        assert together == alone, name
    output = tmp_path / "grpo"
    if config.startswith("zero3"):
        # The last stage of such a launch embeds on all its processes, with models of its own.
        assert read_json(output / "evaluation" / "environment.json")["num_processes"] == 2
        metrics = read_json(output / "evaluation" / "metrics.json")
        assert metrics["test/all/always/num_queries"] == 20
        assert (output / "evaluation" / "report.html").is_file()
    assert farthest(output, output / "checkpoint-1") == 0.0
    state = read_json(output / "checkpoint-2" / "trainer_state.json")
    assert state["best_global_step"] == 1
    model = DualLoraModel.from_pretrained(output)
    vector = model.embed(model.collate([Item(text="camel")]))
    assert torch.isfinite(vector).all()
    before = DualLoraModel.from_pretrained(tmp_path / "sft")
    assert torch.equal(before.embed(before.collate([Item(text="camel")])), vector)


def test_an_unknown_yaml_key_ends_the_recipe_before_anything_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("output_dir: out\nlearning_rat: 1.0e-3\n", encoding="utf-8")
    done = launch("sft_embed.py", ["--config", "bad.yaml"], config=None, cwd=tmp_path)
    assert done.returncode != 0
    assert "learning_rat" in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_misspelt_reward_ends_the_recipe_before_the_warm_start(tmp_path: Path) -> None:
    flags = ["--rewards", "margn", "--warm_start=sft", "--output_dir=grpo"]
    done = launch("grpo_embed.py", flags, config=None, cwd=tmp_path)
    assert done.returncode != 0
    assert "margn" in done.stderr
    assert "margin" in done.stderr
    assert not (tmp_path / "sft").exists()


def test_the_embedded_backbone_is_small_enough_to_ship() -> None:
    size = sum(path.stat().st_size for path in BACKBONE_DIR.rglob("*") if path.is_file())
    assert 0 < size < 12e6
