"""The gate's recipe under a real launch: one process, two processes, again, and its artefacts."""

import csv
import json
import logging
from pathlib import Path

import pytest
import torch
from launching import ROOT, TORCHRUN, launch

from twn_rl.data.record import Item
from twn_rl.launch.arguments import ModelArguments
from twn_rl.modeling.gate import DOCUMENT_SIDE, QUERY_SIDE, Gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.gate_labels import read_labels

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
FLAGS = ["--demo_scale=0.02", "--max_examples=40", "--batch_size=8", "--demo_dir=data"]


def fit(folder: Path, config: str | None, *more: str) -> Path:
    """Run the recipe on an untrained model in `folder` and return the model's folder."""
    path = folder / "model"
    if not path.exists():
        arguments = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6)
        arguments.build(0).save_pretrained(path)
    done = launch("gate_embed.py", [f"--model={path}", *FLAGS, *more], config=config, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return path


def test_two_processes_fit_the_gate_that_one_fits(tmp_path: Path, caplog) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    sides = ["--sides", QUERY_SIDE, DOCUMENT_SIDE]
    one = fit(tmp_path / "one", None, *sides)
    two = fit(tmp_path / "two", TORCHRUN, *sides)
    models = [DualLoraModel.from_pretrained(path) for path in (one, two)]
    for side in (QUERY_SIDE, DOCUMENT_SIDE):
        labels = [read_labels(path / "gate" / "labels" / side / "gate") for path in (one, two)]
        assert labels[0].rows == labels[1].rows
        first, second = (model.gates[side].state_dict() for model in models)
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert models[0].config.gate_threshold == models[1].config.gate_threshold is not None
    assert models[0].config.document_gate_threshold is not None

    # Artefacts
    metrics = json.loads((one / "gate" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics[QUERY_SIDE]["chosen"]["threshold"] == models[0].config.gate_threshold
    with (one / "gate" / "curve.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["side"] for row in rows} == {QUERY_SIDE, DOCUMENT_SIDE}
    assert {row["name"] for row in rows} == {"curve", "never", "always", "oracle"}
    assert (one / "gate" / "curve.png").stat().st_size > 1000
    assert "| all | 40 |" in (one / "gate" / "labels.md").read_text(encoding="utf-8")

    # The same command again keeps the labels; another rule takes them as they are.
    shard = one / "gate" / "labels" / QUERY_SIDE / "gate" / "000000.parquet"
    modified = shard.stat().st_mtime_ns
    fit(tmp_path / "one", None, "--think_rate=0")
    assert shard.stat().st_mtime_ns == modified
    refitted = DualLoraModel.from_pretrained(one)
    assert refitted.config.gate_threshold == 1.0
    assert list(refitted.gates) == [QUERY_SIDE, DOCUMENT_SIDE]
    state = refitted.read_out(refitted.read(refitted.prepare(refitted.collate([Item("camel")]))))
    gate = refitted.gates[QUERY_SIDE]
    assert isinstance(gate, Gate)
    assert 0 < float(gate.probability(state)) <= 1

    # Training drops it.
    caplog.set_level(logging.WARNING)
    trained = DualLoraModel.from_pretrained(one, is_trainable=True)
    trained.save_pretrained(tmp_path / "trained")
    assert "gate is dropped" in caplog.text
    assert not (tmp_path / "trained" / "gate.safetensors").exists()


def test_settings_that_cannot_work_end_the_recipe_before_a_model_is_loaded(tmp_path: Path) -> None:
    flags = ["--model=nowhere", "--sides", "both", "--margin=-1"]
    done = launch("gate_embed.py", flags, config=None, cwd=tmp_path)
    assert done.returncode != 0
    assert "sides = ['both']" in done.stderr
    assert "margin = -1" in done.stderr
    assert not (tmp_path / "nowhere").exists()
    assert (ROOT / "recipes" / "configs" / "demo_gate.yaml").is_file()
