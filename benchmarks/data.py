"""Memory and time of record files: lazy `RecordSet` against a list of `Record` objects.

    python benchmarks/data.py --counts 10000 100000 1000000

Records are generated: text only, three negatives, a CoT; a tenth share sixteen small pictures. Both
arms verify the same rows in a process of their own; peak memory is above what imports took, time is
CPU time of the process. Reading is 10,000 records in random order. Printed is a Markdown table with
ratios eager / lazy.
"""

from __future__ import annotations

import argparse
import importlib
import json
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import load_records, write_records
from twn_rl.data.verification import RecordChecks

NUM_PICTURES = 16
NUM_READS = 10_000
WORDS = ["camel", "pizza", "zebra", "tree", "shoe", "lamp", "river", "cloud", "chair", "violin"]


def main() -> None:
    """Generate each file, measure both arms, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--suffixes", nargs="+", default=[".jsonl", ".parquet"])
    parser.add_argument("--arm", choices=["eager", "lazy"], help="measure one arm, print JSON")
    parser.add_argument("--file", type=Path, help="file of that arm")
    arguments = parser.parse_args()
    if arguments.arm:
        print(json.dumps(measure(arguments.arm, arguments.file)))
        return
    print("| file | records | MB on disk | arm | peak MB | load CPU s | 10,000 reads CPU s |")
    print("| --- | ---: | ---: | --- | ---: | ---: | ---: |")
    for suffix in arguments.suffixes:
        for count in arguments.counts:
            with tempfile.TemporaryDirectory() as folder:
                path = write_file(Path(folder), count, suffix)
                print_rows(path, count)


def print_rows(path: Path, count: int) -> None:
    """Print the rows of one file: both arms, a second lazy load, and the ratio of the first two."""
    start = f"| {path.suffix} | {count:,} | {path.stat().st_size / 1e6:.0f} |"
    arms = {"eager list": "eager", "lazy, first load": "lazy", "lazy, next load": "lazy"}
    results = {}
    for name, arm in arms.items():
        command = [sys.executable, __file__, "--arm", arm, "--file", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        results[name] = json.loads(done.stdout)
        row = results[name]
        print(f"{start} {name} | {row['peak']:.1f} | {row['load']:.2f} | {row['read']:.2f} |")
    eager, lazy = results["eager list"], results["lazy, first load"]
    ratios = " | ".join(f"{eager[name] / lazy[name]:.2f}" for name in ("peak", "load", "read"))
    print(f"{start} ratio eager / lazy | {ratios} |", flush=True)


def measure(arm: str, path: Path) -> dict[str, float]:
    """Return peak memory in MB above the start, and CPU seconds of loading and of reading."""
    if path.suffix == ".parquet":
        importlib.import_module("twn_rl.data.parquet")  # loading imports it otherwise
    before = peak_megabytes()
    started = time.process_time()
    records: Sequence[Record] = load_records(path) if arm == "lazy" else load_eagerly(path)
    loaded = time.process_time()
    rng = random.Random(0)
    for _ in range(NUM_READS):
        records[rng.randrange(len(records))]
    read = time.process_time()
    return {"peak": peak_megabytes() - before, "load": loaded - started, "read": read - loaded}


def load_eagerly(path: Path) -> list[Record]:
    """Verify as `load_records` does, but keep every record as an object."""
    if path.suffix == ".parquet":
        from twn_rl.data.parquet import ParquetRows as Rows
    else:
        from twn_rl.data.jsonl import JsonLines as Rows
    check = RecordChecks(path, path.parent.resolve(), is_strict=True)
    rows = [(row, check.parse(row, data)) for row, _, data in Rows(path).scan()]
    check.decode_images()
    return [r for row, r in rows if r is not None and check.is_trainable(row, r)]


def peak_megabytes() -> float:
    """Return the most memory this program held; getrusage would count its parent's as well."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; expected Linux; run there")


def write_file(folder: Path, count: int, suffix: str) -> Path:
    """Write `count` generated records and their pictures."""
    (folder / "pictures").mkdir()
    for number in range(NUM_PICTURES):
        color = (16 * number, 255 - 16 * number, 128)
        Image.new("RGB", (32, 32), color).save(folder / "pictures" / f"{number}.png")
    path = folder / f"records{suffix}"
    write_records(path, generated(count))
    return path


def generated(count: int) -> Iterator[Record]:
    """Yield records of about 600 bytes."""
    rng = random.Random(0)
    for number in range(count):
        pictures = (f"pictures/{number % NUM_PICTURES}.png",) if number % 10 == 0 else ()
        yield Record(
            id=f"record-{number}",
            source="generated",
            query=Item("find the product", f"{number} {words(rng, 12)}", pictures),
            positive=Item(text=f"{number} {words(rng, 10)}"),
            negatives=tuple(Item(text=words(rng, 10)) for _ in range(3)),
            query_cot=words(rng, 15),
            metadata={"task": "products"},
        )


def words(rng: random.Random, count: int) -> str:
    """Return random words."""
    return " ".join(rng.choices(WORDS, k=count))


if __name__ == "__main__":
    main()
