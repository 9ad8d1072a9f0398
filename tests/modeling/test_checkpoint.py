"""Checkpoints: exact keys, bit-identical vectors, foreign layouts."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from twn_rl.modeling.adapters import adapter_parameters, use_adapter
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.import_twn import import_twn_release
from twn_rl.modeling.model import DualLoraModel

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
THOUGHT = "<think> camel is top left </think>"


def accept_any_content(model):
    """Do what the message about changed files says."""
    settings = json.loads((model / "twn_config.json").read_text())
    (model / "twn_config.json").write_text(json.dumps({**settings, "digests": {}}))


def _edit(folder, change):
    path = folder / "adapter_model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path)
    if (folder.parent / "twn_config.json").exists():
        accept_any_content(folder.parent)


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_and_thoughts_are_bit_identical_after_a_round_trip(
    make_model, make_backbone, make_items, tmp_path, name, interface
):
    model, items = make_model(name, interface=interface, seed=3), make_items(name)
    model.save_pretrained(tmp_path)
    loaded = DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone(name))
    thoughts = [THOUGHT, *[None] * (len(items) - 1)]
    with torch.no_grad():
        assert torch.equal(
            loaded.embed(loaded.collate(items, thoughts)),
            model.embed(model.collate(items, thoughts)),
        )
    assert loaded.reason(loaded.collate(items)) == model.reason(model.collate(items))
    assert loaded.config == model.config
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


def test_a_model_can_be_loaded_to_train_on(make_model, make_backbone, tmp_path):
    make_model().save_pretrained(tmp_path)
    loaded = DualLoraModel.from_pretrained(
        tmp_path, backbone=make_backbone("idefics3"), is_trainable=True
    )
    trainable = {name for name, p in loaded.peft_model.named_parameters() if p.requires_grad}
    expected = {
        key for name in loaded.peft_model.peft_config
        for key in adapter_parameters(loaded.peft_model, name)
    }  # fmt: skip
    assert trainable == expected
    assert loaded.training


def test_the_backbone_is_found_by_the_name_in_the_config(make_backbone, make_items, tmp_path):
    built = make_backbone("idefics3")
    built.model.save_pretrained(tmp_path / "backbone")
    built.processor.save_pretrained(tmp_path / "backbone")
    model = DualLoraModel.from_backbone(tmp_path / "backbone").eval()
    model.save_pretrained(tmp_path / "model")
    loaded = DualLoraModel.from_pretrained(tmp_path / "model")
    items = make_items("idefics3")
    with torch.no_grad():
        assert torch.equal(loaded.embed(loaded.collate(items)), model.embed(model.collate(items)))


def test_a_checkpoint_without_a_backbone_name_asks_for_one(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"names no backbone.*pass backbone"):
        DualLoraModel.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"twn_config\.json does not exist"):
        DualLoraModel.from_pretrained(tmp_path / "elsewhere")


def test_the_folder_holds_adapters_and_settings_only(make_model, tmp_path):
    make_model().save_pretrained(tmp_path)
    files = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert files == {
        "twn_config.json",
        "reasoning/adapter_config.json",
        "reasoning/adapter_model.safetensors",
        "embedding/adapter_config.json",
        "embedding/adapter_model.safetensors",
        "modules.json",
        "config_sentence_transformers.json",
    }
    rows = [
        k for k in load_file(tmp_path / "embedding/adapter_model.safetensors") if "lora" not in k
    ]
    assert [row.rpartition(".")[2] for row in rows] == ["trainable_tokens_delta"]
    assert {"torch", "transformers", "peft"} <= set(
        json.loads((tmp_path / "twn_config.json").read_text())["versions"]
    )


@pytest.mark.parametrize("folder", ["reasoning", "embedding"])
def test_missing_and_unexpected_keys_are_listed(make_model, make_backbone, tmp_path, folder):
    make_model().save_pretrained(tmp_path)
    key = next(iter(load_file(tmp_path / folder / "adapter_model.safetensors")))

    def rename(weights):
        weights["somewhere.else.lora_A.weight"] = weights.pop(key)

    _edit(tmp_path / folder, rename)
    with pytest.raises(KeyError) as error:
        DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("idefics3"))
    assert f"missing keys ['{key}']" in str(error.value)
    assert "unexpected keys ['somewhere.else.lora_A.weight']" in str(error.value)


def test_another_backbone_family_is_refused_by_its_keys(make_model, make_backbone, tmp_path):
    make_model("idefics3").save_pretrained(tmp_path)
    with pytest.raises(KeyError, match="check that backbone, targets and ranks"):
        DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("qwen3_vl"))


def test_other_shapes_are_named(make_model, make_backbone, tmp_path):
    make_model().save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "twn_config.json").read_text())
    settings["reasoning_lora"]["r"] = 5
    (tmp_path / "twn_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"lora_A\.weight: checkpoint \(2, 32\), model \(5, 32\)"):
        DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("idefics3"))


def test_plain_peft_loads_each_adapter_alone(make_model, make_backbone, make_items, tmp_path):
    model = make_model("qwen3_vl")
    model.save_pretrained(tmp_path)
    batch = model.collate(make_items("qwen3_vl"))
    for folder, name in (("reasoning", "default"), ("embedding", "embedding")):
        plain = PeftModel.from_pretrained(make_backbone("qwen3_vl").model, tmp_path / folder).eval()
        with torch.no_grad(), use_adapter(model.peft_model, name):
            torch.testing.assert_close(plain(**batch).logits, model.peft_model(**batch).logits)


def _write_release(model, path):
    """Write the layout TWN released: no read-out rows in the adapter, queries in a file."""
    model.save_pretrained(path)
    (path / "twn_config.json").unlink()
    rows = {}

    def strip(weights):
        key = next(k for k in weights if k.endswith("trainable_tokens_delta"))
        rows["queries"] = weights.pop(key)
        for name in list(weights):  # another version's idea of what precedes the layers
            weights[name.replace(".language_model.layers", ".layers")] = weights.pop(name)

    _edit(path / "embedding", strip)
    torch.save(rows["queries"], path / "queries.pt")
    torch.save({"0.weight": torch.ones(4, 32), "0.bias": torch.zeros(4)}, path / "gate_mlp.pt")


def test_the_released_layout_is_read(make_model, make_backbone, make_items, tmp_path):
    model, items = make_model("qwen3_vl", interface="kv_detach"), make_items("qwen3_vl")
    _write_release(model, tmp_path)
    imported, gate = import_twn_release(tmp_path, backbone=make_backbone("qwen3_vl"))
    with torch.no_grad():
        assert torch.equal(
            imported.embed(imported.collate(items)), model.embed(model.collate(items))
        )
    assert {key: tuple(value.shape) for key, value in gate.items()} == {
        "0.weight": (4, 32),
        "0.bias": (4,),
    }


def test_a_release_that_cannot_be_read_with_certainty_is_refused(
    make_model, make_backbone, tmp_path
):
    _write_release(make_model("qwen3_vl"), tmp_path)
    torch.save({"a": torch.ones(2, 32), "b": torch.ones(2, 32)}, tmp_path / "queries.pt")
    with pytest.raises(ValueError, match="exactly one tensor"):
        import_twn_release(tmp_path, backbone=make_backbone("qwen3_vl"))
    torch.save(torch.ones(3, 16), tmp_path / "queries.pt")
    with pytest.raises(ValueError, match="width 16; expected the backbone's 32"):
        import_twn_release(tmp_path, backbone=make_backbone("qwen3_vl"))
    (tmp_path / "gate_mlp.pt").unlink()
    with pytest.raises(FileNotFoundError, match=r"gate_mlp\.pt does not exist"):
        import_twn_release(tmp_path, backbone=make_backbone("qwen3_vl"))


class _Payload:
    def __reduce__(self):
        """Be something a pickle could run."""
        return (print, ("ran",))


def test_pickled_code_in_a_release_is_never_run(make_model, make_backbone, tmp_path, capsys):
    _write_release(make_model("qwen3_vl"), tmp_path)
    torch.save(_Payload(), tmp_path / "queries.pt")
    with pytest.raises(Exception, match=r"[Ww]eights"):
        import_twn_release(tmp_path, backbone=make_backbone("qwen3_vl"))
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"num_readout_tokens": 10**6}, r"num_readout_tokens = 1000000, expected in \[1, 1024\]"),
        ({"num_reason_tokens": 10**6}, "num_reason_tokens = 1000000"),
        ({"embedding_lora": {"r": 10**6}}, r"r = 1000000, expected in \[1, 4096\]"),
        ({"max_think_tokens": 10**9}, "max_think_tokens = 1000000000"),
        ({"num_readout_tokens": "four"}, "num_readout_tokens = 'four', expected `int`, got `str`"),
        ({"reasoning_lora": 3}, "reasoning_lora = 3, expected `object`, got `int`"),
        ({"renderer": {"think_open": 3}}, "think_open = 3, expected `str`, got `int`"),
        ({"versions": []}, "versions = .*expected `object`"),
    ],
)
def test_a_config_that_would_hang_or_of_another_type_names_its_field_and_file(
    tmp_path: Path, changes: Any, complaint: str
) -> None:
    (tmp_path / CONFIG_FILE).write_text(json.dumps(changes))
    with pytest.raises(ValueError, match=rf"twn_config\.json: .*{complaint}"):
        TwnConfig.load(tmp_path)
