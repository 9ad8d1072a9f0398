"""One evaluation by two processes: shared inputs, the figures of one, and what a bad input does."""

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from made_records import picture_records
from short_runs import small_model
from torch.multiprocessing.spawn import spawn

from twn_rl.data.record import Item
from twn_rl.data.record_files import load_records
from twn_rl.evaluation import EvaluationSettings, evaluate
from twn_rl.inference.dealt_inputs import encode_dealt
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import EncodeOptions
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import join_processes

MODES = ("never", "always", "auto", "random", "oracle", "sampled", "averaged", "gold", "shuffled")
SETTINGS = EvaluationSettings(
    modes=MODES,
    batch_size=3,
    max_think_tokens=4,
    num_thoughts=2,
    show_progress_bar=False,
)
BAD = 3  # of process 1
QUESTIONS = [Item(text=f"camel {'left ' * row}") for row in range(5)]


def gated_model() -> DualLoraModel:
    """Return a model whose gate says something else of every query."""
    model = small_model()
    torch.manual_seed(0)
    model.gates[QUERY_SIDE] = Gate(model.hidden_size, 4)
    return model


def work(rank: int, folder: Path, port: int, threshold: float) -> None:
    """Evaluate and embed as one of two processes; write down what came of it."""
    named = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    named |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in named.items()})
    processes = join_processes(use_cpu=True)
    embedded: list[int] = []
    encode_ways = ThinkingEmbedder.encode_ways

    def counted(self: ThinkingEmbedder, inputs: Any, *args: Any, **options: Any) -> Any:
        embedded.append(len(inputs))
        return encode_ways(self, inputs, *args, **options)

    ThinkingEmbedder.encode_ways = counted  # type: ignore[method-assign]
    model, records = gated_model(), load_records(folder / "records.jsonl")
    settings = replace(SETTINGS, gate_threshold=threshold)
    found = evaluate(model, records, settings, processes=processes)
    found.save(folder / f"process{rank}")
    told = {"world": dist.get_world_size(), "embedded": embedded, "errors": []}
    for inputs in (QUESTIONS, [*QUESTIONS[:BAD], "", *QUESTIONS[BAD:]]):
        try:
            options = {"never": EncodeOptions(batch_size=2, show_progress_bar=False)}
            details = encode_dealt(ThinkingEmbedder(model), inputs, options, processes=processes)
            told["vectors"] = details["never"].embeddings.tolist()
        except (ValueError, RuntimeError) as error:
            told["errors"].append([type(error).__name__, str(error)])
    (folder / f"told{rank}.json").write_text(json.dumps(told), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_the_inputs_and_find_what_one_finds(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    records = picture_records(tmp_path, count=7)
    model = gated_model()
    asked = ThinkingEmbedder(model).encode(
        [record.query for record in records],
        think="auto",
        think_threshold=1.0,
        return_details=True,
    )
    threshold = sum(asked.gate_probabilities) / len(records)
    alone = evaluate(model, records, replace(SETTINGS, gate_threshold=threshold))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    capfd.readouterr()
    spawn(work, (tmp_path, port, threshold), nprocs=2)
    told_once = capfd.readouterr().err
    assert told_once.count("7 of 7 thoughts were truncated") == 1  # of the whole, by one
    assert "of 3 thoughts" not in told_once
    told = [json.loads((tmp_path / f"told{rank}.json").read_text()) for rank in (0, 1)]
    assert [one["world"] for one in told] == [2, 2]
    # Queries, those with others' thoughts, targets: dealt in turn.
    num_targets = len(alone.targets)
    every = [7, 7, num_targets]
    assert told[0]["embedded"][:3] == [(count + 1) // 2 for count in every]
    assert told[1]["embedded"][:3] == [count // 2 for count in every]
    for rank in (0, 1):
        shared = json.loads((tmp_path / f"process{rank}" / "metrics.json").read_text())
        assert shared.keys() == alone.metrics.keys()
        for name, value in alone.metrics.items():
            if not name.endswith("/seconds"):
                assert shared[name] == pytest.approx(value, abs=1e-5), name
        lines = (tmp_path / f"process{rank}" / "per_query.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        for row, own in zip(rows, alone.queries, strict=True):
            for name in ("id", "mode", "cot", "ranks", "nearest", "think_tokens", "problems"):
                assert row[name] == own[name], (name, row["mode"])
    assert 0.0 < alone.metrics["test/all/auto/think_rate"] < 1.0
    (mine,), (other,) = told[1]["errors"], told[0]["errors"]
    assert mine[0] == "InputError"
    assert f"input {BAD}" in mine[1]
    assert other == ["RuntimeError", f"process 1: {mine[1]}"]
    assert told[0]["vectors"] == told[1]["vectors"]
    one = ThinkingEmbedder(model).encode(QUESTIONS, batch_size=2, show_progress_bar=False)
    assert told[0]["vectors"] == pytest.approx(one, abs=1e-5)


def test_lists_about_inputs_are_cut_with_them() -> None:
    options = EncodeOptions(think=["camel", None, True], do_sample=True, seed=[7, 8, 9])
    assert options.of_rows([0, 2]) == replace(options, think=["camel", True], seed=[7, 9])
    assert EncodeOptions(think="always", seed=3).of_rows([1]) == EncodeOptions(
        think="always", seed=3
    )
