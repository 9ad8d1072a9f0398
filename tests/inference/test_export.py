"""Exports are loaded by the code in their README and do what the checkpoint does."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_records import picture
from tiny_backbones import awaken, make_llama

from twn_rl import cli
from twn_rl.data.record import Item
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.export import EXPORTS, export
from twn_rl.modeling.config import CONFIG_FILE, LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

SMALL: dict[str, Any] = {
    "reasoning_lora": LoraSettings(r=2, alpha=4),
    "embedding_lora": LoraSettings(r=3, alpha=6),
    "max_think_tokens": 6,
}
TEXT = "which object is above the camel"


@pytest.fixture(params=["vlm, Q = 4", "vlm, Q = 1, system prompt", "lm, Q = 2"])
def checkpoint(request: Any, tmp_path: Path) -> Path:
    """Return the folder of a model whose adapters both change what the backbone does."""
    from twn_rl.data.chat import Renderer

    settings: dict[str, Any] = {"num_readout_tokens": 4}
    backbone = tmp_path / "backbone"
    if request.param.startswith("lm"):
        built = make_llama()
        built.model.save_pretrained(backbone)
        built.processor.save_pretrained(backbone)
        settings = {"num_readout_tokens": 2}
    else:
        shutil.copytree(BACKBONE_DIR, backbone)
    if "system" in request.param:
        settings = {"num_readout_tokens": 1, "renderer": Renderer(system_prompt="find the tree")}
    model = DualLoraModel.from_backbone(backbone, TwnConfig(**SMALL, **settings))
    awaken(model)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def names_of_card(folder: Path) -> dict[str, Any]:
    """Run the code in an export's README there and return its names."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert "[[" not in code.replace("[[{", "")
    names: dict[str, Any] = {}
    exec(compile(code.replace('"."', repr(str(folder))), "README.md", "exec"), names)
    return names


def contents(model: DualLoraModel) -> list[tuple[Any, Any]]:
    """Return (content as the README has it, our item) of some inputs."""
    if not model.backbone.is_multimodal:
        return [(text, text) for text in ("camel", "row above the pizza")]
    image = picture(3, 64, 64)
    return [
        ([{"type": "text", "text": TEXT}], TEXT),
        ([{"type": "image", "image": image}], Item(images=(image,))),
        (
            [{"type": "image", "image": image}, {"type": "text", "text": f"find\n{TEXT}"}],
            Item(instruction="find", text=TEXT, images=(image,)),
        ),
    ]


def test_merged_vectors_are_those_of_the_model_without_thinking(
    checkpoint: Path, tmp_path: Path
) -> None:
    folder = export(checkpoint, tmp_path / "merged", "merged")
    embed = names_of_card(folder)["embed"]
    embedder = ThinkingEmbedder.from_pretrained(checkpoint, device="cpu")
    bare = np.zeros(embedder.get_embedding_dimension())
    for content, item in contents(embedder.model):
        found = embed(content).numpy()
        np.testing.assert_allclose(found, embedder.encode_document(item), atol=1e-5)
        assert np.abs(found - bare).max() > 1e-3
        bare = found
    assert not (folder / "adapter_config.json").exists()


def test_the_reasoner_writes_the_same_greedy_thoughts(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "reasoner", "reasoner")
    think = names_of_card(folder)["think"]
    model = DualLoraModel.from_pretrained(checkpoint)
    untrained = DualLoraModel.from_backbone(checkpoint.parent / "backbone", TwnConfig(**SMALL))
    differ = []
    for content, item in contents(model):
        item = Item(text=item) if isinstance(item, str) else item
        (ids,), (bare,) = (m.reason(m.collate([item])) for m in (model, untrained))
        assert think(content) == model.tokenizer.decode(ids, skip_special_tokens=False)
        differ.append(ids != bare)
    assert any(differ)  # the adapter was merged


def test_the_whole_export_loads_where_nothing_else_is(checkpoint: Path, tmp_path: Path) -> None:
    folder = export(checkpoint, tmp_path / "whole", "sentence-transformers")
    expected = ThinkingEmbedder.from_pretrained(checkpoint, device="cpu").encode(TEXT)
    moved = shutil.move(folder, tmp_path / "elsewhere")
    shutil.rmtree(checkpoint.parent / "backbone")
    shutil.rmtree(checkpoint)
    model = names_of_card(Path(moved))["model"]
    np.testing.assert_array_equal(model.encode(TEXT), expected)
    assert str(tmp_path).encode() not in (Path(moved) / CONFIG_FILE).read_bytes()


def test_forms_that_a_model_cannot_have_are_refused_and_leave_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    detached = TwnConfig(interface="kv_detach", **SMALL)
    DualLoraModel.from_backbone(BACKBONE_DIR, detached).save_pretrained(tmp_path / "model")
    arguments = ["export", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    assert cli.main([*arguments, "--to", "merged"]) == 2
    assert "interface = 'kv_detach': two adapters make its vectors" in caplog.text
    assert not list(tmp_path.glob("*out*"))
    assert cli.main([*arguments, "--to", "reasoner"]) == 0
    assert (tmp_path / "out" / "generation_config.json").is_file()
    assert cli.main([*arguments, "--to", "reasoner"]) == 2
    assert "exists; expected a new folder" in caplog.text
    with pytest.raises(ValueError, match="to = 'gguf'; expected one of"):
        export(tmp_path / "model", tmp_path / "new", "gguf")
    shared = TwnConfig(interface="shared_prefill", **SMALL)
    DualLoraModel.from_backbone(BACKBONE_DIR, shared).save_pretrained(tmp_path / "shared")
    for form in ("merged", "reasoner"):
        with pytest.raises(ValueError, match="'shared_prefill': no adapter reads its prompts"):
            export(tmp_path / "shared", tmp_path / "new", form)
    assert not (tmp_path / "new").exists()
    assert list(EXPORTS) == ["merged", "reasoner", "sentence-transformers"]
    assert torch.is_grad_enabled()
