"""The two recipes of selection: what is written, what is kept, and which runs follow which."""

import json
import sys
from pathlib import Path

import pytest

from twn_rl.data.record_files import load_records
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.launch.arguments import DataArguments, ModelArguments, parse_arguments
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import eval_embed, select_thoughts, sft_embed
from twn_rl.recipes.experiments import compare_selection
from twn_rl.training.sft import SftConfig
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
    data = [f"--demo_dir={folder / 'data'}", "--demo_scale=0.002"]
    output = f"--output_dir={folder / 'selection'}"
    types = (select_thoughts.SelectScriptArguments, EndpointSettings, DataArguments)
    return select_thoughts.main(*parse_arguments(types, arguments=[output, *data, *flags]))


def test_candidates_and_scores_are_kept_while_thresholds_change(
    tmp_path: Path, model_folder: Path
) -> None:
    cots = tmp_path / "cots.jsonl"
    cots.write_text('{"id": "train-00003", "cot": "camel </think>"}\n', encoding="utf-8")
    sources = [f"--model={model_folder}", "--demo_teachers=2", f"--candidate_files={cots}"]
    sources += ["--own_temperatures=0"]
    path = select(tmp_path, *sources, "--threshold=-9")
    records = load_records(path, data_root=tmp_path / "data")
    assert len(records) == 10
    folder = tmp_path / "selection"
    rows = [json.loads(line) for line in (folder / "candidates.jsonl").read_text().splitlines()]
    for record, row in zip(records, rows, strict=True):
        assert record.id == row["id"]
        usable = [c for c in row["candidates"] if c["problem"] is None]
        best = max(usable, key=lambda c: c["worth"])
        assert record.query_cot == best["cot"]
        assert all(c["worth"] == pytest.approx(c["with_cot"] - c["without"]) for c in usable)
        mark = {"is_direct_only": False, "source": best["source"], "worth": best["worth"]}
        assert record.metadata["selection"] == mark
    assert [c["source"] for c in rows[3]["candidates"]] == ["teacher0", "teacher1", "cots", "own@0"]
    assert rows[3]["candidates"][2]["fate"] == "malformed"
    shards = [*folder.glob("candidates/*/*.jsonl"), *folder.glob("scores/*/*.jsonl")]
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


def test_without_a_judge_every_candidate_takes_its_turn(tmp_path: Path) -> None:
    flags = ["--demo_teachers=2", "--copies=2", "--teacher_random_rate=0.9"]
    every = load_records(select(tmp_path, *flags, "--rule=all"), data_root=tmp_path / "data")
    assert [r.id for r in every[:3]] == ["train-00000#0", "train-00000#1", "train-00001#0"]
    text = (tmp_path / "selection" / "candidates.jsonl").read_text(encoding="utf-8")
    cots = [[c["cot"] for c in json.loads(line)["candidates"]] for line in text.splitlines()]
    assert [record.query_cot for record in every] == [cot for pair in cots for cot in pair]
    drawn = load_records(select(tmp_path, *flags, "--rule=random"), data_root=tmp_path / "data")
    assert [record.id for record in drawn] == [record.id for record in every]
    for first, second, pair in zip(drawn[::2], drawn[1::2], cots, strict=True):
        assert first.query_cot == second.query_cot
        assert first.query_cot in pair


def test_settings_that_cannot_work_are_named_before_anything_is_read() -> None:
    with pytest.raises(ValueError, match=r"model = None.*checkpoints without own_temperatures"):
        select_thoughts.SelectScriptArguments(checkpoints=["a"])


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Let `accelerate launch` be a program that leaves its recipe and flags in a file."""
    log, program, starter = (tmp_path / name for name in ("launched", "program.py", "python"))
    program.write_text(
        "import json, pathlib, sys\n"
        "recipe = next(n for n, word in enumerate(sys.argv) if word.endswith('_embed.py')"
        " or word.endswith('_thoughts.py'))\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    words = [pathlib.Path(sys.argv[recipe]).name, *sys.argv[recipe + 1:]]\n"
        "    file.write(json.dumps(words) + '\\n')\n",
        encoding="utf-8",
    )
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n', encoding="utf-8")
    starter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(starter))

    def read() -> list[list[str]]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read


def test_every_arm_trains_equally_and_the_first_one_judges(tmp_path: Path, launched) -> None:
    script = compare_selection.CompareArguments(output_dir=str(tmp_path / "out"), max_steps=7)
    data = DataArguments(teacher_swap_rate=0.55)
    compare_selection.run_seed(script, data, 3)
    root, runs = tmp_path / "out" / "seed3", launched()
    steps = ["select_thoughts.py", "sft_embed.py", "eval_embed.py"]
    assert [words[0] for words in runs] == steps * 3
    selections, trainings, evaluations = runs[::3], runs[1::3], runs[2::3]
    parsed = [
        parse_arguments((select_thoughts.SelectScriptArguments, DataArguments), arguments=words[1:])
        for words in selections
    ]
    assert [script.rule for script, _ in parsed] == ["all", "random", "best"]
    assert [script.model for script, _ in parsed] == [None, None, str(root / "all")]
    for chosen, own in parsed:
        assert (chosen.demo_teachers, chosen.copies, chosen.seed) == (4, 4, 3)
        assert (own.demo_seed, own.teacher_swap_rate) == (3, 0.55)
        assert own.demo_dir == str(root / "data")
    differing = [
        {flag for flag in words if not flag.startswith(("--output_dir", "--train_file"))}
        for words in trainings
    ]
    assert differing[0] == differing[1] == differing[2]
    assert "--max_steps=7" in differing[0]
    for words, arm in zip(trainings, compare_selection.ARMS, strict=True):
        assert f"--train_file={root / f'{arm}_thoughts' / 'selected.jsonl'}" in words
        types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
        _, _, own, training = parse_arguments(types, arguments=words[1:])
        assert (own.data_root, training.max_steps, training.seed) == (str(root / "data"), 7, 3)
    for words in evaluations:
        parse_arguments((eval_embed.EvalScriptArguments, DataArguments), arguments=words[1:])
    compare_selection.run_seed(script, data, 3)
    assert launched() == [], "finished runs are kept"
    # Another threshold: selected again, trained again, evaluated again, and nothing else.
    script.threshold = 0.1
    compare_selection.run_seed(script, data, 3)
    assert [words[0] for words in launched()] == steps


def test_a_comparison_without_its_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="'all' too: its model selects"):
        compare_selection.CompareArguments(arms=["selected"])
