"""The comparison of checks: it tells a judge from a blind check, and runs on a stored model."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.recipes.experiments import compare_checks
from twn_rl.recipes.experiments.compare_checks import ChecksScriptArguments
from twn_rl.runtime.sharded_pass import PLAN_FILE
from twn_rl.runtime.whole_files import write_json
from twn_rl.training.gate_labels import GateLabels, read_labels, write_shard

WIDTH = 12


def labels(count: int, seed: int, *, width: int = WIDTH, is_unseen: bool = False) -> GateLabels:
    """Return labels of inputs whose thought goes with them, helps seven of ten and hurts the rest.

    Of unseen ones no thought goes with its input, and all hurt; either state is as usual as ever.
    """
    generator = np.random.default_rng(seed)
    first, noise, other = generator.normal(size=(3, count, width)).astype(np.float32)
    second = (other if is_unseen else np.roll(first, 3, axis=1)) + 0.3 * noise
    helps = generator.random(count) < (0.0 if is_unseen else 0.7)
    rows = [row(index, bool(is_helped)) for index, is_helped in enumerate(helps)]
    return GateLabels(rows, np.concatenate([first, second], axis=1))


def row(index: int, helps: bool) -> dict[str, Any]:
    numbers = ("no_think_loss", "think_loss", "no_think_hardest_negative")
    numbers += ("no_think_positive_similarity", "think_positive_similarity")
    return {
        **dict.fromkeys(numbers, 0.5),
        "id": f"q{index}",
        "key": f"key{index}",
        "task": "find",
        "hop": None,
        "gain": 1.0 if helps else -1.0,
        "no_think_ranks": [2 if helps else 1],
        "think_ranks": [1 if helps else 2],
        "think_hardest_negative": 0.5,
        "cot": "camel",
        "think_tokens": 3,
        "problem": None,
    }


def figures(table: str) -> dict[str, list[str]]:
    lines = [line.strip("| \n").split("|") for line in table.splitlines()[2:]]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def test_the_judge_alone_notices_thoughts_that_do_not_go_with_their_inputs() -> None:
    script = ChecksScriptArguments(num_gates=2)
    measured = {"test": labels(600, 2), "unseen": labels(600, 3, is_unseen=True)}
    found = compare_checks.checks(script, labels(1500, 0), labels(400, 1), threshold=0.3)
    everybody = lambda part: np.ones(len(part.rows), dtype=bool)  # noqa: E731
    told = figures(compare_checks.table(measured, found, everybody))
    assert told["oracle"] == ["100.0", "100.0"]
    assert told["never"][1] == "100.0"
    assert told["always"][1] == told["gate alone"][1].split()[0] == "0.0"
    hits = {name: float(cells[1].split()[0]) for name, cells in told.items()}
    assert hits["after: judge of both states"] > 95
    for blind in ("before: usual question", "after: usual vector with the thought"):
        assert hits[blind] < 30, blind
    kept = {name: float(cells[0].split("(")[1][:-1]) for name, cells in list(told.items())[3:]}
    assert kept["gate alone"] == 100.0
    for check in ("before: usual question", "after: judge of both states"):
        assert kept[check] == pytest.approx(95, abs=4)


@pytest.mark.slow
def test_a_stored_model_is_measured_on_the_splits_there_are(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6).build(0)
    gate = Gate(model.hidden_size, 4)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[QUERY_SIDE], model.config.gate_threshold = gate, 0.0
    path = tmp_path / "model"
    model.save_pretrained(path)
    for name, count in (("gate", 200), ("validation", 60)):
        folder = path / "gate" / "labels" / QUERY_SIDE / name
        folder.mkdir(parents=True)
        part = labels(count, count, width=model.hidden_size)
        write_shard(folder, 0, part.rows, part.both_states)
        write_json(folder / PLAN_FILE, {"num_examples": count, "shard_size": count})
    data = DataArguments(demo_dir=str(tmp_path / "data"), demo_scale=0.01)
    script = ChecksScriptArguments(
        model=str(path), num_gates=1, splits=["test", "ood", "three_hops"]
    )
    output = compare_checks.main(script, data)
    text = (output / "checks.md").read_text(encoding="utf-8")
    assert text.strip() in capsys.readouterr().out
    assert "| test | three_hops |" in text
    told = figures(text)
    # An untrained model writes no thoughts: nothing is gained or lost, whatever is kept.
    assert {cells[0].split()[0] for cells in told.values()} == {told["never"][0]}
    stored = read_labels(output / "labels" / "three_hops")
    assert (stored.states == stored.think_states).all()
    assert torch.isfinite(torch.from_numpy(stored.states.copy())).all()
