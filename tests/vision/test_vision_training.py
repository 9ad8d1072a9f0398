"""On every family with its real processor: the warm start, GRPO and the gate train what they say.

Skipped where the extra `vision` is missing; `make test-vision` runs it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torchvision", reason="needs the extra `vision`: run `make test-vision`")

from picture_rollouts import assert_logps_are_plain, grpo_trainer, mixed_records
from short_runs import SHORT_RUN, moved, weights
from vision_families import VISION_BACKBONES, make_vlm

from twn_rl.data.record_files import RecordSet
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.training.sft import SftConfig, SftTrainer

families = pytest.mark.parametrize("name", VISION_BACKBONES)
interfaces = pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    folder = tmp_path / "records"
    folder.mkdir()
    return mixed_records(folder)


@families
def test_grpos_log_probabilities_are_those_of_plain_forwards(
    name: str, records: RecordSet, tmp_path: Path
) -> None:
    assert_logps_are_plain(lambda: make_vlm(name), records, tmp_path)


@families
@interfaces
def test_only_the_reasoning_adapter_learns_from_rewards(
    name: str, interface: str, records: RecordSet, tmp_path: Path
) -> None:
    model = make_vlm(name, interface=interface)
    before = weights(model)
    trainer = grpo_trainer(model, records, tmp_path)
    trainer.train()
    changed = moved(before, weights(model))
    assert changed
    assert changed <= set(adapter_parameters(model.peft_model, REASONING_ADAPTER))
    assert any("loss" in entry for entry in trainer.state.log_history)


@families
@interfaces
def test_the_warm_start_lowers_its_losses(
    name: str, interface: str, records: RecordSet, tmp_path: Path
) -> None:
    model = make_vlm(name, interface=interface, max_think_tokens=6)
    config = SftConfig(
        output_dir=str(tmp_path / "run"),
        temperature=0.1,
        num_hard_negatives=1,
        contrastive_from=0.0,
        self_written_from=1.0,
        per_device_train_batch_size=4,
        max_steps=8,
        **SHORT_RUN,
    )
    trainer = SftTrainer(model, config, records)
    trainer.train()
    for loss in ("loss_token", "loss_no_think", "loss_think"):
        found = [entry[loss] for entry in trainer.state.log_history if loss in entry]
        assert len(found) == 8, loss
        assert sum(found[-2:]) < sum(found[:2]), (loss, found)
