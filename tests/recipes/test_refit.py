"""After RL one adapter learns alone: the embedding adapter reads what the policy writes now."""

import json
from pathlib import Path
from typing import Any

import pytest
from made_records import picture_records
from short_runs import SHORT_RUN, moved, weights

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import eval_embed, sft_embed
from twn_rl.training.sft import SftConfig


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("refit")
    (folder / "records").mkdir()
    picture_records(folder / "records")
    return train(folder, "sft")


def train(folder: Path, name: str, *, script: dict[str, Any] | None = None, **own: Any) -> Path:
    """Train two steps on a few pictures."""
    settings: dict[str, Any] = {**SHORT_RUN, "max_steps": 2, "per_device_train_batch_size": 2}
    settings |= {"output_dir": str(folder / name), "logging_steps": 1, **own}
    model = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=4)
    files = DataArguments(train_file=str(folder / "records" / "records.jsonl"))
    chosen = sft_embed.SftScriptArguments(**(script or {}))
    return sft_embed.main(chosen, model, files, SftConfig(**settings))


@pytest.mark.parametrize("adapter", ["embedding", "reasoning"])
def test_one_adapter_is_trained_and_the_other_stays_to_the_bit(first: Path, adapter: str) -> None:
    script = {"checkpoint": str(first), "train_adapters": adapter}
    own = {"self_written_from": 0.0, "self_written_share": 1.0} if adapter == "embedding" else {}
    output = train(first.parent, adapter, script=script, **own)
    before, after = (weights(DualLoraModel.from_pretrained(model)) for model in (first, output))
    key = {"embedding": EMBEDDING_ADAPTER, "reasoning": REASONING_ADAPTER}[adapter]
    own_names = {name for name in before if "lora_" in name and f".{key}." in name}
    changed = moved(before, after)
    assert own_names
    assert own_names <= changed
    assert all(f".{key}" in name for name in changed)
    text = (output / "metrics.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.splitlines()]
    trained = [row for row in rows if "loss" in row]
    assert len(trained) == 2
    # Its own thoughts, and no token loss; or the teacher's, and no vectors.
    is_refit = adapter == "embedding"
    assert all(("self_written_malformed_ratio" in row) == is_refit for row in trained)
    assert all(("loss_no_think" in row) == is_refit for row in trained)
    assert not is_refit or all(row.get("loss_token", 0.0) == 0.0 for row in trained)
    card = (output / "README.md").read_text(encoding="utf-8")
    assert f"| Method | the {adapter} adapter alone" in card
    assert "| Went on from | `sft` |" in card
    assert "Went on from" not in (first / "README.md").read_text(encoding="utf-8")
    drawn = eval_embed.learning_curves(eval_embed.EvalScriptArguments(model=str(output)))
    assert list(drawn) == ["warm start", f"{adapter} alone"]
    beside = eval_embed.EvalScriptArguments(model=str(first), before=str(output))
    names = [f"before: {name}" for name in drawn]
    assert list(eval_embed.learning_curves(beside)) == [*names, "warm start"]
    assert list(drawn.values()) == [model / "metrics.jsonl" for model in (first, output)]
