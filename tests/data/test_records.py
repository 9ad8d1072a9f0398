"""Records and their files: round trips, and one counted, fully named error per kind of bad row."""

import json
import math
import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from torch.utils.data import DataLoader

from twn_rl.data import images, shared_verification
from twn_rl.data import parquet as parquet_rows
from twn_rl.data.images import ImageError, image_digest, open_image
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import load_records, write_records


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with two pictures, and a picture outside of it."""
    folder = tmp_path / "data"
    (folder / "pics").mkdir(parents=True)
    noise = np.random.default_rng(0).integers(256, size=(2, 32, 32, 3), dtype=np.uint8)
    Image.fromarray(noise[0]).save(folder / "pics" / "a.png")
    Image.fromarray(noise[1]).save(folder / "pics" / "b.jpg")
    Image.fromarray(noise[0]).save(tmp_path / "outside.png")
    return folder


def _row(**changes: Any) -> dict[str, Any]:
    row = {
        "id": "bad",
        "source": "demo",
        "query": {"instruction": "Find it.", "text": "camel", "images": ["pics/a.png"]},
        "positive": {"images": ["pics/b.jpg"]},
        "negatives": [{"text": "pizza"}],
        "query_cot": "it is up",
    }
    row.update(changes)
    return {key: value for key, value in row.items() if value is not ...}


GOOD = _row(id="good")


def _write_lines(root: Path, *rows: dict[str, Any] | str | bytes) -> Path:
    path = root / "records.jsonl"
    lines = [row if isinstance(row, str | bytes) else json.dumps(row) for row in rows]
    path.write_bytes(b"\n".join(x.encode() if isinstance(x, str) else x for x in lines))
    return path


def _records() -> list[Record]:
    return [
        Record(
            id="1",
            source="demo",
            query=Item(instruction="Find it.", text="camel ü", images=("pics/a.png",)),
            positive=Item(text="x", video=("pics/a.png", "pics/b.jpg")),
            negatives=(Item(text="pizza"), Item(images=(Path("pics/b.jpg"),))),
            query_cot="it is up",
            metadata={"hops": 2, "pool": ["a", {"b": None}], "noise": 0.5},
        ),
        Record(id="2", source="demo", query=Item(text="q"), positive=Item(text="p")),
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_written_records_come_back(root: Path, suffix: str) -> None:
    path = root / f"records{suffix}"
    write_records(path, iter(_records()))
    loaded = load_records(path)
    assert len(loaded) == 2
    assert loaded[1] == _records()[1]
    first, original = loaded[0], _records()[0]
    assert first.query.images == (str(root / "pics/a.png"),)
    assert first.metadata == original.metadata
    assert first.query_cot == "it is up"
    write_records(root / f"again{suffix}", loaded)  # absolute paths become relative again
    assert load_records(root / f"again{suffix}")[0] == first
    assert not list(root.glob(".*")), "temporary files must be gone"


def test_to_dict_and_from_dict_are_inverse() -> None:
    for record in _records():
        assert Record.from_dict(record.to_dict()) == record
        assert Record.from_dict(json.loads(json.dumps(record.to_dict()))) == record


def test_records_hold_paths_and_load_opens_rgb_images(root: Path) -> None:
    records = load_records(_write_lines(root, GOOD))
    assert all(isinstance(source, str) for source in records[0].query.images)
    loaded = records.load(0)
    (picture,) = loaded.query.images
    assert isinstance(picture, Image.Image)
    assert (picture.mode, picture.size) == ("RGB", (32, 32))
    assert loaded.query.content_key() == records[0].query.content_key()
    assert isinstance(records[0].query.images[0], str)


def test_slices_and_limits_give_fewer_records(root: Path) -> None:
    path = _write_lines(root, *(_row(id=str(i)) for i in range(5)))
    assert [record.id for record in load_records(path)[1:3]] == ["1", "2"]
    assert [record.id for record in load_records(path, limit=2)] == ["0", "1"]


BAD_ROWS: dict[str, tuple[dict[str, Any] | str | bytes, str, str]] = {
    "missing field": (_row(positive=...), "missing_field", "field positive: positive is missing"),
    "null field": (_row(query=None), "missing_field", "field query: query is null"),
    "blank id": (_row(id=" "), "bad_type", "field id: "),
    "number as id": (_row(id=7), "bad_type", "field id: value = 7 of type int"),
    "number as text": (_row(positive={"text": 3}), "bad_type", "field positive.text: value = 3"),
    "null image": (_row(query={"images": [None]}), "bad_type", "field query.images[0]: "),
    "one image": (_row(query={"images": "pics/a.png"}), "bad_type", "field query.images: "),
    "negatives": (_row(negatives={"text": "x"}), "bad_type", "field negatives: "),
    "blank cot": (_row(query_cot=" "), "bad_type", "field query_cot: "),
    "metadata": (_row(metadata=[1]), "bad_type", "field metadata: "),
    "a list": ("[1, 2]", "bad_type", "row 2: value = [1, 2]"),
    "NaN": (_row(query_cot=math.nan), "bad_json", "without NaN or Infinity"),
    "cut line": ('{"id": "x", ', "bad_json", "no valid JSON"),
    "bad UTF-8": (b'{"id": "\xff\xfe"}', "bad_json", "no valid JSON"),
    "empty text": (_row(positive={"text": " "}), "empty_item", "field positive.text: text = ' '"),
    "no content": (_row(positive={"instruction": "x"}), "empty_item", "field positive.text: "),
    "missing image": (_row(query={"images": ["no.png"]}), "missing_image", "query.images[0]: "),
    "folder": (_row(query={"images": ["pics"]}), "missing_image", "does not exist"),
    "NUL byte": (_row(query={"images": ["a\0.png"]}), "missing_image", "no usable path"),
    "long name": (_row(query={"images": ["a" * 5000]}), "missing_image", "no usable path"),
    "unreadable": (_row(query={"video": ["text.png"]}), "unreadable_image", "query.video[0]: "),
    "truncated": (_row(negatives=[{"images": ["cut.png"]}]), "unreadable_image", "cannot be deco"),
    "bomb": (_row(query={"images": ["bomb.png"]}), "unreadable_image", "pixels"),
    "dots": (_row(query={"images": ["../outside.png"]}), "path_outside_root", "leads outside"),
    "absolute": (_row(query={"images": ["/etc/hostname"]}), "path_outside_root", "is absolute"),
    "symlink": (_row(query={"images": ["link.png"]}), "path_outside_root", "leads outside"),
    "URL": (_row(query={"images": ["HTTPS://x.org/a.png"]}), "url", "remote images are never"),
    "data URL": (_row(query={"images": ["data:image/png;base64,AA"]}), "url", "never fetched"),
    "duplicate id": (_row(id="good"), "duplicate_id", "field id: id = 'good' was used in row 1"),
    "own positive": (
        _row(negatives=[{"text": "pizza"}, {"images": ["pics/copy.png"]}]),
        "positive_in_negatives",
        "field negatives[1]: ",
    ),
    "misspelt field": (_row(negative=[]), "unknown_field", "is it 'negatives'?"),
    "item typo": (_row(query={"text": "x", "image": "a"}), "unknown_field", "field query.image: "),
    "twice": (_row(hops=1, metadata={"hops": 2}), "unknown_field", "metadata has the same key"),
}


@pytest.fixture
def traps(root: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data root with every kind of bad picture."""
    whole = (root / "pics" / "a.png").read_bytes()
    (root / "cut.png").write_bytes(whole[: len(whole) // 2])
    (root / "text.png").write_text("not a picture")
    (root / "link.png").symlink_to(root.parent / "outside.png")
    Image.open(root / "pics" / "b.jpg").save(root / "pics" / "copy.png")
    Image.new("1", (100, 100)).save(root / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 9_000)
    return root


@pytest.mark.parametrize("kind", BAD_ROWS)
def test_a_bad_row_raises_or_is_a_counted_skip_that_names_everything(
    traps: Path, kind: str
) -> None:
    row, reason, message = BAD_ROWS[kind]
    path = _write_lines(traps, GOOD, row, _row(id="last"))
    with pytest.raises(RecordError) as raised:
        load_records(path)
    error = raised.value
    assert (error.reason, error.file, error.row) == (reason, path, 2)
    assert str(error).startswith(f"{path}, row 2")
    assert message in str(error)
    assert "expected" in str(error)
    assert str(error).count(";") >= 2, "what is wrong; what was expected; what to do"

    loaded = load_records(path, on_bad_record="skip")
    assert [record.id for record in loaded] == ["good", "last"]
    assert loaded.skipped == {reason: 1}
    assert loaded.skipped_rows == [(2, str(error))]


def test_symbolic_links_inside_the_data_root_are_fine(root: Path) -> None:
    (root / "link.png").symlink_to(root / "pics" / "a.png")
    assert len(load_records(_write_lines(root, _row(query={"images": ["link.png"]})))) == 1


def test_a_wider_data_root_admits_more_paths(root: Path) -> None:
    row = _row(query={"images": ["outside.png"]}, positive={"text": "x"})
    assert len(load_records(_write_lines(root, row), data_root=root.parent)) == 1


def test_unknown_fields_are_kept_in_metadata_and_counted(root: Path) -> None:
    rows = _row(id="1", hops=2, metadata={"pool": "x"}), _row(id="2", hops=1), _row(id="3")
    records = load_records(_write_lines(root, *rows))
    assert records[0].metadata == {"pool": "x", "hops": 2}
    assert records.metadata_fields == {"hops": 2}


def test_blank_lines_and_a_byte_order_mark_are_tolerated(root: Path) -> None:
    path = _write_lines(root, b"\xef\xbb\xbf" + json.dumps(GOOD).encode(), "", "  ", _row(id="2"))
    assert len(load_records(path)) == 2


def test_a_file_without_usable_records_is_an_error_that_names_the_first_problem(root: Path) -> None:
    with pytest.raises(RecordError, match=r"usable records = 0 of 1 rows.*field positive"):
        load_records(_write_lines(root, _row(positive=...)), on_bad_record="skip")
    with pytest.raises(RecordError, match="usable records = 0"):
        load_records(_write_lines(root))


def test_files_of_another_kind_are_refused(root: Path) -> None:
    with pytest.raises(RecordError, match=r"expected \.jsonl or \.parquet"):
        load_records(root / "records.csv")
    with pytest.raises(FileNotFoundError):
        load_records(root / "none.jsonl")
    with pytest.raises(FileNotFoundError):
        load_records(root / "none.parquet")
    (root / "broken.parquet").write_text("not parquet")
    with pytest.raises(RecordError, match="no readable Parquet"):
        load_records(root / "broken.parquet")
    with pytest.raises(ValueError, match="expected 'raise' or 'skip'"):
        load_records(_write_lines(root, GOOD), on_bad_record="ignore")  # pyright: ignore


def test_json_lines_need_no_pyarrow(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "twn_rl.data.parquet", raising=False)
    assert len(load_records(_write_lines(root, GOOD))) == 1
    with pytest.raises(ModuleNotFoundError, match=r"pyarrow is missing.*pip install"):
        write_records(root / "r.parquet", _records())


def test_parquet_rows_with_nan_and_struct_metadata_are_checked_alike(root: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": "1", "source": "s", "query": {"text": "q"}, "positive": {"text": "p"}},
        {"id": "2", "source": "s", "query": {"text": "q"}, "positive": {"text": "p"}},
    ]
    rows[0] |= {"query_cot": None, "metadata": {"hops": 1}}
    rows[1] |= {"query_cot": math.nan, "metadata": {"hops": 2}}
    pq.write_table(pa.Table.from_pylist(rows), root / "r.parquet")
    records = load_records(root / "r.parquet", on_bad_record="skip")
    assert records[0].metadata == {"hops": 1}
    assert records.skipped == {"bad_type": 1}
    assert "row 2, field query_cot: value = nan" in records.skipped_rows[0][1]


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_failed_write_leaves_the_old_file_and_no_other(root: Path, suffix: str) -> None:
    path = root / f"records{suffix}"
    write_records(path, _records())
    before = path.read_bytes()
    unwritable = {
        "opened picture": Item(images=(Image.new("RGB", (2, 2)),)),
        "outside the data root": Item(images=(root.parent / "outside.png",)),
        "without images": Item(),
    }
    for message, item in unwritable.items():
        bad = Record(id="b", source="s", query=item, positive=Item(text="p"))
        with pytest.raises(RecordError, match=rf"record 'b': .*{message}"):
            write_records(path, [*_records(), bad])
    for value in (math.nan, object()):
        bad = Record("b", "s", Item(text="q"), Item(text="p"), metadata={"x": value})
        with pytest.raises(RecordError, match="JSON cannot hold it"):
            write_records(path, [*_records(), bad])
    assert path.read_bytes() == before
    assert not list(root.glob(".*"))


# Rows that stay in their file


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_records_are_read_again_in_any_order_and_in_other_processes(
    root: Path, suffix: str
) -> None:
    path = root / f"records{suffix}"
    long = "word ü " * 5000  # longer than a block of the reader
    rows = [
        Record(str(i), "s", Item(text=f"q{i}" + long * (i % 2), images=("pics/a.png",)), Item("p"))
        for i in range(7)
    ]
    rows = [Record(**{**vars(row), "positive": Item(text="p")}) for row in rows]
    write_records(path, rows)
    loaded = load_records(path)
    texts = [row.query.text for row in rows]
    assert [record.query.text for record in loaded] == texts
    assert [loaded[i].id for i in (-1, 3, -7)] == ["6", "3", "0"]
    assert [record.id for record in loaded[5:1:-2]] == ["5", "3"]
    for index in (7, -8):
        with pytest.raises(IndexError):
            loaded[index]
    again = pickle.loads(pickle.dumps(loaded[1:]))
    assert list(again) == list(loaded)[1:]
    assert again.load(0).query.images[0].size == (32, 32)
    batches = DataLoader(loaded, batch_size=3, num_workers=2, collate_fn=list)  # pyright: ignore
    assert [record.query.text for batch in batches for record in batch] == texts


def test_a_set_of_records_holds_no_texts(root: Path) -> None:
    row = _row(query={"text": "word " * 400}, metadata={"more": "x" * 2000})
    path = _write_lines(root, *({**row, "id": str(i)} for i in range(500)))
    tracemalloc.start()
    try:
        loaded = load_records(path)
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(loaded) == 500
    assert held < path.stat().st_size / 10


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_that_changed_since_it_was_verified_is_refused(root: Path, suffix: str) -> None:
    path = root / f"records{suffix}"
    write_records(path, _records())
    loaded = load_records(path)
    travelled = pickle.dumps(loaded)
    write_records(path, [*_records(), Record("3", "s", Item(text="q"), Item(text="p"))])
    assert loaded[1] == _records()[1], "the old file is still open"
    with pytest.raises(RecordError, match=r"mtime.*expected.*load the records again"):
        pickle.loads(travelled)[0]
    if suffix == ".jsonl":
        loaded = load_records(path)
        with path.open("a") as file:
            file.write("\n")
        with pytest.raises(RecordError, match=r"expected .* as when the file was verified"):
            loaded[0]


def test_an_image_that_went_away_is_named_on_access(root: Path) -> None:
    loaded = load_records(_write_lines(root, GOOD))
    (root / "pics" / "a.png").unlink()
    with pytest.raises(ImageError, match=r"a\.png.*does not exist"):
        loaded.load(0)


def test_rows_of_a_large_parquet_file_lie_in_a_mapped_copy(
    root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, copy = root / "r.parquet", root / "r.parquet.rows.arrow"
    write_records(path, _records())
    expected = list(load_records(path))
    assert not copy.exists(), "a small file needs none"
    monkeypatch.setattr(parquet_rows, "_IN_MEMORY_BYTES", 0)
    assert list(load_records(path)) == expected
    written = copy.stat().st_mtime_ns
    loaded = load_records(path)
    assert list(pickle.loads(pickle.dumps(loaded))) == expected
    assert copy.stat().st_mtime_ns == written, "the copy is reused"
    write_records(path, _records()[1:])
    assert [record.id for record in load_records(path)] == ["2"]
    copy.unlink()
    copy.mkdir()  # so that it cannot be written
    assert [record.id for record in load_records(path)] == ["2"]
    assert "stay in memory" in caplog.text
    assert not list(root.glob(".*"))


# Images


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the pictures decoded since the list was last cleared."""
    opened: list[str] = []
    original = images.open_image
    monkeypatch.setattr(shared_verification, "STORED_FROM_PICTURES", 1)
    monkeypatch.setattr(
        images, "open_image", lambda p, r=None: opened.append(Path(p).name) or original(p, r)
    )
    return opened


def _forget() -> None:
    """Bring the module to the state of a new process."""
    images._remembered.clear()
    images._others.clear()


def test_verified_images_are_not_decoded_again_by_the_next_process(
    root: Path, decoded: list[str]
) -> None:
    path = _write_lines(root, GOOD)
    keys = [load_records(path)[0].positive.content_key()]
    assert sorted(decoded) == ["a.png", "b.jpg"]
    decoded.clear()
    _forget()
    keys.append(load_records(path, data_root=root.parent / "data")[0].positive.content_key())
    assert decoded == []
    assert keys[0] == keys[1]
    root.rename(root.parent / "moved")
    _forget()
    load_records(root.parent / "moved" / "records.jsonl")
    assert decoded == []


def test_an_image_that_changed_is_verified_again(root: Path, decoded: list[str]) -> None:
    path = _write_lines(root, GOOD)
    load_records(path)
    decoded.clear()
    (root / "pics" / "a.png").write_text("not a picture")
    for _ in range(2):  # a bad picture is never remembered as a good one
        _forget()
        with pytest.raises(RecordError, match="cannot be decoded"):
            load_records(path)
    assert set(decoded) == {"a.png"}


@pytest.mark.parametrize("content", [b"", b"nonsense", bytes(64), b"\x10" + bytes(7) + b"[]" * 9])
def test_damaged_findings_are_logged_and_made_anew(
    root: Path, decoded: list[str], content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write_lines(root, GOOD)
    load_records(path)
    (stored,) = (root / "records.jsonl.verified").glob("*/*.safetensors")
    whole = stored.read_bytes()
    for damaged in (content, whole[: len(whole) // 2], whole[:-1]):
        stored.write_bytes(damaged)
        _forget()
        decoded.clear()
        caplog.clear()
        assert load_records(path)[0].id == "good"
        assert "is not usable" in caplog.text
        assert sorted(decoded) == ["a.png", "b.jpg"]
    assert stored.read_bytes() == whole


def test_findings_that_cannot_be_written_are_only_logged(
    root: Path, decoded: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    path = _write_lines(root, GOOD)
    (root / "records.jsonl.verified").write_text("in the way")
    assert len(load_records(path)) == 1
    assert "cannot be written" in caplog.text
    assert not [name for name in os.listdir(root) if name.endswith(".tmp")]


def test_each_distinct_image_is_decoded_once(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    _forget()
    original = images.open_image
    monkeypatch.setattr(images, "open_image", lambda p, r=None: opened.append(p) or original(p, r))
    rows = [_row(id=str(i), negatives=[{"images": ["pics/a.png"]}]) for i in range(50)]
    records = load_records(_write_lines(root, *rows))
    assert [record.positive.content_key() for record in records]
    assert sorted(Path(path).name for path in opened) == ["a.png", "b.jpg"]


def test_long_verification_shows_progress(
    root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write_lines(root, GOOD)
    load_records(path)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(shared_verification, "PROGRESS_AFTER_SECONDS", 0)
    load_records(path)
    assert capsys.readouterr().err == "", "a bar is for terminals"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    load_records(path)
    shown = capsys.readouterr().err
    assert "Verifying records.jsonl: 100%" in shown
    assert "00:00" in shown, "the time left"


def test_content_keys_follow_pixels_and_every_field(root: Path) -> None:
    picture = str(root / "pics/a.png")
    item = Item(instruction="i", text="t", images=(picture,))
    assert item.content_key() == item.load().content_key()
    assert item.content_key() == Item("i", "t", ("pics/a.png",)).content_key(data_root=root)
    assert item.content_key() == Item("i", "t", (root.parent / "outside.png",)).content_key()
    others = [
        Item("i", "u", (picture,)),
        Item("j", "t", (picture,)),
        Item("i", "t"),
        Item("i", "t", (), (picture,)),
        Item("i", "t", (picture, picture)),
        Item("it", None, (picture,)),
    ]
    assert len({item.content_key(), *(other.content_key() for other in others)}) == 7


def test_transparency_becomes_white_and_orientation_is_applied(tmp_path: Path) -> None:
    Image.new("RGBA", (2, 2), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_image("clear.png", tmp_path).getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turn by 90 degrees
    Image.new("RGB", (4, 2)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_image(tmp_path / "turned.jpg").size == (2, 4)


def test_a_changed_file_has_another_digest_and_bad_sources_are_named(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 2)).save(path)
    before = image_digest(path)
    Image.new("RGB", (40, 20), "red").save(path)
    assert image_digest(path) != before
    for call in (open_image, image_digest):
        with pytest.raises(ImageError, match="does not exist"):
            call(tmp_path / "none.png")
        with pytest.raises(ImageError, match="never fetched"):
            call("http://x.org/a.png")
