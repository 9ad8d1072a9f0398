"""Records of a file in blocks: verified once, by whoever comes first, and never believed stale."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from launching import ROOT
from PIL import Image

from twn_rl.data import images, jsonl, parquet
from twn_rl.data.images import image_facts
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import load_records, write_records
from twn_rl.data.verification import RowChecks, digests_of

SUFFIXES = [".jsonl", ".parquet"]
COUNT = 40


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of forty records has several blocks."""
    monkeypatch.setattr(jsonl, "_BLOCK_BYTES", 1500)
    monkeypatch.setattr(parquet, "_PARQUET_BATCH_ROWS", 3)
    monkeypatch.setattr(parquet, "_BLOCK_BATCHES", 2)


@pytest.fixture
def verified(monkeypatch: pytest.MonkeyPatch) -> list[range]:
    """The blocks that were verified since the list was last cleared."""
    seen: list[range] = []
    original = RowChecks.verify

    def verify(checks: RowChecks, block: range, *progress: Callable[[float], object]) -> object:
        seen.append(block)
        return original(checks, block, *progress)

    monkeypatch.setattr(RowChecks, "verify", verify)
    return seen


def draw(folder: Path, number: int, *, color: int | None = None) -> str:
    """Save a picture and return its name."""
    (folder / "pictures").mkdir(exist_ok=True)
    name = f"pictures/{number}.png"
    shade = number if color is None else color
    Image.new("RGB", (8, 8), (shade, 255 - shade, 0)).save(folder / name)
    return name


def some_records(folder: Path) -> list[Record]:
    """Forty records with six pictures."""
    return [
        Record(
            id=f"r{number}",
            source="test",
            query=Item("Find: it", f"word {number}", (draw(folder, number % 6),)),
            positive=Item(text=f"tree {number}"),
            negatives=(Item(text="shoe"),),
            query_cot="a thought" if number % 2 else None,
            metadata={"task": "words"},
        )
        for number in range(COUNT)
    ]


def forget() -> None:
    """Bring the module to the state of a new process."""
    images._remembered.clear()
    images._others.clear()


def edit_lines(path: Path, change: Callable[[list[dict[str, object]]], object]) -> None:
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_what_was_verified_once_is_read_again_without_looking_at_a_row(
    tmp_path: Path, suffix: str, verified: list[range], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"records{suffix}"
    write_records(path, some_records(tmp_path))
    first = load_records(path)
    assert len(verified) > 4
    assert [place for block in verified for place in (block.start, block.stop)] == sorted(
        place for block in verified for place in (block.start, block.stop)
    )
    verified.clear()
    forget()
    monkeypatch.setattr(images, "open_image", lambda *_: pytest.fail("decoded again"))
    again = load_records(path)
    assert verified == []
    assert list(again) == list(first)
    assert [record.id for record in again] == [f"r{number}" for number in range(COUNT)]
    facts = image_facts(str(tmp_path / "pictures" / "3.png"))
    assert (facts.width, facts.height) == (8, 8)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_digests_of_a_set_are_those_of_its_records(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"records{suffix}"
    write_records(path, some_records(tmp_path))
    records = load_records(path)
    for part in (records, records[5:31], records[::-3]):
        ids, contents = digests_of(part)
        stored = part.digests(range(len(part)))
        assert np.array_equal(stored[0], ids)
        assert np.array_equal(stored[1], contents)
    assert list(records.thoughts(range(3, 7))) == [
        (record.id, record.query_cot, record.positive_cot) for record in list(records)[3:7]
    ]


def test_a_file_that_is_touched_moved_or_copied_is_believed_and_a_changed_one_is_not(
    tmp_path: Path, verified: list[range]
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    path = folder / "records.jsonl"
    write_records(path, some_records(folder))
    load_records(path)
    folder.rename(tmp_path / "moved")
    path = tmp_path / "moved" / "records.jsonl"
    os.utime(path)
    verified.clear()
    assert load_records(path)[7].query.text == "word 7"
    assert verified == []
    with path.open("r+") as file:  # the same size, and another word in one block
        text = file.read()
        file.seek(text.index("tree 20"))
        file.write("TREE 20")
    assert load_records(path)[20].positive.text == "TREE 20"
    assert verified, "all of it: only the file as a whole has a hash"
    assert len(list((tmp_path / "moved" / "records.jsonl.verified").glob("*/plan.json"))) == 1


def test_another_data_root_is_another_verification(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows = [
        {**record.to_dict(), "query": {"images": [f"data/{record.query.images[0]}"]}}
        for record in some_records(folder)
    ]
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert len(load_records(path, data_root=tmp_path)) == COUNT
    with pytest.raises(RecordError, match=r"row 1, field query.images\[0\].*does not exist"):
        load_records(path)


def test_only_rows_with_a_changed_picture_are_verified_again(
    tmp_path: Path, verified: list[range]
) -> None:
    records = some_records(tmp_path)
    alone = draw(tmp_path, 77)
    records[25] = Record("r25", "test", Item(images=(alone,)), Item(text="tree"))
    path = tmp_path / "records.jsonl"
    write_records(path, records)
    before = load_records(path).digests(range(COUNT))[1]
    verified.clear()
    draw(tmp_path, 77, color=12)
    forget()
    after = load_records(path).digests(range(COUNT))[1]
    assert len(verified) == 1
    assert np.flatnonzero((before != after).any(axis=1)).tolist() == [25]
    (tmp_path / alone).write_text("no picture")
    for _ in range(2):
        forget()
        with pytest.raises(RecordError, match=r"row 26, field query.images\[0\].*cannot be deco"):
            load_records(path)
    (tmp_path / alone).unlink()
    with pytest.raises(RecordError, match=r"row 26.*does not exist"):
        load_records(path)


def test_a_picture_that_is_put_where_it_was_missing_makes_its_rows_usable(
    tmp_path: Path, verified: list[range]
) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path))
    (tmp_path / "pictures" / "5.png").unlink()
    without = load_records(path, on_bad_record="skip")
    assert without.skipped == {"missing_image": sum(n % 6 == 5 for n in range(COUNT))}
    draw(tmp_path, 5)
    assert len(load_records(path, on_bad_record="skip")) == COUNT
    verified.clear()
    assert len(load_records(path)) == COUNT
    assert verified == []


def bad_rows(rows: list[dict[str, object]]) -> None:
    rows[8]["negative"] = []
    rows[21]["positive"] = {"text": " "}
    rows[33]["id"] = "r3"


def test_bad_rows_of_all_blocks_are_named_by_their_rows(
    tmp_path: Path, verified: list[range]
) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path))
    edit_lines(path, bad_rows)
    path.write_text("\n \n" + path.read_text().replace("\n", "\n\n", 5))  # blank lines count
    lines = path.read_text().splitlines()
    for _ in range(2):
        records = load_records(path, on_bad_record="skip")
        assert records.skipped == {"unknown_field": 1, "empty_item": 1, "duplicate_id": 1}
        assert [record.id for record in records] == [
            f"r{number}" for number in range(COUNT) if number not in (8, 21, 33)
        ]
        rows = [row for row, _ in records.skipped_rows]
        assert [json.loads(lines[row - 1])["query"]["text"] for row in rows] == [
            "word 8",
            "word 21",
            "word 33",
        ]
        assert "'r3' was used in row 9" in records.skipped_rows[-1][1]
        with pytest.raises(RecordError, match=rf"row {rows[0]}, field negative: unknown field"):
            load_records(path)
        verified.clear()
    assert verified == []


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_rows_beyond_a_limit_are_not_looked_at(
    tmp_path: Path, suffix: str, verified: list[range]
) -> None:
    path = tmp_path / f"records{suffix}"
    records = [*some_records(tmp_path)[:30], *some_records(tmp_path)[:2]]  # ids come again
    write_records(path, records)
    assert len(load_records(path, limit=30)) == 30
    last = max(block.stop for block in verified)
    with pytest.raises(RecordError, match="row 31, field id"):
        load_records(path)
    assert last < max(block.stop for block in verified)


def test_the_first_bad_row_ends_the_work(tmp_path: Path, verified: list[range]) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path))
    edit_lines(path, bad_rows)
    with pytest.raises(RecordError, match="row 9"):
        load_records(path)
    assert max(block.stop for block in verified) < path.stat().st_size / 2


def test_a_small_file_leaves_nothing_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path)[:3])
    load_records(path)
    assert sorted(os.listdir(tmp_path)) == ["pictures", "records.jsonl"]


def test_findings_that_cannot_be_kept_cost_time_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path))
    (tmp_path / "records.jsonl.verified").write_text("in the way")
    for _ in range(2):
        assert len(load_records(path)) == COUNT
    assert "cannot be written" in caplog.text


def test_a_file_that_changes_while_it_is_verified_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "records.jsonl"
    write_records(path, some_records(tmp_path))
    original = Record.from_dict.__func__  # pyright: ignore

    def slowly(cls: type[Record], data: dict[str, object]) -> Record:
        if data["id"] == "r11":
            path.write_text(path.read_text() + "\n")
        return original(cls, data)

    monkeypatch.setattr(Record, "from_dict", classmethod(slowly))
    with pytest.raises(RecordError, match="as when the file was verified"):
        load_records(path)
    monkeypatch.undo()
    assert len(load_records(path)) == COUNT


SHARER = """
import json, sys
from pathlib import Path
from twn_rl.data import jsonl, verification
from twn_rl.data.record import RecordError
from twn_rl.launch.arguments import DataArguments
from twn_rl.runtime.processes import join_processes

jsonl._BLOCK_BYTES = 1500
seen, original = [], verification.RowChecks.verify
verification.RowChecks.verify = lambda *a: seen.append(a[1].start) or original(*a)
me, found = join_processes(use_cpu=True).process_index, []
for name in ("records", "records", "bad"):
    try:
        records = DataArguments(train_file=str(Path(sys.argv[1]) / f"{name}.jsonl")).load("train")
        found.append([len(records), [*seen], records[17].query.text])
    except RecordError as error:
        found.append(str(error))
    seen.clear()
Path(sys.argv[1], f"{me}.json").write_text(json.dumps(found))
"""


@pytest.mark.distributed
def test_two_processes_verify_each_block_once_and_hear_of_the_same_bad_row(
    tmp_path: Path,
) -> None:
    write_records(tmp_path / "records.jsonl", some_records(tmp_path))
    write_records(tmp_path / "bad.jsonl", some_records(tmp_path))
    edit_lines(tmp_path / "bad.jsonl", bad_rows)
    (tmp_path / "sharer.py").write_text(SHARER)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, "-m", *torchrun, str(tmp_path / "sharer.py"), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{me}.json").read_text()) for me in (0, 1))
    size = (tmp_path / "records.jsonl").stat().st_size
    assert sorted(one[0][1] + other[0][1]) == list(range(0, size, 1500))
    assert len(one[0][1]) > 2
    assert len(other[0][1]) > 2
    assert [COUNT, "word 17"] == [one[0][0], one[0][2]] == [other[0][0], other[0][2]]
    assert one[1][1] == other[1][1] == []
    assert "row 9, field negative" in one[2]
    assert one[2] == other[2]
