"""Models go to a hub and come back by name; the hub is a server on loopback, no network is used."""

import json
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_hub import MODEL_FILES as FILES
from local_hub import TOKEN, LocalHub
from sentence_transformers import SentenceTransformer
from tiny_backbones import awaken

from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.model_card import write_card
from twn_rl.modeling.publishing import push_folder
from twn_rl.runtime.whole_files import write_json

TEXTS = ["which object is above the camel", "camel"]


def small_model(backbone: Path = BACKBONE_DIR) -> DualLoraModel:
    rank = LoraSettings(r=1, alpha=2)
    settings: dict[str, Any] = {"reasoning_lora": rank, "embedding_lora": rank}
    model = DualLoraModel.from_backbone(str(backbone), TwnConfig(max_think_tokens=4, **settings))
    awaken(model)
    return model.eval()


def test_a_model_is_pushed_with_a_card_and_comes_back_by_name(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = ThinkingEmbedder(small_model(), prompts={"query": "find the name"})
    expected = ours.encode_query(TEXTS, think="never")
    address = ours.push_to_hub("somebody/tiny", token=TOKEN, train_datasets=["my questions"])
    assert address.startswith(f"{hub.url}/somebody/tiny/commit/")
    files = hub.repositories["somebody/tiny"]["main"]
    assert set(files) == FILES
    assert b"my questions" in files["README.md"]
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert str(BACKBONE_DIR).encode() not in content, name

    back = ThinkingEmbedder.from_pretrained("somebody/tiny", device="cpu")
    np.testing.assert_array_equal(back.encode_query(TEXTS, think="never"), expected)
    theirs: Any = SentenceTransformer("somebody/tiny", device="cpu")
    np.testing.assert_array_equal(theirs.encode_query(TEXTS, think="never"), expected)

    before = len(hub.requests)
    cached = ThinkingEmbedder.from_pretrained("somebody/tiny", local_files_only=True, device="cpu")
    np.testing.assert_array_equal(cached.encode_query(TEXTS, think="never"), expected)
    assert len(hub.requests) == before, "nobody is asked"
    with pytest.raises(FileNotFoundError, match="somebody/tiny' is no folder here"):
        ThinkingEmbedder.from_pretrained(
            "somebody/tiny", local_files_only=True, cache_folder=tmp_path / "empty"
        )


def test_revisions_are_loaded_by_name_and_by_commit(hub: LocalHub, tmp_path: Path) -> None:
    first, second = ThinkingEmbedder(small_model()), ThinkingEmbedder(small_model())
    awaken(second.model, seed=1)
    commit = first.push_to_hub("somebody/tiny", token=TOKEN).rpartition("/")[2]
    second.push_to_hub("somebody/tiny", token=TOKEN, revision="better", exist_ok=True)
    for revision, embedder in ((None, first), (commit, first), ("better", second)):
        loaded = ThinkingEmbedder.from_pretrained(
            "somebody/tiny", revision=revision, device="cpu", cache_folder=tmp_path / "own"
        )
        np.testing.assert_array_equal(loaded.encode(TEXTS), embedder.encode(TEXTS))
    assert (tmp_path / "own" / "models--somebody--tiny").is_dir()
    with pytest.raises(FileNotFoundError, match="at revision 'gone' it cannot be had"):
        ThinkingEmbedder.from_pretrained("somebody/tiny", revision="gone")


def test_what_the_hub_refuses_is_told_in_one_message(hub: LocalHub) -> None:
    model = ThinkingEmbedder(small_model())
    with pytest.raises(OSError, match=r"cannot be pushed to 'somebody/tiny'.*token that may write"):
        model.push_to_hub("somebody/tiny", token="hf_wrong")
    with pytest.raises(
        FileNotFoundError, match="'somebody/gone' is no folder here, and as a model"
    ):
        ThinkingEmbedder.from_pretrained("somebody/gone")
    with pytest.raises(ValueError, match="safe_serialization = False; expected True"):
        model.push_to_hub("somebody/tiny", token=TOKEN, safe_serialization=False)
    model.push_to_hub("somebody/tiny", token=TOKEN)
    with pytest.raises(OSError, match="cannot be pushed"):
        model.push_to_hub("somebody/tiny", token=TOKEN)  # exist_ok is False, as theirs


def test_a_path_that_is_missing_is_not_looked_for_on_the_hub(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    for path in ("outputs/grpo", "./gone/grpo", str(tmp_path / "gone"), "gone"):
        with pytest.raises(FileNotFoundError, match="does not exist; expected a folder written by"):
            ThinkingEmbedder.from_pretrained(path)
    assert not hub.requests


def test_only_the_model_of_a_run_is_pushed_and_a_card_that_is_there_stays(
    hub: LocalHub, tmp_path: Path
) -> None:
    backbone, run = tmp_path / "far" / "backbone", tmp_path / "run"
    shutil.copytree(BACKBONE_DIR, backbone)
    small_model(backbone).save_pretrained(run)
    for name in ("run.yaml", "training_args.bin", "metrics.jsonl", "checkpoint-2/optimizer.pt"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_text(str(tmp_path))
    push_folder(run, "somebody/run", token=TOKEN)
    files = hub.repositories["somebody/run"]["main"]
    assert set(files) == FILES - {"README.md"}
    assert json.loads(files["twn_config.json"])["backbone"] == "./backbone"
    assert json.loads(files["embedding/adapter_config.json"])["base_model_name_or_path"] == (
        "./backbone"
    )
    with pytest.raises(FileNotFoundError, match="put it back, or pass backbone="):
        ThinkingEmbedder.from_pretrained("somebody/run")
    back = ThinkingEmbedder.from_pretrained("somebody/run", backbone=backbone, device="cpu")
    np.testing.assert_array_equal(
        back.encode(TEXTS), ThinkingEmbedder.from_pretrained(run, device="cpu").encode(TEXTS)
    )
    (run / "README.md").write_text("mine")
    push_folder(run, "somebody/run", token=TOKEN)
    write_card(run)
    assert (run / "README.md").read_text() == "mine", "a card of somebody else is kept"
    back.push_to_hub("somebody/run", token=TOKEN, exist_ok=True)
    assert hub.repositories["somebody/run"]["main"]["README.md"] == b"mine"
    back.push_to_hub("somebody/run", token=TOKEN, exist_ok=True, replace_model_card=True)
    assert b"# somebody/run" in hub.repositories["somebody/run"]["main"]["README.md"]


def test_sentence_transformers_pushes_the_same_files_with_our_card(
    hub: LocalHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone, run, aside = tmp_path / "far" / "backbone", tmp_path / "run", tmp_path / "aside"
    shutil.copytree(BACKBONE_DIR, backbone)
    small_model(backbone).save_pretrained(run)
    write_card(run)
    theirs: Any = SentenceTransformer(str(run), device="cpu")
    aside.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(aside))  # where their push writes what it uploads
    theirs.push_to_hub("somebody/theirs", token=TOKEN)
    files = hub.repositories["somebody/theirs"]["main"]
    assert set(files) == FILES
    assert files["README.md"] == (run / "README.md").read_bytes()
    assert json.loads(files["twn_config.json"])["backbone"] == "./backbone"
    assert not any(b"far" in files[name] for name in FILES if name.endswith(".json"))


def test_the_card_says_what_the_files_beside_it_say(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "run.yaml").write_text(
        "EmbedGRPOConfig: {}\nDataArguments: {train_file: /x/t.jsonl}\n"
        "GrpoScriptArguments: {warm_start: /x/warm}\n"
    )
    cell = "test/all/auto"
    metrics = {f"{cell}/hit@1": 0.678, f"{cell}/hit@1_low": 0.649, f"{cell}/hit@1_high": 0.708}
    metrics |= {
        f"{cell}/num_queries": 1000,
        f"{cell}/think_rate": 0.81,
        f"{cell}/think_tokens": 6.99,
    }
    (tmp_path / "evaluation").mkdir()
    write_json(tmp_path / "evaluation" / "metrics.json", metrics)
    write_json(tmp_path / "evaluation" / "environment.json", {"git_commit": "abc123-dirty"})
    assert write_card(tmp_path, name="somebody/tiny")
    card = (tmp_path / "README.md").read_text()
    for said in (
        "| Method | GRPO on the thoughts",
        "| Backbone | `twn_rl/demo/backbone` |",
        "| Went on from | `warm` |",
        "| Data | t.jsonl |",
        "| test | auto | 67.8 [64.9, 70.8] | 1000 | 0.81 | 7.0 |",
        "another seed would change it is not in there",
        "abc123-dirty",
        'ThinkingEmbedder.from_pretrained("somebody/tiny")',
        "| Licence | not chosen",
        "## Limits",
    ):
        assert said in card, said
    assert "/x/" not in card
    blocks = re.findall(r"```python\n(.*?)```", card, re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:  # the code of the card runs on the folder itself
        names: dict[str, Any] = {}
        exec(block.replace("somebody/tiny", str(tmp_path)), names)
        assert names["vectors"].shape == (1, model.hidden_size)
