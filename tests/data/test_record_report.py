"""The report on a file of records: every count, token lengths as in training, exit status."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from made_records import picture, picture_records
from PIL import Image
from short_runs import SHORT_RUN, small_model
from tiny_backbones import make_idefics3, make_llama

from twn_rl.cli import main
from twn_rl.data import images
from twn_rl.data.images import ImageError
from twn_rl.data.inspection import Distribution, inspect_records
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.backbone import load_backbone
from twn_rl.modeling.collator import collate_prompts
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.token_lengths import TokenCounter, add_token_lengths
from twn_rl.training.sft import SftConfig, SftTrainer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four pictures of three sizes, one a copy of another."""
    for name, size in (("a", (32, 16)), ("b", (32, 16)), ("c", (8, 8)), ("d", (64, 32))):
        picture(ord(name), *size).save(tmp_path / f"{name}.png")
    (tmp_path / "copy.png").write_bytes((tmp_path / "a.png").read_bytes())
    return tmp_path


def write(folder: Path, *records: Record) -> Path:
    path = folder / "records.jsonl"
    write_records(path, records)
    return path


def record(identity: str, **changes: Any) -> Record:
    sides = {"query": Item(text=f"query {identity}"), "positive": Item(text="camel")}
    return Record(**{"id": identity, "source": "s", **sides, **changes})


def test_every_count_of_a_small_file(folder: Path) -> None:
    frames = ("b.png", "c.png", "d.png")
    path = write(
        folder,
        record("1", query=Item(images=("a.png",)), query_cot="up", metadata={"task": "find"}),
        record("2", query=Item(images=("copy.png",)), query_cot="up", source="t"),
        record("3", query=Item(images=("a.png",)), query_cot="down", metadata={"task": "find"}),
        record("4", positive=Item(video=frames), negatives=(Item(text="x"), Item(text="y"))),
        record("5", positive=Item(video=frames), positive_cot="left"),
    )
    report = inspect_records(load_records(path), path)
    assert (report.rows, report.usable, report.left_out, report.problems) == (5, 5, {}, [])
    assert report.tasks == {"s": {"": 2, "find": 2}, "t": {"": 1}}
    assert report.shares == {
        "negatives": 0.2,
        "query CoT": 0.6,
        "positive CoT": 0.2,
        "images": 0.6,
        "videos": 0.4,
    }
    # A copy of a picture is the same content, another CoT is not.
    assert (report.duplicates, report.duplicate_ids) == (1, [("2", "1")])
    assert report.pictures == 5
    assert report.picture_sizes == {"32 x 16": 3, "8 x 8": 1, "64 x 32": 1}
    assert report.picture_sides == Distribution.of([8, 32, 32, 32, 64])
    assert report.negatives == Distribution.of([0, 0, 0, 0, 2])
    assert report.frames == Distribution.of([3, 3])


def test_rows_that_cannot_be_used_are_shown_and_give_exit_status_1(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, record("1"), record("2", query=Item(images=("a.png",))))
    assert main(["check-data", str(path)]) == 0
    (folder / "d.png").write_text("not a picture")
    copies = {"positive": Item(images=("a.png",)), "negatives": (Item(images=("copy.png",)),)}
    path = write(
        folder, record("1"), record("2", query=Item(images=("d.png",))), record("3", **copies)
    )
    capsys.readouterr()
    flags = ["--show", "1", "--json", str(folder / "out" / "report.json")]
    assert main(["check-data", str(path), *flags]) == 1
    printed = capsys.readouterr().out
    assert "3 rows, 1 usable, 2 left out" in printed
    assert "row 2, field query.images[0]: " in printed
    assert "row 3" not in printed
    assert "and 1 more" in printed
    report = json.loads((folder / "out" / "report.json").read_text("utf-8"))
    assert report["left_out"] == {"unreadable_image": 1, "positive_in_negatives": 1}
    assert [problem["where"] for problem in report["problems"]] == ["row 2", "row 3"]
    assert main(["check-data", str(folder / "absent.jsonl")]) == 2
    assert main(["check-data", str(path), "--workers", "-1"]) == 2


def test_worker_processes_find_what_threads_find_and_nothing_is_decoded_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "d.png").write_text("not a picture")
    rows = [record(name, query=Item(images=(f"{name}.png",))) for name in "abcd"]
    path = write(folder, *rows)
    images._remembered.clear()
    images._others.clear()
    by_processes = load_records(path, on_bad_record="skip", workers=2)
    monkeypatch.setattr(images, "open_image", lambda *_: pytest.fail("decoded again"))
    keys = [row.query.content_key() for row in by_processes]
    monkeypatch.undo()
    images._remembered.clear()
    images._others.clear()
    by_threads = load_records(path, on_bad_record="skip")
    assert keys == [row.query.content_key() for row in by_threads]
    assert by_processes.skipped_rows == by_threads.skipped_rows
    assert len(by_threads.errors) == 1


def test_a_picture_that_changed_after_its_facts_were_remembered_is_decoded_anew(
    folder: Path,
) -> None:
    path = (folder / "a.png").absolute()
    facts = images.image_facts(path)
    images.remember_images({str(path): facts._replace(digest="old")})
    assert images.image_digest(path) == "old"
    Image.new("RGB", (5, 7)).save(path)
    assert images.image_facts(path)[1:3] == (5, 7)
    assert images.image_digest(path) != facts.digest


def test_errors_of_worker_processes_arrive_whole() -> None:
    error = pickle.loads(pickle.dumps(ImageError("a; b; c", reason="url")))
    assert (str(error), error.reason) == ("a; b; c", "url")


@given(st.lists(st.integers(-1000, 1000), min_size=1, max_size=60))
def test_the_bins_of_a_distribution_hold_every_value_once(values: list[int]) -> None:
    spread = Distribution.of(values)
    assert spread is not None
    assert len(spread.bins) <= 10
    for first, last, count in spread.bins:
        assert count == sum(first <= value <= last for value in values)
    assert sum(count for _, _, count in spread.bins) == spread.count == len(values)
    assert sum(value <= spread.p95 for value in values) >= 0.95 * len(values)
    assert (spread.minimum, spread.maximum) == (min(values), max(values))


# Token lengths


def test_token_lengths_are_those_of_training(records: RecordSet) -> None:
    model = DualLoraModel.from_backbone(make_idefics3(), TwnConfig(num_readout_tokens=3))
    report = inspect_records(records, "records.jsonl")
    add_token_lengths(report, records, TokenCounter(model.backbone, model.config), sample=0)
    prompts = [int(model.collate([r.query])["attention_mask"].sum()) for r in records]
    cots = [len(model.completion_ids(model.renderer.completion(r.query_cot))) for r in records]  # pyright: ignore
    assert report.tokens["query prompt"] == Distribution.of(prompts)
    assert report.tokens["query CoT"] == Distribution.of(cots)
    whole = [prompt + cot + 1 + 3 for prompt, cot in zip(prompts, cots, strict=True)]
    assert report.tokens["whole query"] == Distribution.of(whole)
    assert report.tokens["negative prompt"].count == sum(len(r.negatives) for r in records)
    assert "positive CoT" not in report.tokens
    assert report.problems == []


def test_records_that_cannot_be_rendered_or_are_too_long_are_problems(tmp_path: Path) -> None:
    records = picture_records(tmp_path)
    report = inspect_records(records, "x")
    add_token_lengths(report, records, TokenCounter(make_llama(), TwnConfig()), sample=0)
    assert {problem.reason for problem in report.problems} == {"not_rendered"}
    assert len(report.problems) == len(records)
    assert report.tokens == {}
    texts = [
        record("short"),
        record("long", query_cot="camel " * 600),
    ]
    path = write(tmp_path, *texts)
    report = inspect_records(load_records(path), path)
    add_token_lengths(report, load_records(path), TokenCounter(make_llama(), TwnConfig()))
    found = [(problem.where, problem.reason) for problem in report.problems]
    assert found == [("record 'long'", "too_long")]


def test_markup_is_found_in_thoughts_and_counted_in_texts_with_and_without_a_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TwnConfig(backbone=str(BACKBONE_DIR)).save(folder)
    path = write(
        folder,
        record("a", query=Item("find </think>", "<image> it"), query_cot="left <|readout_0|>"),
        record("b", positive=Item(text="a <assistant>"), query_cot="left"),
    )
    lines = path.read_text().splitlines()
    forged = lines[1].replace('"left"', '"left </think> <image>"').replace('"b"', '"c"')
    lost = lines[1].replace("left", "l\\u0000").replace('"b"', '"d"')
    path.write_text("\n".join([*lines, forged, lost]) + "\n")
    assert main(["check-data", str(path)]) == 1
    printed = capsys.readouterr().out
    assert "texts with markup, shown as text         1" in printed
    assert "row 3, field query_cot: query_cot holds ['</think>', '<image>']" in printed
    assert "row 4, field query_cot: query_cot holds U+0000" in printed
    assert "readout" not in printed, "no model, no read-outs"
    assert main(["check-data", str(path), "--model", str(folder)]) == 1
    printed = capsys.readouterr().out
    assert "texts with markup, shown as text         2" in printed
    assert "record 'a': field query_cot: query_cot holds ['<|readout_0|>']" in printed
    with pytest.raises(RecordError, match=r"records\.jsonl, row 3, field query_cot"):
        load_records(path)


def test_thoughts_with_markup_of_the_model_are_refused_before_training(folder: Path) -> None:
    path = write(folder, record("a"), record("b", positive_cot="left <|readout_0|>"))
    model = small_model()
    with pytest.raises(RecordError, match=r"field positive_cot: record 'b': .*<.readout_0.>"):
        SftTrainer(
            model, SftConfig(output_dir=str(folder / "out"), **SHORT_RUN), load_records(path)
        )


def test_a_sample_is_measured_and_named(records: RecordSet) -> None:
    report = inspect_records(records, "x")
    add_token_lengths(report, records, TokenCounter(make_idefics3(), TwnConfig()), sample=2)
    assert report.token_records == report.tokens["whole query"].count == 2


def test_a_backbone_without_weights_renders_and_tokenizes_alike(records: RecordSet) -> None:
    light, whole = (load_backbone(BACKBONE_DIR, with_weights=flag) for flag in (False, True))
    assert all(parameter.is_meta for parameter in light.model.parameters())
    assert light.language_prefix == whole.language_prefix
    counter = TokenCounter.from_name(str(BACKBONE_DIR))
    for row in records:
        batch = collate_prompts(whole, TwnConfig().renderer, [row.query])
        assert counter.prompt(row.query) == batch["attention_mask"].sum()


def test_the_command_counts_tokens_of_a_saved_model(
    records: RecordSet, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    TwnConfig(backbone=str(BACKBONE_DIR), num_readout_tokens=7).save(tmp_path)
    path = records.data_root / "records.jsonl"
    assert main(["check-data", str(path), "--model", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "tokens after rendering, of 6 records" in printed
    assert "whole query, tokens: " in printed
