"""A model's folder: one model or none, on the backbone it was trained on, damage named."""

import itertools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from short_runs import small_model, weights
from tiny_backbones import make_idefics3, make_llama
from transformers import AutoModelForImageTextToText

from twn_rl.modeling import checkpoint
from twn_rl.modeling.backbone import Backbone, load_backbone
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.gate_files import GATE_FILE
from twn_rl.modeling.model import DualLoraModel

ADAPTERS = ("reasoning/adapter_model.safetensors", "embedding/adapter_model.safetensors")


def load(path: Path, **settings: Any) -> DualLoraModel:
    return DualLoraModel.from_pretrained(path, backbone=make_idefics3(), **settings)


def is_same(one: DualLoraModel, other: DualLoraModel) -> bool:
    a, b = weights(one), weights(other)
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def change_settings(path: Path, **settings: Any) -> None:
    file = path / "twn_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))


def give_gate(model: DualLoraModel) -> None:
    gate = Gate(model.hidden_size, 4)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[QUERY_SIDE] = gate
    model.config.gate_threshold = 0.5


def randomise(backbone: Backbone) -> None:
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.copy_(torch.randn_like(parameter))


def redraw_one_layer(backbone: Backbone) -> None:
    with torch.no_grad():
        layers = backbone.model.get_decoder().layers
        assert isinstance(layers, torch.nn.ModuleList)
        weight = next(p for name, p in layers[1].named_parameters() if "up_proj" in name)
        weight.copy_(torch.randn_like(weight))


def train_a_little(backbone: Backbone) -> None:
    with torch.no_grad():
        for parameter in backbone.model.parameters():
            parameter.add_(1e-3 * torch.randn_like(parameter))


@pytest.mark.parametrize("change", [randomise, redraw_one_layer, train_a_little])
def test_a_model_is_refused_on_another_backbone_unless_that_is_accepted(
    change: Callable[[Backbone], None], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    small_model().save_pretrained(tmp_path)
    other = make_idefics3()
    change(other)
    with pytest.raises(ValueError, match=r"was trained on another backbone \(weights \w{12}\)"):
        DualLoraModel.from_pretrained(tmp_path, backbone=other)
    other = make_idefics3()
    change(other)
    accepted = DualLoraModel.from_pretrained(tmp_path, backbone=other, accept_other_backbone=True)
    assert "trained on another backbone" in caplog.text
    # From here on it is a model of that backbone.
    accepted.save_pretrained(tmp_path / "again")
    with pytest.raises(ValueError, match="another backbone"):
        load(tmp_path / "again")


def test_a_backbone_may_be_loaded_in_another_precision(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    backbone = make_idefics3()
    backbone.model.bfloat16()
    assert DualLoraModel.from_pretrained(tmp_path, backbone=backbone).config.backbone_fingerprint


def test_a_model_that_names_no_backbone_weights_loads_with_one_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "twn_config.json").read_text())
    for name in (
        "backbone_fingerprint",
        "digests",
        "settings_digest",
    ):  # as older versions wrote it
        del settings[name]
    (tmp_path / "twn_config.json").write_text(json.dumps(settings))
    assert is_same(load(tmp_path), model)
    warnings = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert len(warnings) == 1
    assert "does not say which backbone it was trained on" in caplog.text


def test_what_tells_a_backbone_is_as_checkpoints_hold_it() -> None:
    config = TwnConfig(
        num_readout_tokens=3, reasoning_lora=LoraSettings(r=2), embedding_lora=LoraSettings(r=3)
    )
    model = DualLoraModel.from_backbone(make_llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
    assert (
        Fingerprints(model).frozen
        == "ec34c432583c328210cff300ebe2435acf8fd7412e0a52a9ca338d453c22e068"
    )


@pytest.fixture(scope="module")
def stored_backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    backbone = make_idefics3()
    backbone.model.save_pretrained(folder, max_shard_size="40KB")
    backbone.processor.save_pretrained(folder)
    assert len(list(folder.glob("*.safetensors"))) > 1
    return folder


def drop_weight(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    tensors = load_file(file)
    dropped = next(name for name in tensors if "proj" in name)
    del tensors[dropped]
    save_file(tensors, file, metadata={"format": "pt"})
    return dropped


def cut_file(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-100])
    return str(file)


def spoil_header(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    content = bytearray(file.read_bytes())
    content[:8] = b"\xff" * 8
    file.write_bytes(content)
    return str(file)


def empty_file(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.write_bytes(b"")
    return str(file)


def remove_file(folder: Path) -> str:
    file = sorted(folder.glob("*.safetensors"))[0]
    file.unlink()
    return file.name


@pytest.mark.parametrize("damage", [drop_weight, cut_file, spoil_header, empty_file, remove_file])
def test_a_damaged_backbone_names_what_is_damaged(
    damage: Callable[[Path], str], stored_backbone: Path, tmp_path: Path
) -> None:
    shutil.copytree(stored_backbone, tmp_path / "backbone")
    named = damage(tmp_path / "backbone")
    with pytest.raises((ValueError, OSError)) as error:
        load_backbone(tmp_path / "backbone")
    assert named in str(error.value)
    assert str(tmp_path / "backbone") in str(error.value)


def test_a_whole_backbone_in_shards_loads(stored_backbone: Path) -> None:
    loaded = load_backbone(stored_backbone)
    wanted = AutoModelForImageTextToText.from_pretrained(stored_backbone).state_dict()
    own = loaded.model.state_dict()
    assert all(torch.equal(own[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("position", [0.3, 0.9])
def test_one_changed_byte_of_an_adapter_is_noticed(
    name: str, position: float, tmp_path: Path
) -> None:
    small_model().save_pretrained(tmp_path)
    content = bytearray((tmp_path / name).read_bytes())
    content[int(position * len(content))] ^= 1
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is not what was saved with twn_config.json"):
        load(tmp_path)


def test_files_of_two_models_are_no_model(tmp_path: Path) -> None:
    for seed in (0, 1):
        small_model(seed).save_pretrained(tmp_path / str(seed))
    shutil.copy2(tmp_path / "1" / ADAPTERS[1], tmp_path / "0" / ADAPTERS[1])
    with pytest.raises(ValueError, match=r"embedding/adapter_model\.safetensors is not what was"):
        load(tmp_path / "0")
    change_settings(tmp_path / "0", digests={})  # on purpose
    load(tmp_path / "0")


def test_a_save_cut_short_at_any_point_leaves_the_old_model_or_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = small_model(0), small_model(1)
    give_gate(old)
    seen, last = set(), 0
    link = checkpoint.os.link
    for last in itertools.count():
        folder, done, is_cut = tmp_path / str(last), 0, False
        old.save_pretrained(folder)

        def linked(*names: Any, last: int = last) -> None:
            nonlocal done
            done += 1
            if done > last:
                raise KeyboardInterrupt
            link(*names)

        with monkeypatch.context() as patched:
            patched.setattr(checkpoint.os, "link", linked)
            try:
                new.save_pretrained(folder)
            except KeyboardInterrupt:
                is_cut = True
        found = load(folder)
        assert is_same(found, old) != is_same(found, new)
        seen.add(is_same(found, new))
        assert set(found.gates) == (set() if is_same(found, new) else {QUERY_SIDE})
        new.save_pretrained(folder)
        assert is_same(load(folder), new)
        assert not (folder / ".saving").exists()
        assert not (folder / GATE_FILE).exists()
        if not is_cut:
            break
    assert seen == {False, True}
    assert last > len(ADAPTERS) + 2  # all of its files have been the last one once


def test_gate_and_threshold_are_replaced_as_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = small_model()
    give_gate(model)
    model.save_pretrained(tmp_path)
    caplog.set_level(logging.WARNING)
    link = checkpoint.os.link

    def cut_before_settings(source: Path, target: Path) -> None:
        if source.name == "twn_config.json":
            raise KeyboardInterrupt
        link(source, target)

    give_gate(model)
    model.config.gate_threshold = 0.25
    monkeypatch.setattr(checkpoint.os, "link", cut_before_settings)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save_decision(model, tmp_path)
    found = load(tmp_path)
    assert "a save was cut short" in caplog.text
    assert found.config.gate_threshold == 0.25
    stored, own = (m.gates[QUERY_SIDE].state_dict() for m in (found, model))
    assert all(torch.equal(stored[key], own[key]) for key in own)
    monkeypatch.undo()
    checkpoint.save_decision(model, tmp_path)
    assert not (tmp_path / ".saving").exists()
    assert is_same(load(tmp_path), model)
