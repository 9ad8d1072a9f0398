"""Every trainer on an engaged DeepSpeed engine: two CPU processes, ZeRO-2 and ZeRO-3.

One launch trains all stages (`zero_worker.py`); the figures of one process are the reference.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import TORCHRUN, adapters_of, farthest, launch_worker, skip_without_compiler
from safetensors.torch import load_file
from short_runs import small_model
from tiny_backbones import make_idefics3

from twn_rl.data.record import Item
from twn_rl.modeling.adapter_files import adapter_state
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER
from twn_rl.modeling.model import DualLoraModel

pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STAGES = ("sft", "grpo", "adaptive", "latent")
ZERO = ("zero2_cpu.yaml", "zero3_cpu.yaml")
LOSS_TOLERANCE = 2e-5  # relative; gradients of up to 860 are summed in another order
WEIGHT_TOLERANCE = 5e-5  # absolute, of weights around 0.3 after four steps at a rate of 0.01


# One step of plain gradient descent at rate 1: what moved is the gradient.
GRADIENT = {
    "optim": "sgd",
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 1,
}
CHUNKED = {"contrastive_chunk_tokens": 60}  # two to four rows a chunk, of a batch of eight
CONTRASTIVE = ("sft", "latent")


def job(*stages: str, **settings: Any) -> dict[str, Any]:
    """Return what the worker is told of some stages with settings of their own."""
    return {"stages": stages, "settings": settings}


JOBS = {
    "plain": job(*STAGES),
    "recomputed": job("sft", "grpo", "latent", gradient_checkpointing=True),
    "whole": job(*CONTRASTIVE, **GRADIENT),
    "chunked": job(*CONTRASTIVE, **GRADIENT, **CHUNKED),
    "dropout": job(*CONTRASTIVE, **GRADIENT, **CHUNKED, dropout=0.2),
    "bf16": job("grpo", bf16=True),
}
# One launch does all jobs of a layout: loading the libraries takes longer than most of them.
# Another precision is another process.
LAUNCHES: dict[str | None, tuple[tuple[str, ...], ...]] = {
    None: (("plain", "recomputed", "whole", "chunked"),),
    TORCHRUN: (("plain", "recomputed", "chunked", "dropout"),),
    "zero2_cpu.yaml": (("plain", "recomputed", "chunked"), ("bf16",)),
    "zero3_cpu.yaml": (("plain", "recomputed", "chunked", "dropout"), ("bf16",)),
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return layout, job -> folder of its stages; each is launched once."""
    made: dict[tuple[str | None, tuple[str, ...]], Path] = {}

    def run(config: str | None, name: str = "plain") -> Path:
        (names,) = (names for names in LAUNCHES[config] if name in names)
        if (config, names) not in made:
            skip_without_compiler(config)
            folder = tmp_path_factory.mktemp(str(config))
            jobs = {each: JOBS[each] for each in names}
            launch_worker(folder, config, "--jobs", json.dumps(jobs))
            made[config, names] = folder
        return made[config, names] / name

    return run


def report_of(run: Path, stage: str) -> dict[str, Any]:
    return json.loads((run / stage / "report.json").read_text(encoding="utf-8"))


def logged(run: Path, stage: str, name: str) -> list[float]:
    return [row[name] for row in report_of(run, stage)["logs"] if name in row]


def reward_columns(run: Path, stage: str) -> dict[str, list[dict[str, Any]]]:
    """Return the columns of every rollout by record, in the order they were made."""
    found: dict[str, list[dict[str, Any]]] = {}
    for path in sorted((run / stage).glob("columns-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            columns = json.loads(line)
            for row, record in enumerate(columns["record_id"]):
                found.setdefault(record, []).append({k: v[row] for k, v in columns.items()})
    return found


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("config", ZERO)
def test_the_engine_is_deepspeeds_and_zero_3_has_every_parameter_in_parts(
    runs: Any, config: str, stage: str
) -> None:
    report = report_of(runs(config), stage)
    assert report["engine"] == "DeepSpeedEngine"
    assert report["stage"] == int(config[4])
    assert report["parameters"] > 100
    assert report["partitioned"] == (report["parameters"] if config[4] == "3" else 0)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("config", [TORCHRUN, *ZERO])
def test_two_processes_with_pictures_on_one_of_them_train_like_one(
    runs: Any, config: str, stage: str
) -> None:
    one, two = runs(None), runs(config)
    for name in ("loss", "grad_norm"):
        alone, together = logged(one, stage, name), logged(two, stage, name)
        assert len(alone) == 4
        assert together == pytest.approx(alone, rel=LOSS_TOLERANCE, abs=1e-6), name
    assert farthest(one / stage, two / stage) < WEIGHT_TOLERANCE
    moved = farthest(one / stage, one / stage / "checkpoint-2")
    assert moved > 20 * WEIGHT_TOLERANCE, "the tolerance would hide that nothing was trained"


@pytest.mark.parametrize("stage", ["grpo", "adaptive"])
@pytest.mark.parametrize("config", [TORCHRUN, *ZERO])
def test_rewards_see_the_columns_of_one_process(runs: Any, config: str, stage: str) -> None:
    one, two = reward_columns(runs(None), stage), reward_columns(runs(config), stage)
    assert one.keys() == two.keys()
    assert len(one) == 8
    for record, rows in one.items():
        for alone, together in zip(rows, two[record], strict=True):
            for name, value in alone.items():
                expected = pytest.approx(value, abs=2e-6) if name != "record_id" else value
                assert together[name] == expected, (record, name)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("config", ZERO)
def test_checkpoints_hold_adapters_and_no_backbone_and_load_in_one_process(
    runs: Any, config: str, stage: str
) -> None:
    folder = runs(config) / stage
    checkpoint = folder / "checkpoint-4"
    names = {
        name
        for file in checkpoint.rglob("*_model_states.pt")
        for name in torch.load(file, weights_only=False)["module"]
    }
    assert all("lora_" in n or "trainable_tokens" in n or "decoder." in n for n in names), names
    assert names
    assert farthest(folder, checkpoint) == 0.0
    one = DualLoraModel.from_pretrained(folder, backbone=make_idefics3())
    stored = adapters_of(folder)
    for name, kept in ((REASONING_ADAPTER, "reasoning"), (EMBEDDING_ADAPTER, "embedding")):
        own = adapter_state(one.peft_model, name)
        assert own
        assert all(torch.equal(value, stored[f"{kept}/{key}"]) for key, value in own.items())
    vector = one.embed(one.collate([Item(text="camel")]))
    assert torch.isfinite(vector).all()


@pytest.mark.parametrize("name", ["plain", "bf16"])
@pytest.mark.parametrize("config", ZERO)
def test_the_bank_holds_what_the_engines_weights_give(runs: Any, config: str, name: str) -> None:
    assert report_of(runs(config, name), "grpo")["bank_difference"] == 0.0


@pytest.mark.parametrize("config", [None, TORCHRUN, *ZERO])
def test_recomputing_layers_changes_no_loss_and_no_weight(runs: Any, config: str | None) -> None:
    plain, again = runs(None), runs(config, "recomputed")
    for stage in JOBS["recomputed"]["stages"]:
        assert report_of(again, stage)["recomputes"]
        assert not report_of(plain, stage)["recomputes"]
        alone, together = logged(plain, stage, "loss"), logged(again, stage, "loss")
        assert together == pytest.approx(alone, rel=LOSS_TOLERANCE, abs=1e-6), stage
        assert farthest(plain / stage, again / stage) < WEIGHT_TOLERANCE


def gradient_of(run: Path, stage: str) -> torch.Tensor:
    """Return the gradient of the one step of a run as one vector."""
    model = small_model(**({"num_reason_tokens": 2} if stage == "latent" else {}))
    parts = []
    for name, kept in ((REASONING_ADAPTER, "reasoning"), (EMBEDDING_ADAPTER, "embedding")):
        after = load_file(run / stage / kept / "adapter_model.safetensors")
        before = adapter_state(model.peft_model, name)
        parts += [(before[key].double() - after[key].double()).flatten() for key in sorted(before)]
    return torch.cat(parts)


@pytest.mark.parametrize("config", [None, TORCHRUN, *ZERO])
def test_chunks_give_the_gradient_of_the_whole_batch(runs: Any, config: str | None) -> None:
    whole, cut = runs(None, "whole"), runs(config, "chunked")
    for stage in CONTRASTIVE:
        wanted, found = gradient_of(whole, stage), gradient_of(cut, stage)
        assert float(wanted.norm()) > 1.0
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, stage


@pytest.mark.parametrize("config", ["zero3_cpu.yaml"])
def test_dropout_falls_alike_in_both_phases_on_every_engine(runs: Any, config: str) -> None:
    plain, without = runs(TORCHRUN, "dropout"), runs(TORCHRUN, "chunked")
    sharded = runs(config, "dropout")
    for stage in CONTRASTIVE:
        wanted, found = gradient_of(plain, stage), gradient_of(sharded, stage)
        assert float((found - wanted).norm() / wanted.norm()) < 1e-5, stage
        other = gradient_of(without, stage)
        assert float((other - wanted).norm() / wanted.norm()) > 0.1, "dropout did nothing"


@pytest.mark.parametrize("config", [TORCHRUN, *ZERO])
def test_a_launch_goes_on_by_itself_after_a_killed_process(
    runs: Any, config: str, tmp_path: Path
) -> None:
    unbroken = runs(config)
    # RL keeps the checkpoint in the middle: its rewards are taken for the better ones.
    first, second, *rest = logged(unbroken, "grpo", "reward")
    choice = {
        "load_best_model_at_end": True,
        "metric_for_best_model": "reward",
        "greater_is_better": first + second > sum(rest),
    }
    flags = ("--stages", "sft", "grpo", "--elastic", "--settings", json.dumps(choice))
    done = launch_worker(tmp_path, config, *flags, restarts=2)
    for stage in ("sft", "grpo"):  # in each another process died, the first one in RL
        assert f"Resuming from {tmp_path / stage / 'checkpoint-2'}" in done.stderr, done.stderr
        assert farthest(tmp_path / stage / "checkpoint-4", unbroken / stage) == 0.0
    assert done.stderr.count("exitcode: -9") == 2
    assert f"{tmp_path / 'sft' / 'checkpoint-4'} is the end of this run" in done.stderr
    assert farthest(tmp_path / "sft", unbroken / "sft") == 0.0
    assert "The model is that of step 2 of 4, the best by reward" in done.stderr
    assert farthest(tmp_path / "grpo", unbroken / "grpo" / "checkpoint-2") == 0.0


@pytest.mark.parametrize("config", [TORCHRUN, *ZERO])
def test_a_kill_inside_a_save_leaves_the_checkpoint_before_it(
    runs: Any, config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORKER_DIES_IN_SAVE", "1")
    launch_worker(tmp_path, config, "--stages", "sft", "--kill", "sft", fails=True)
    assert (tmp_path / "sft" / "checkpoint-4" / "embedding").is_dir()
    done = launch_worker(tmp_path, config, "--stages", "sft", "--resume", "sft")
    assert "checkpoint-4 is passed over: no readable manifest.json" in done.stderr
    assert farthest(tmp_path / "sft", runs(config) / "sft") == 0.0


@pytest.mark.parametrize("other", [None, TORCHRUN, "zero3_cpu.yaml"])
def test_a_checkpoint_of_another_launch_is_refused_with_what_to_do(
    runs: Any, other: str | None, tmp_path: Path
) -> None:
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "checkpoint-2").symlink_to(runs("zero2_cpu.yaml") / "sft" / "checkpoint-2")
    flags = ("--stages", "sft", "--resume", "sft")
    done = launch_worker(tmp_path, other, *flags, fails=True)
    assert "was saved by ZeRO-2 on 2 processes in float32" in done.stderr
    assert "launch as before, or start anew from its adapters" in done.stderr
