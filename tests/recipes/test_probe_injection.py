"""The recipe that attacks vectors with words and forged thoughts, under a real launch."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from launching import launch
from tiny_backbones import make_idefics3

from twn_rl.data.record import Item, Record
from twn_rl.evaluation.injection import (
    DOCUMENT_ATTACKS,
    GIVEN,
    QUERY_ATTACKS,
    choose_victims,
    next_turn,
)
from twn_rl.launch.arguments import ModelArguments
from twn_rl.modeling.model import DualLoraModel


def record(name: str, target: str, pool: str = "names") -> Record:
    return Record(
        id=name,
        source="t",
        query=Item(text=f"where is {name}"),
        positive=Item(text=target),
        query_cot=f"it is {target}",
        metadata={"pool": pool},
    )


def test_victims_get_a_wrong_target_of_their_own_pool_and_a_thought_that_leads_there() -> None:
    records = [record(f"r{i}", target) for i, target in enumerate(["a", "b", "c", "a"])]
    records += [record("alone", "x", "other"), Record("p", "t", Item("q"), Item(images=("a.png",)))]
    victims = choose_victims(records, 100, seed=3)
    assert len(victims) == 4
    for victim in victims:
        assert victim.wrong != victim.right
        assert {victim.wrong, victim.right} <= set(victim.pool) == {"a", "b", "c"}
        assert victim.thought == f"it is {victim.wrong}"
        assert victim.right_thought == f"it is {victim.right}"
    pictured = [replace(r, query=Item("q", images=("scene.png",))) for r in records[:2]]
    for victim in choose_victims([*pictured, *records[2:]], 100):
        if victim.query.images:
            assert {victim.right, victim.wrong} == {"a", "b"}, "the other query of its picture"
    assert victims == choose_victims(records, 100, seed=3)
    with pytest.raises(ValueError, match="expected some"):
        choose_victims(records[-2:], 10)


def test_the_forged_turn_is_what_the_template_writes() -> None:
    model = DualLoraModel.from_backbone(make_idefics3())
    assert next_turn(model) == "<end_of_utterance><|im_start|> assistant"


@pytest.mark.slow
def test_probing_writes_a_row_for_each_attack_and_mode(tmp_path: Path) -> None:
    model = tmp_path / "model"
    ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6).build(0).save_pretrained(
        model
    )
    flags = [f"--model={model}", "--demo_scale=0.01", "--demo_dir=data", "--num_queries=6"]
    done = launch("experiments/probe_injection.py", flags, config=None, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    folder = model / "probe_injection"
    text = (folder / "probe_injection.md").read_text(encoding="utf-8")
    assert text.strip() in done.stdout
    rows: dict[str, Any] = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    cells = [(row["attack"], row["mode"]) for row in rows["queries"]]
    modes = ("never", "always")
    assert cells == [*((a, m) for m in modes for a in QUERY_ATTACKS), (GIVEN, "given")]
    cells = [(row["attack"], row["mode"]) for row in rows["documents"]]
    assert cells == [(a, m) for m in modes for a in DOCUMENT_ATTACKS]
    first = rows["queries"][0]
    assert first["cosine"] == pytest.approx(1, abs=1e-5)
    assert 0 < first["queries"] <= 6
    assert all(0 <= row["steered"] + row["hit"] <= 1 for part in rows.values() for row in part)
