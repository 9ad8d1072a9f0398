"""`--push_to_hub` of a recipe does what it says: model and card arrive, nothing else does."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from local_hub import MODEL_FILES, TOKEN, LocalHub
from made_records import picture_records
from short_runs import SHORT_RUN

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.recipes import eval_embed, sft_embed
from twn_rl.training.sft import SftConfig


def run(folder: Path, **settings: Any) -> Path:
    """Train one step of the warm start on a few pictures."""
    data = folder / "records"
    if not data.exists():
        data.mkdir()
        picture_records(data)
    training: dict[str, Any] = {
        **SHORT_RUN,
        "output_dir": str(folder / "run"),
        "max_steps": 1,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **settings,
    }
    model = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=4)
    files = DataArguments(train_file=str(data / "records.jsonl"))
    script = sft_embed.SftScriptArguments()
    return sft_embed.main(script, model, files, SftConfig(**training))


def test_a_run_pushes_its_checkpoints_and_at_the_end_its_model_with_a_card(
    hub: LocalHub, tmp_path: Path
) -> None:
    to = {"push_to_hub": True, "hub_model_id": "somebody/run", "hub_token": TOKEN}
    output = run(tmp_path, **to, license="apache-2.0")
    assert hub.messages == ["Step 1", "End of training"]
    files = hub.repositories["somebody/run"]["main"]
    assert set(files) == MODEL_FILES
    card = files["README.md"].decode()
    assert "# somebody/run" in card
    assert "supervised warm start" in card
    assert "| Data | records.jsonl |" in card
    assert "\nlicense: apache-2.0\n" in card
    assert "| Licence | apache-2.0 |" in card
    for name, content in files.items():
        assert str(tmp_path).encode() not in content, name
        assert TOKEN.encode() not in content, name
    loaded = [
        ThinkingEmbedder.from_pretrained(name, device="cpu") for name in ("somebody/run", output)
    ]
    vectors = [embedder.encode(["camel", "pizza"]) for embedder in loaded]
    np.testing.assert_array_equal(*vectors)


def test_a_run_with_a_wrong_token_stops_before_it_trains(hub: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(OSError, match="401"):
        run(tmp_path, push_to_hub=True, hub_model_id="somebody/run", hub_token="hf_wrong")
    assert not hub.messages
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_run_that_pushes_nothing_has_a_card_and_asks_nobody(
    hub: LocalHub, tmp_path: Path
) -> None:
    output = run(tmp_path)
    assert "# run" in (output / "README.md").read_text("utf-8")
    assert not hub.requests


def test_results_of_a_model_of_the_hub_make_no_folder_of_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "grpo").mkdir(parents=True)
    for model, results in (
        ("somebody/run", "outputs/run/evaluation"),
        ("runs/grpo", "runs/grpo/evaluation"),
        ("runs/absent", "runs/absent/evaluation"),
    ):
        assert eval_embed.EvalScriptArguments(model=model).output == Path(results)
