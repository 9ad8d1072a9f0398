"""Records, files of data and files of vectors: each bad row named, nothing mixed, nothing lost."""

import json
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hostile.judging import Outcome, attempt, judge
from hostile.table import Tally, Verdict
from hostile.test_inputs import QUICK_AND_ALL
from hostile.texts import damaged, hostile_json, hostile_texts, hostile_values, repeats_a_key
from twn_rl.data.formats.input_files import read_file
from twn_rl.data.markup import KNOWN_MARKUP, unusable_in
from twn_rl.data.mixture import is_mixture, load_mixture
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import load_records, write_records
from twn_rl.inference.vector_files import VectorWriter, open_vectors
from twn_rl.inference.vector_meta import details_path, meta_path

COUNTS = {
    "records": {"quick": 60, "all": 200},
    "data files": {"quick": 40, "all": 150},
    "vector files": {"quick": 24, "all": 90},
}
GOOD = [
    Record(f"good{n}", "t", Item("find", f"question {n}"), Item(text=f"answer {n}"), query_cot="so")
    for n in range(3)
]
FIELDS = ("id", "source", "query", "positive", "negatives", "query_cot", "positive_cot", "metadata")


def hostile_rows(seed: int, count: int) -> Iterator[bytes]:
    """Yield lines of a file of records that are hostile in one place."""
    die = random.Random(seed)
    texts, values = hostile_texts(seed, count), hostile_values(seed, count)
    plain = GOOD[0].to_dict() | {"id": "hostile", "query_cot": "left of it"}
    for case in range(count):
        text, value, way = next(texts), next(values), case % 6
        row = json.loads(json.dumps(plain))
        if way == 0:
            row[die.choice(FIELDS)] = value
        elif way == 1:
            name = die.choice(["id", "source", "query_cot", "positive_cot"])
            row[name] = text
        elif way == 2:
            side = die.choice(["query", "positive"])
            row[side][die.choice(["text", "instruction", "images", "video", "more"])] = die.choice(
                [text, value, [text], [value], ["../x.png"], ["/dev/zero"], ["http://a/b.png"]]
            )
        elif way == 3:
            row["metadata"] = {
                die.choice(["pool", "task", "hops", text]): die.choice([text, value])
            }
        elif way == 4:
            yield hostile_json(die, row).encode("utf-8", "surrogatepass")
            continue
        else:
            yield damaged(json.dumps(row).encode(), die).replace(b"\n", b" ")
            continue
        yield json.dumps(row).encode()


def wrong_records(records: Any, line: bytes) -> str:
    """Return what is wrong with what was loaded of a good, a hostile and two good rows."""
    loaded = [records[place] for place in range(len(records))]
    good = [record for record in loaded if record.id.startswith("good")]
    if [record.id for record in good] != [record.id for record in GOOD]:
        return f"lost: {len(good)} good records of {len(GOOD)}"
    if good != GOOD:
        return "mixed: a good record was changed"
    others = [record for record in loaded if not record.id.startswith("good")]
    if len(others) > 1:
        return "one row gave several records"
    if others and repeats_a_key(line):
        return "one of two values of a key was taken"
    for record in others:
        row = json.loads(line)
        given = (row["id"], row["source"], row["query"].get("text"), row.get("query_cot"))
        if (record.id, record.source, record.query.text, record.query_cot) != given:
            return "the record is not what its row says"
        if unusable_in(record.to_dict(), "record"):
            return "an unusable character was accepted"
        if any(KNOWN_MARKUP.found(cot or "") for cot in (record.query_cot, record.positive_cot)):
            return "a thought with markup was accepted"
    return ""


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_records(tally: Tally, tmp_path: Path, size: str) -> None:
    good = [json.dumps(record.to_dict()).encode() for record in GOOD]
    for case, line in enumerate(hostile_rows(21, COUNTS["records"][size])):
        path = tmp_path / f"records{case}.jsonl"
        path.write_bytes(b"\n".join([good[0], line, *good[1:]]) + b"\n")
        skipped = attempt(lambda path=path: load_records(path, on_bad_record="skip"))
        verdict = judge(skipped, [path.name], lambda rows, line=line: wrong_records(rows, line))
        if verdict[0] is Verdict.HANDLED and skipped.error is None and skipped.result.errors:
            # What "skip" counts is an error of this row under "raise".
            raised = attempt(lambda path=path: load_records(path))
            verdict = judge(raised, [f"{path.name}, row 2"], lambda _: "not raised", (RecordError,))
        elif skipped.error is None and line.strip() and len(skipped.result) != 4:
            verdict = Verdict.SILENT, "the row is neither a record nor an error"
        tally.add("records", f"{case}: {line[:60]!a}", *verdict)
    tally.check(at_least=COUNTS["records"][size])


def read_rows(path: Path) -> list[Any]:
    """Return the rows of a file, as conversions and mixtures read them."""
    if is_mixture(path):
        return list(load_mixture(path))
    if path.suffix in (".jsonl", ".parquet") and path.stem.startswith("records"):
        return list(load_records(path, on_bad_record="skip"))
    return [row for _, row in read_file(path)]


def irregular(path: Path, die: random.Random) -> None:
    """Put something that is no regular file where a file is expected."""
    way = die.randrange(4)
    if way == 0:
        os.mkfifo(path)
    elif way == 1:
        path.symlink_to(die.choice(["/dev/zero", "/dev/random", "/dev/full"]))
    elif way == 2:
        path.mkdir()
    else:
        path.symlink_to(path.name)  # a link to itself


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_data_files(tally: Tally, tmp_path: Path, size: str) -> None:
    import pyarrow as pa

    rows = [record.to_dict() for record in GOOD]
    write_records(tmp_path / "records.parquet", GOOD)
    with pa.OSFile(str(tmp_path / "rows.arrow"), "wb") as sink:
        table = pa.table({"text": ["a", "b"], "id": ["1", "2"]})
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
    whole = {
        "records.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "rows.json": json.dumps(rows).encode(),
        "rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode(),
        "records.parquet": (tmp_path / "records.parquet").read_bytes(),
        "rows.parquet": (tmp_path / "records.parquet").read_bytes(),
        "rows.arrow": (tmp_path / "rows.arrow").read_bytes(),
        "mixture.yaml": b"sources:\n  - {path: records.jsonl, weight: 2}\n",
    }
    (tmp_path / "records.jsonl").write_bytes(whole["records.jsonl"])
    die, count = random.Random(22), COUNTS["data files"][size]
    for case in range(count):
        name = sorted(whole)[case % len(whole)]
        stem, suffix = name.split(".")
        path = tmp_path / f"{stem}{case}.{suffix}"
        if case % 8 == 7:
            irregular(path, die)
        else:
            path.write_bytes(damaged(whole[name], die))
        outcome = attempt(lambda path=path: read_rows(path))

        def complaint(found: list[Any]) -> str:
            # Without a checksum a changed letter is another text, but there are never more rows.
            return "" if len(found) <= 2 * len(rows) + 60 else f"{len(found)} rows"

        tally.add("data files", f"{path.name}", *judge(outcome, [path.name], complaint))
    tally.check(at_least=count)


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_vector_files(tally: Tally, tmp_path: Path, size: str) -> None:
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
    details = [{"id": f"row{n}", "error": None} for n in range(6)]
    die, count = random.Random(23), COUNTS["vector files"][size]
    for case in range(count):
        path = tmp_path / str(case) / "index.npy"
        path.parent.mkdir()
        with VectorWriter(path, vectors.shape, {"model": {"space": "s"}}) as writer:
            writer.append(vectors, details, {})
        before = open_vectors(path)
        assert before.ids[5] == "row5"
        victim = (path, details_path(path), meta_path(path))[case % 3]
        content = victim.read_bytes()
        if case % 7 == 6:
            victim.unlink()
            irregular(victim, die)
        elif case % 5 == 4 and victim != path:
            lines = content.decode().splitlines()
            value = json.loads(lines[0]) if victim.suffix == ".jsonl" else json.loads(content)
            text = hostile_json(die, value)
            victim.write_text("\n".join([text, *lines[1:]]) if victim.suffix == ".jsonl" else text)
        elif case % 11 == 10:
            np.save(path, np.array([{"a": 1}] * 6, dtype=object), allow_pickle=True)
        else:
            victim.write_bytes(damaged(content, die))
        outcome = attempt(lambda path=path: open_vectors(path))

        def complaint(found: Any, victim: Path = victim, path: Path = path) -> str:
            if found.vectors.dtype != np.float32 or found.vectors.ndim != 2:
                return f"{found.vectors.dtype} {found.vectors.shape}"
            if len(found.ids) != len(found.vectors) or len(found.is_usable) != len(found.vectors):
                return "ids or flags of another length"
            if victim != path and found.space is not None and not found.vectors.flags.writeable:
                is_same = np.array_equal(found.vectors, vectors)
                return "" if is_same else "other vectors"
            return ""

        name = f"{case}: {victim.name}"
        tally.add("vector files", name, *judge(outcome, ["index."], complaint))
    tally.check(at_least=count)


def test_lost_and_mixed_records_are_seen() -> None:
    line = json.dumps(GOOD[0].to_dict() | {"id": "other"}).encode()
    hostile = Record.from_dict(json.loads(line))
    whole = [GOOD[0], hostile, *GOOD[1:]]
    assert judge(Outcome(result=whole), [], lambda rows: wrong_records(rows, line)) == (
        Verdict.HANDLED,
        "",
    )
    changed = replace(GOOD[2], query=hostile.query)
    for rows, verdict in (
        (whole[:-1], Verdict.LOST),
        ([*whole[:-1], changed], Verdict.MIXED),
        ([GOOD[0], replace(hostile, source="x"), *GOOD[1:]], Verdict.SILENT),
    ):
        found = judge(Outcome(result=rows), [], lambda rows: wrong_records(rows, line))
        assert found[0] is verdict


def test_an_outcome_without_a_place_is_not_handled() -> None:
    for error in (ValueError("bad"), KeyError("a.npy"), RecursionError("a.npy")):
        assert Outcome(error=error).refused(["a.npy"])[0] is Verdict.ESCAPED
    assert Outcome(error=ValueError("a.npy is bad")).refused(["a.npy"])[0] is Verdict.HANDLED
