"""Checkpoints are whole or passed over, models are replaced whole or stay, NaN is never saved."""

import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from made_records import picture_records
from safetensors.torch import load_file
from short_runs import SHORT_RUN, small_model, weights
from tiny_backbones import make_idefics3

from twn_rl.launch.run_folder import checkpoint_to_resume, train_and_save
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, adapter_parameters
from twn_rl.modeling.checkpoint import save_decision
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.sft import SftConfig, SftTrainer
from twn_rl.training.whole_checkpoints import SEAL_FILE, damage_of, newest_whole


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    """Return the folder of a run of four steps with two checkpoints, and its records."""
    folder = tmp_path_factory.mktemp("unbroken")
    (folder / "data").mkdir()
    records = picture_records(folder / "data")
    trainer = make_trainer(folder / "run", records)
    trainer.train()
    trainer.save_model(str(folder / "run"))
    return folder / "run", records


def make_trainer(folder: Path, records: Any, **settings: Any) -> Any:
    settings = {
        **SHORT_RUN,
        "max_steps": 4,
        "per_device_train_batch_size": 3,
        "save_strategy": "steps",
        "save_steps": 2,
        "learning_rate": 1e-3,
        **settings,
    }
    return SftTrainer(small_model(), SftConfig(output_dir=str(folder), **settings), records)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path: Path) -> None:
    path.write_bytes(b"")


DAMAGED = (
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "reasoning/adapter_model.safetensors",
    "embedding/adapter_model.safetensors",
    SEAL_FILE,
)


@pytest.mark.parametrize("name", DAMAGED)
@pytest.mark.parametrize("damage", [Path.unlink, cut, flip, empty])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(
    name: str,
    damage: Callable[[Path], None],
    unbroken: tuple[Path, Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    run = tmp_path / "run"
    shutil.copytree(unbroken[0], run)
    assert newest_whole(run) == run / "checkpoint-4"
    damage(run / "checkpoint-4" / name)
    assert damage_of(run / "checkpoint-4") is not None
    assert checkpoint_to_resume(run, "true") == str(run / "checkpoint-2")
    assert "checkpoint-4 is passed over: " in caplog.text
    assert (SEAL_FILE if name == SEAL_FILE else name) in caplog.text
    if (run / "checkpoint-4" / SEAL_FILE).exists() and name != SEAL_FILE:
        with pytest.raises(ValueError, match=r"expected a whole checkpoint; resume from an older"):
            checkpoint_to_resume(run, str(run / "checkpoint-4"))


def test_a_full_disk_inside_a_save_costs_that_checkpoint_alone(
    unbroken: tuple[Path, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, records = unbroken
    trainer = make_trainer(tmp_path / "run", records, save_total_limit=1)
    inner = trainer._save_rng_state

    def full(folder: str) -> None:
        if folder.endswith("checkpoint-4"):
            raise OSError(28, "No space left on device", folder)
        inner(folder)

    monkeypatch.setattr(trainer, "_save_rng_state", full)
    with pytest.raises(OSError, match="checkpoint-4: no room on the disk"):
        trainer.train()
    # The older one is deleted only once the newer one is whole.
    assert checkpoint_to_resume(tmp_path / "run", "true") == str(tmp_path / "run/checkpoint-2")
    again = make_trainer(tmp_path / "run", records, save_total_limit=1)
    again.train(resume_from_checkpoint=checkpoint_to_resume(tmp_path / "run", "true"))
    again.save_model(str(tmp_path / "run"))
    for name in ("reasoning", "embedding"):
        file = f"{name}/adapter_model.safetensors"
        wanted, found = load_file(whole / file), load_file(tmp_path / "run" / file)
        assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert newest_whole(tmp_path / "run") == tmp_path / "run" / "checkpoint-4"


def test_a_finished_run_is_read_back_and_not_trained_on(
    unbroken: tuple[Path, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    whole, records = unbroken
    shutil.copytree(whole, tmp_path / "run")
    trainer = make_trainer(tmp_path / "run", records)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(tmp_path / "run", "true"))
    assert "nothing is left to train" in caplog.text
    assert trainer.state.global_step == 0
    stored = DualLoraModel.from_pretrained(whole, backbone=make_idefics3())
    own, wanted = weights(trainer.dual_model), weights(stored)
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)
    longer = make_trainer(tmp_path / "run", records, max_steps=6)
    longer.train(resume_from_checkpoint=checkpoint_to_resume(tmp_path / "run", "true"))
    assert longer.state.global_step == 6


def test_resuming_a_finished_run_changes_no_file_and_keeps_its_gate(
    unbroken: tuple[Path, Any], tmp_path: Path
) -> None:
    records = unbroken[1]
    first = make_trainer(tmp_path / "run", records)
    train_and_save(first, tmp_path / "run", {"the": "settings"})
    model = DualLoraModel.from_pretrained(tmp_path / "run", backbone=make_idefics3())
    gate = Gate(model.hidden_size, 4)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[QUERY_SIDE] = gate
    save_decision(model, tmp_path / "run")
    before = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    again = make_trainer(tmp_path / "run", records, resume_from_checkpoint="true")
    train_and_save(again, tmp_path / "run", {"other": "settings"})
    assert {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()} == before
    # If the model did not get as far as its folder, it is saved from the checkpoint.
    (tmp_path / "run" / "embedding" / "adapter_model.safetensors").unlink()
    train_and_save(again, tmp_path / "run", {"other": "settings"})
    found = DualLoraModel.from_pretrained(tmp_path / "run", backbone=make_idefics3())
    own, wanted = weights(found), weights(first.dual_model)
    assert all(torch.equal(own[key], wanted[key]) for key in wanted)


def test_a_loss_that_is_not_finite_ends_the_run_and_is_never_saved(
    unbroken: tuple[Path, Any], tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path / "run", unbroken[1])
    adapter = adapter_parameters(trainer.dual_model.peft_model, EMBEDDING_ADAPTER)
    name, broken = next((n, p) for n, p in adapter.items() if "lora_B" in n)
    with torch.no_grad():
        broken[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="step 1: loss = nan, expected a finite") as error:
        trainer.train()
    assert name in str(error.value)
    assert "1 trained tensors are not finite" in str(error.value)
    assert not (tmp_path / "run").exists() or newest_whole(tmp_path / "run") is None


def test_a_model_that_cannot_be_saved_leaves_the_one_that_was_there(tmp_path: Path) -> None:
    first = small_model()
    first.save_pretrained(tmp_path)
    second = small_model(seed=1)
    with torch.no_grad():
        next(iter(adapter_parameters(second.peft_model, EMBEDDING_ADAPTER).values())).fill_(
            float("inf")
        )
    with pytest.raises(FloatingPointError, match=r"adapter 'embedding': 1 of \d+ tensors hold NaN"):
        second.save_pretrained(tmp_path)
    stored = weights(DualLoraModel.from_pretrained(tmp_path, backbone=make_idefics3()))
    assert all(torch.equal(stored[key], value) for key, value in weights(first).items())


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 1), (2, 4)])
def test_a_finished_run_of_epochs_or_of_a_part_of_one_is_left_alone(
    unbroken: tuple[Path, Any], tmp_path: Path, epochs: float, steps: int
) -> None:
    records, run = unbroken[1], tmp_path / "run"
    settings = {"max_steps": -1, "num_train_epochs": epochs, "save_steps": 1}
    first = make_trainer(run, records, **settings)
    train_and_save(first, run, {})
    assert first.state.global_step == steps
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    again = make_trainer(run, records, resume_from_checkpoint="true", **settings)
    train_and_save(again, run, {})
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before
    # A longer run goes on.
    settings["num_train_epochs"] = epochs * 2
    longer = make_trainer(run, records, resume_from_checkpoint="true", **settings)
    train_and_save(longer, run, {})
    assert longer.state.global_step == 2 * steps
