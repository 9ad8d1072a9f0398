"""How input is read: what `datasets` writes, JSON lists in chunks, single rows, foreign marks."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import pytest
from format_files import convert, make_root, write_lines
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from twn_rl.data.formats import FORMATS, Conversion
from twn_rl.data.formats.conversion import convert_file
from twn_rl.data.formats.input_files import read_list
from twn_rl.data.formats.marks import strip_marks
from twn_rl.data.record import RecordError


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_what_datasets_itself_writes_is_read(root: Path) -> None:
    features = datasets.Features(
        {"anchor": datasets.Value("string"), "page": datasets.Image(), "bad": datasets.Image()}
    )
    rows = {
        "anchor": ["one", "two"],
        "page": [Image.new("RGB", (4, 4), "red"), str(root / "pics" / "a.png")],
        "bad": [Image.new("RGB", (4, 4), "blue"), str(root / "pics" / "b.png")],
    }
    whole = datasets.DatasetDict({"train": datasets.Dataset.from_dict(rows, features=features)})
    whole.save_to_disk(str(root / "saved"))
    whole["train"].to_parquet(str(root / "rows.parquet"))
    loaded = []
    for source in (root / "saved", root / "rows.parquet"):
        loaded.append(convert(root, "sentence-transformers", source, "--overwrite"))
    for records in loaded:
        assert [record.query.text for record in records] == ["one", "two"]
        shown = Image.open(str(records[0].positive.images[0])).convert("RGB")
        assert shown.getpixel((0, 0)) == (255, 0, 0)
        assert len(records[1].negatives) == 1


@settings(max_examples=50, deadline=None)
@given(
    rows=st.lists(
        st.dictionaries(
            st.text(max_size=3),
            st.text(max_size=5) | st.integers() | st.lists(st.none() | st.booleans(), max_size=2),
            max_size=3,
        ),
        max_size=6,
    ),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 2]),
    is_ascii=st.booleans(),
)
def test_a_json_list_read_in_chunks_is_the_list(
    tmp_path_factory: pytest.TempPathFactory,
    rows: list[Any],
    chunk: int,
    indent: int | None,
    is_ascii: bool,
) -> None:
    path = tmp_path_factory.mktemp("lists") / "rows.json"
    path.write_text(json.dumps(rows, indent=indent, ensure_ascii=is_ascii), encoding="utf-8")
    assert list(read_list(path, chunk_characters=chunk)) == rows


@pytest.mark.parametrize(
    "text",
    [
        '[{"a": 1}, {"b": ',
        '[{"a": 1}',
        '[{"a": 1} {"b": 2}]',
        '[{"a": 1},, {"b": 2}]',
        '[{"a": 1},]',
        '[,{"a": 1}]',
        '[{"a": 1}] more',
        '[{"a": 1}, oops]',
    ],
)
@pytest.mark.parametrize("chunk", [1, 3, 1000])
def test_a_broken_json_list_is_never_taken_for_a_short_one(
    tmp_path: Path, text: str, chunk: int
) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(RecordError, match="no valid JSON list"):
        list(read_list(path, chunk_characters=chunk))


def test_rows_stream_from_the_converter_one_by_one(root: Path) -> None:
    row = {"qry": "q", "pos_text": "p"}
    source = write_lines(root / "rows.jsonl", *(row for _ in range(50)))
    taken = 0

    def watched(conversion: Conversion) -> Any:
        nonlocal taken
        for outcome in FORMATS["mmeb"].convert(conversion):
            taken += 1
            yield outcome

    conversion = Conversion(input=source, output=root / "out.jsonl", data_root=root)
    tally = convert_file(watched, conversion, limit=3)
    assert (tally.records, taken) == (3, 3)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("<|image_1|>\nWhat?", "What?"),
        ("<|vision_start|><|image_pad|><|vision_end|>What?", "What?"),
        ("first\n<image>\nsecond", "first\nsecond"),
        ("compare <image> with <image> now", "compare with now"),
        ("end <video>", "end"),
        ("What? <disc_emb>\n", "What?"),
        ("<|image_1|>", None),
        ("  no marks, kept as it is \n", "  no marks, kept as it is \n"),
        ("<imagery> a < b > <images>", "<imagery> a < b > <images>"),
    ],
)
def test_placeholders_of_other_backbones_leave_the_text(text: str, bare: str | None) -> None:
    notes: Counter[str] = Counter()
    assert strip_marks(text, has_pictures=True, notes=notes, field="f") == bare
    assert bool(notes) == (text.startswith(("first", "compare")))
