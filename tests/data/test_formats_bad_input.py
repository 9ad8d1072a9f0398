"""Bad input to a conversion: a clear error, every row counted, nothing written before is lost."""

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from twn_rl.cli import main
from twn_rl.data.record_files import load_records


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with two pictures (b a copy of a), and a picture outside of it."""
    folder = tmp_path / "data"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(256, size=(2, 16, 16, 3), dtype=np.uint8)
    for name, pixels in (("a.png", 0), ("b.png", 0), ("c.png", 1), ("../outside.png", 1)):
        Image.fromarray(noise[pixels]).save(folder / name)
    return folder


def _mmeb(**changes: Any) -> dict[str, Any]:
    row = {"qry": "q", "qry_image_path": "", "pos_text": "p", "pos_image_path": ""}
    return {key: value for key, value in (row | changes).items() if value is not ...}


def _lines(root: Path, *rows: Any) -> Path:
    path = root / "rows.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


def _main(root: Path, name: str, source: Path, *options: str) -> int:
    words = ["--from", name, "--input", str(source), "--output", str(root / "out.jsonl")]
    return main(["convert", *words, *options])


BAD_ROWS = [
    ('{"qry": ', "bad_json", "no valid JSON"),
    ("[1, 2]", "bad_type", "expected an object with named fields"),
    (_mmeb(pos_text=...), "missing_field", "pos_text is missing"),
    (_mmeb(qry=7), "bad_type", "expected text"),
    (_mmeb(qry=" "), "empty_item", "expected non-blank text"),
    (_mmeb(qry_image_path="../outside.png"), "path_outside_root", "leads outside the data root"),
    (_mmeb(qry_image_path="/etc/hosts"), "path_outside_root", "is absolute"),
    (_mmeb(qry_image_path="/etc/\0"), "path_outside_root", "is absolute"),
    (_mmeb(qry_image_path="x" * 5000), "missing_image", "no usable path"),
    (_mmeb(qry_image_path="none.png"), "missing_image", "does not exist"),
    (_mmeb(qry_image_path="https://x.org/a.png"), "url", "never fetched"),
    (_mmeb(qry="<|image_1|>\nq"), "mark_without_image", "has no picture"),
    (_mmeb(neg_text="p"), "positive_in_negatives", "has the content of positive"),
    (
        _mmeb(pos_text="", pos_image_path="a.png", neg_text="", neg_image_path="b.png"),
        "positive_in_negatives",
        "has the content of positive",
    ),
    (_mmeb(qry_image_path={"bytes": "AA==", "path": None}), "missing_image", "does not exist"),
    (_mmeb(qry_image_path="data:image/png;base64,AAAA"), "unreadable_image", "cannot be read"),
]


@pytest.mark.parametrize(("bad", "reason", "message"), BAD_ROWS)
def test_a_bad_row_is_named_under_raise_and_counted_under_skip(
    root: Path, bad: Any, reason: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = _lines(root, _mmeb(), bad, _mmeb(qry="last"))
    (root / "out.jsonl").write_text("from an earlier run")
    assert _main(root, "mmeb", source, "--overwrite") == 2
    assert "rows.jsonl, row 2" in caplog.text
    assert message in caplog.text
    assert (root / "out.jsonl").read_text() == "from an earlier run"
    assert not list(root.glob(".*.tmp"))
    caplog.clear()
    assert _main(root, "mmeb", source, "--overwrite", "--on_bad_record", "skip") == 0
    assert f"dropped, {reason}: 1; first: {source}, row 2" in caplog.text
    records = load_records(root / "out.jsonl")
    assert [record.query.text for record in records] == ["q", "last"]
    assert [record.id for record in records] == ["rows/1", "rows/3"]


def test_an_unknown_format_is_refused_with_the_known_ones(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        _main(root, "msmarco", _lines(root, _mmeb()))
    assert caught.value.code == 2
    assert "invalid choice: 'msmarco'" in capsys.readouterr().err


@pytest.mark.parametrize("content", ["", "\n\n", "[]"])
@pytest.mark.parametrize("name", ["mmeb", "sentence-transformers", "twn"])
def test_an_empty_file_is_an_error_and_writes_nothing(
    root: Path, name: str, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = root / "empty.json"
    source.write_text(content)
    assert _main(root, name, source) == 2
    assert "records = 0" in caplog.text
    assert not (root / "out.jsonl").exists()


def test_unknown_fields_are_listed_with_counts_and_duplicate_ids_refused(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _lines(root, _mmeb(hue=1), _mmeb(hue=2, tone=3))
    caplog.set_level("INFO")
    assert _main(root, "mmeb", source) == 0
    assert "unknown fields, not carried over: {'hue': 2, 'tone': 1}" in caplog.text
    assert "records: 2, images: 0 (0 saved from embedded bytes), negatives: 0" in caplog.text
    row = {"data_info": {"dataset_name": "d", "data_id": 1}, "query": "q", "positive": "p"}
    caplog.clear()
    assert _main(root, "twn", _lines(root, row, row), "--overwrite") == 2
    assert "id = 'd/1' was used before" in caplog.text


def test_an_existing_output_and_the_input_itself_are_kept(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = _lines(root, _mmeb())
    (root / "out.jsonl").write_text("precious")
    assert _main(root, "mmeb", source) == 2
    assert (root / "out.jsonl").read_text() == "precious"
    assert "exists; expected a new file" in caplog.text
    kept = source.read_text()
    words = ["--input", str(source), "--output", str(source), "--overwrite"]
    assert main(["convert", "--from", "mmeb", *words]) == 2
    assert source.read_text() == kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--min_score", "0.5"), "mean nothing for mmeb"),
        (("--image_dir", "../elsewhere"), "image_dir = '../elsewhere' leads outside"),
        (("--limit", "0"), "limit = 0"),
        (("--num_negatives", "-1"), "num_negatives = -1"),
        (("--split", "test", "--subset", "other"), "subset = ['other'] not found"),
    ],
)
def test_options_that_make_no_sense_are_refused(
    root: Path, options: tuple[str, ...], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _main(root, "mmeb", _lines(root, _mmeb()), *options) == 2
    assert message in caplog.text
    assert not (root / "out.jsonl").exists()


def test_limit_stops_before_later_bad_rows(root: Path) -> None:
    assert _main(root, "mmeb", _lines(root, _mmeb(), _mmeb(), "no JSON"), "--limit", "2") == 0
    assert len(load_records(root / "out.jsonl")) == 2


def test_splits_must_be_chosen_and_an_output_in_the_folder_is_no_input(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (root / "OK-VQA").mkdir()
    for split in ("original", "diverse_instruction"):
        (root / "OK-VQA" / f"{split}.jsonl").write_text(json.dumps(_mmeb()))
    assert _main(root, "mmeb", root) == 2
    assert "has the splits ['diverse_instruction', 'original']" in caplog.text
    for _ in range(2):
        assert _main(root, "mmeb", root, "--split", "original", "--overwrite") == 0
    assert [record.id for record in load_records(root / "out.jsonl")] == ["OK-VQA/1"]


@pytest.mark.parametrize(
    ("name", "row", "message"),
    [
        ("sentence-transformers", {"text": "a", "label": 3}, "texts with classes name no pairs"),
        ("sentence-transformers", {"a": "x", "b": "y", "score": 0.3}, "expected min_score"),
        ("sentence-transformers", {"a": "x", "b": "gone.png"}, "'gone.png' does not exist"),
        ("sentence-transformers", {"a": "x", "b": "https://x.org/a.jpg"}, "never fetched"),
        ("ume-sft", {"qry": {"conversations": []}, "pos": "p"}, "expected an object with conv"),
        ("ume-rl", {"qry_text": "q", "qry_video": "v.mp4", "pos_text": "p"}, "is a video file"),
        (
            "swift",
            {
                "messages": [{"role": "user", "content": "<image><image>q"}],
                "images": ["a.png"],
                "positive_messages": [[{"role": "user", "content": "p"}]],
            },
            "<image> marks = 2 but images = 1",
        ),
        ("swift", {"query": "q", "response": "p", "images": ["a.png"]}, "images left over"),
        ("swift", {"query": "q", "response": "p", "audios": ["a.wav"]}, "row has audio"),
        (
            "tevatron",
            {"query_id": 1, "query_text": "q", "positive_document_ids": ["x"]},
            "there is no corpus",
        ),
        (
            "tevatron",
            {
                "query_id": 1,
                "query": "q",
                "positive_passages": [{"docid": 1, "text": "p"}],
                "negative_passages": [{"docid": 1, "text": "p"}],
            },
            "documents ['1'] are positive and negative",
        ),
        ("twn", {"data_info": {}, "query": "q", "target": "p"}, "under one of ['target']"),
    ],
)
def test_rows_a_format_cannot_hold_are_refused_with_what_to_change(
    root: Path, name: str, row: dict[str, Any], message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _main(root, name, _lines(root, row)) == 2
    assert message in caplog.text


def _write_beir(root: Path, qrels: str) -> Path:
    folder = root / "beir"
    (folder / "qrels").mkdir(parents=True)
    (folder / "corpus.jsonl").write_text('{"_id": "d", "text": "doc"}\nno JSON\n')
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "query"}\n')
    (folder / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + qrels)
    return folder


@pytest.mark.parametrize(
    ("qrels", "message"),
    [
        ("q\td\t1\nq\td\t0\n", "have the scores 1.0 and 0.0"),
        ("q\td\n", "test.tsv, row 2: judgement ="),
        ("q\td\thigh\n", "expected query-id, corpus-id and a number"),
        ("q\tgone\t1\n", "document = 'gone' is not in the corpus"),
        ("q\td\t1\nlost\td\t1\n", "query = 'lost' is judged but has no text"),
        ("q\td\t0\n", "query_without_positive"),
    ],
)
def test_bad_judgements_are_told(
    root: Path, qrels: str, message: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert _main(root, "beir", _write_beir(root, qrels)) == 2
    assert message in caplog.text


def test_unreadable_corpus_rows_are_noted(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert _main(root, "beir", _write_beir(root, "q\td\t1\n")) == 0
    assert "corpus rows that cannot be read: 1; first:" in caplog.text


def test_a_yaml_file_tells_all_its_faults_before_anything_is_converted(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = root / "train.yaml"
    source.write_text(
        "fine: {dataset_parser: mmeb, dataset_path: rows.jsonl}\n"
        "audio: {dataset_parser: audio, dataset_path: rows.jsonl}\n"
        "absent: {dataset_parser: mmeb, dataset_name: TIGER-Lab/MMEB-train}\n"
    )
    _lines(root, _mmeb())
    assert _main(root, "vlm2vec", source) == 2
    assert "audio: dataset_parser = 'audio'" in caplog.text
    assert "absent: data = 'TIGER-Lab/MMEB-train' is not here" in caplog.text
    assert _main(root, "vlm2vec", source, "--subset", "fine") == 0


def test_a_missing_package_is_named_with_what_installs_it(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    source = root / "rows.parquet"
    source.write_text("a: {}")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "twn_rl.data.parquet", raising=False)
    assert _main(root, "mmeb", source) == 2
    assert "module pyarrow is missing" in caplog.text
    assert 'pip install "twn-rl[eval]"' in caplog.text
    monkeypatch.undo()
    importlib.import_module("twn_rl.data.parquet")


def test_a_list_that_breaks_off_leaves_the_old_output(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = root / "cut.json"
    source.write_text(json.dumps([_mmeb(), _mmeb()])[:-20])
    (root / "out.jsonl").write_text("precious")
    assert _main(root, "mmeb", source, "--overwrite", "--on_bad_record", "skip") == 2
    assert "no valid JSON list" in caplog.text
    assert (root / "out.jsonl").read_text() == "precious"
