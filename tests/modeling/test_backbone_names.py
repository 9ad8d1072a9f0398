"""A checkpoint names its backbone so that it is found on any machine, and names no machine."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.backbone_names import found_name, plain_name, stored_name
from twn_rl.modeling.config import CONFIG_FILE, LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

SMALL: dict[str, Any] = {
    "reasoning_lora": LoraSettings(r=1, alpha=2),
    "embedding_lora": LoraSettings(r=1, alpha=2),
}


def test_names_are_read_as_they_were_written(tmp_path: Path) -> None:
    backbone, model = tmp_path / "backbones" / "tiny", tmp_path / "runs" / "a"
    backbone.mkdir(parents=True)
    inside = model / "backbone"
    inside.mkdir(parents=True)
    cases = [
        ("Qwen/Qwen3-VL-2B-Instruct", "Qwen/Qwen3-VL-2B-Instruct"),
        ("", ""),
        (str(BACKBONE_DIR), "twn_rl/demo/backbone"),
        (str(backbone), "../../backbones/tiny"),
        (str(inside), "./backbone"),
    ]
    for name, stored in cases:
        assert stored_name(name, model) == stored
        assert found_name(stored, model) == name
    assert found_name("/elsewhere/lib/twn_rl/demo/backbone", model) == str(BACKBONE_DIR)
    assert plain_name(str(BACKBONE_DIR)) == "twn_rl/demo/backbone"


def test_a_relative_folder_is_found_from_another_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tiny").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    config = TwnConfig(backbone="tiny")
    (tmp_path / "model").mkdir()
    config.save("model")
    assert json.loads((tmp_path / "model" / CONFIG_FILE).read_text())["backbone"] == "../tiny"
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert TwnConfig.load(tmp_path / "model").backbone == str(tmp_path / "tiny")


def test_no_file_of_a_model_holds_a_path_of_this_machine(tmp_path: Path) -> None:
    shutil.copytree(BACKBONE_DIR, tmp_path / "backbones" / "tiny")
    for name in (str(BACKBONE_DIR), str(tmp_path / "backbones" / "tiny")):
        model = DualLoraModel.from_backbone(name, TwnConfig(**SMALL))
        folder = tmp_path / "run" / "model"
        model.save_pretrained(folder)
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert len(files) >= 7
        for path in files:
            held = path.read_bytes()
            for secret in (str(tmp_path), str(BACKBONE_DIR), os.getcwd()):
                assert secret.encode() not in held, f"{path.name} names {secret}"
        loaded = DualLoraModel.from_pretrained(folder)
        assert loaded.config.backbone == name
        tokens = {"input_ids": torch.tensor([[5, 6, 7]])}
        expected = model.backbone.model(**tokens).logits
        torch.testing.assert_close(loaded.backbone.model(**tokens).logits, expected)


def test_a_backbone_that_is_gone_is_named_and_can_be_given(tmp_path: Path) -> None:
    shutil.copytree(BACKBONE_DIR, tmp_path / "tiny")
    DualLoraModel.from_backbone(tmp_path / "tiny", TwnConfig(**SMALL)).save_pretrained(
        tmp_path / "model"
    )
    shutil.rmtree(tmp_path / "tiny")
    with pytest.raises(FileNotFoundError, match=r"tiny, which does not exist.*pass backbone="):
        DualLoraModel.from_pretrained(tmp_path / "model")
    model = DualLoraModel.from_pretrained(tmp_path / "model", backbone=BACKBONE_DIR)
    assert model.config.backbone == str(BACKBONE_DIR)
