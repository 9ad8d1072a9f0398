"""The two recipes of selection: what is written, what is kept, and which runs follow which."""

import json
import subprocess
from pathlib import Path

import pytest

from twn_rl.data.record_files import load_records
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import select_thoughts
from twn_rl.training.thought_selection.drafts import SelectionError
from twn_rl.training.thought_selection.endpoint import EndpointSettings


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    config = TwnConfig(
        reasoning_lora=LoraSettings(r=2, alpha=4),
        embedding_lora=LoraSettings(r=2, alpha=4),
        max_think_tokens=24,
    )
    DualLoraModel.from_backbone(str(BACKBONE_DIR), config).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def select(folder: Path, *flags: str) -> Path:
    data = [f"--demo_dir={folder / 'data'}", "--demo_scale=0.00075"]
    output = f"--output_dir={folder / 'selection'}"
    types = (select_thoughts.SelectScriptArguments, EndpointSettings, DataArguments)
    return select_thoughts.main(*parse_arguments(types, arguments=[output, *data, *flags]))


def test_drafts_and_scores_are_kept_while_thresholds_change(
    tmp_path: Path, model_folder: Path
) -> None:
    cots = tmp_path / "cots.jsonl"
    cots.write_text('{"id": "train-00003", "cot": "camel </think>"}\n', encoding="utf-8")
    sources = [f"--model={model_folder}", "--demo_teachers=2", f"--draft_files={cots}"]
    sources += ["--own_temperatures=0"]
    path = select(tmp_path, *sources, "--threshold=-9")
    records = load_records(path, data_root=tmp_path / "data")
    assert len(records) == 10
    folder = tmp_path / "selection"
    rows = [json.loads(line) for line in (folder / "drafts.jsonl").read_text().splitlines()]
    for record, row in zip(records, rows, strict=True):
        assert record.id == row["id"]
        usable = [c for c in row["drafts"] if c["problem"] is None]
        best = max(usable, key=lambda c: c["worth"])
        assert record.query_cot == best["cot"]
        assert all(c["worth"] == pytest.approx(c["with_cot"] - c["without"]) for c in usable)
        mark = {"is_direct_only": False, "source": best["source"], "worth": best["worth"]}
        assert record.metadata["selection"] == mark
    assert [c["source"] for c in rows[3]["drafts"]] == ["teacher0", "teacher1", "cots", "own@0"]
    assert rows[3]["drafts"][2]["fate"] == "malformed"
    shards = [*folder.glob("drafts/*/*.jsonl"), *folder.glob("scores/*/*.jsonl")]
    assert len(shards) == 4
    modified = [shard.stat().st_mtime_ns for shard in shards]

    # Nothing is worth that much: all records train the direct path only, and are marked so.
    path = select(tmp_path, *sources, "--threshold=9")
    assert [shard.stat().st_mtime_ns for shard in shards] == modified
    for record in load_records(path, data_root=tmp_path / "data"):
        assert record.query_cot is None
        assert record.metadata["selection"] == {"is_direct_only": True}
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    assert report["direct_only"] == report["records"] == 10
    assert report["fates"]["below_threshold"] >= 20
    assert report["noise"]["all"]["recall"] in (1.0, None)


def test_without_a_judge_every_draft_takes_its_turn(tmp_path: Path) -> None:
    flags = ["--demo_teachers=2", "--copies=2", "--teacher_random_rate=0.9"]
    every = load_records(select(tmp_path, *flags, "--rule=all"), data_root=tmp_path / "data")
    assert [r.id for r in every[:3]] == ["train-00000#0", "train-00000#1", "train-00001#0"]
    text = (tmp_path / "selection" / "drafts.jsonl").read_text(encoding="utf-8")
    cots = [[c["cot"] for c in json.loads(line)["drafts"]] for line in text.splitlines()]
    assert [record.query_cot for record in every] == [cot for pair in cots for cot in pair]
    drawn = load_records(select(tmp_path, *flags, "--rule=random"), data_root=tmp_path / "data")
    assert [record.id for record in drawn] == [record.id for record in every]
    for first, second, pair in zip(drawn[::2], drawn[1::2], cots, strict=True):
        assert first.query_cot == second.query_cot
        assert first.query_cot in pair


def test_a_folder_of_an_earlier_version_is_refused_and_its_conversion_works(tmp_path: Path) -> None:
    flags = ["--demo_teachers=2", "--rule=all"]
    chosen = select(tmp_path, *flags).read_bytes()
    folder = tmp_path / "selection"
    shard = folder / "drafts" / "demo_teachers" / "000000.jsonl"
    shard.write_text(shard.read_text("utf-8").replace('"drafts": ', '"candidates": '), "utf-8")
    (folder / "drafts").rename(folder / "candidates")
    (folder / "scores").mkdir()
    with pytest.raises(SelectionError, match="is of an earlier version") as refused:
        select(tmp_path, *flags)
    subprocess.run(str(refused.value).rpartition("what it holds: ")[2], shell=True, check=True)
    modified = shard.stat().st_mtime_ns
    assert select(tmp_path, *flags).read_bytes() == chosen
    assert shard.stat().st_mtime_ns == modified


def test_settings_that_cannot_work_are_named_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"model = None.*checkpoints without own_temperatures"):
        select_thoughts.SelectScriptArguments(checkpoints=["a"])
