"""Start-up of a run on a corpus: seconds until records are ready, and memory of each process.

    python benchmarks/startup.py --counts 167000 1670000
    python benchmarks/startup.py --beside ../older_checkout   # old and new on the same files

Records are as MMEB's: an instruction, a text and a picture ask for a text; every other one has a
thought. Pictures are hard links to a few files, one name a record: each name is verified. Measured
is what a warm start does with records before its first step: loading, reading the thoughts, noting
what the records are. A first start finds nothing stored, the next one does. Memory is the largest
peak of a process, above what imports took. Seconds of the stages are CPU seconds of the process
that took most, its threads included; the last ones are by the clock.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import write_records

NUM_INODES = 500
WORDS = ["camel", "pizza", "zebra", "tree", "shoe", "lamp", "river", "cloud", "chair", "violin"]
STAGES = ("load", "thoughts", "describe")


def main() -> None:
    """Generate each file, start on it twice with each checkout, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--counts", type=int, nargs="+", default=[167_000, 1_670_000])
    parser.add_argument("--suffixes", nargs="+", default=[".jsonl", ".parquet"])
    parser.add_argument("--processes", type=int, nargs="+", default=[1])
    parser.add_argument("--beside", type=Path, help="another checkout to measure in the same run")
    parser.add_argument("--folder", help="where the files are made; else the temporary folder")
    parser.add_argument("--measure", type=Path, help="measure this file, print JSON")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(arguments.measure)
        return
    checkouts = {"this": Path(__file__).parents[1]}
    if arguments.beside:
        checkouts["beside"] = arguments.beside
    columns = ["file", "records", "processes", "checkout", "start", *(f"{n} s" for n in STAGES)]
    print("| " + " | ".join([*columns, "together s", "clock s", "peak MB"]) + " |")
    print("| --- | ---: | ---: | --- | --- |" + " ---: |" * 6)
    for suffix in arguments.suffixes:
        for count in arguments.counts:
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                path = write_file(Path(folder), count, suffix)
                for processes in arguments.processes:
                    for name, checkout in checkouts.items():
                        forget(path)
                        for start in ("first", "next"):
                            print_row(path, count, processes, name, checkout, start)


def print_row(
    path: Path, count: int, processes: int, name: str, checkout: Path, start: str
) -> None:
    """Start once, and print the row of it."""
    row = started(path, checkout, processes)
    seconds = [row[stage] for stage in STAGES]
    cells = " | ".join(f"{each:.1f}" for each in [*seconds, sum(seconds)])
    print(
        f"| {path.suffix} | {count:,} | {processes} | {name} | {start} | {cells} "
        f"| {row['clock']:.1f} | {row['peak']:.0f} |",
        flush=True,
    )


def forget(path: Path) -> None:
    """Remove what starts have left beside the records."""
    for left in path.parent.glob(f"{path.name}.*"):
        if left.is_dir():
            shutil.rmtree(left)
        else:
            left.unlink()


def started(path: Path, checkout: Path, processes: int) -> dict[str, float]:
    """Return the slowest seconds of each stage and the largest peak of `processes` processes."""
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone",
                                          f"--nproc_per_node={processes}"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, *launcher, __file__, "--measure", str(path)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(checkout), "ACCELERATE_USE_CPU": "true"},
    )
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or len(rows) != processes:
        raise RuntimeError(f"{path} on {checkout}: {done.stderr[-2000:]}")
    return {name: max(row[name] for row in rows) for name in rows[0]}


def measure(path: Path) -> None:
    """Print seconds of each stage and the peak memory in MB above the start."""
    from twn_rl.data.markup import KNOWN_MARKUP
    from twn_rl.data.verification import refuse_markup_in_thoughts
    from twn_rl.launch.arguments import DataArguments
    from twn_rl.runtime.processes import join_processes
    from twn_rl.training.seen_records import describe_records

    if path.suffix == ".parquet":
        import twn_rl.data.parquet  # noqa: F401  (loading imports it otherwise)
    processes = join_processes(use_cpu=True)
    markup = KNOWN_MARKUP.extended(f"<extra_{number}>" for number in range(200))
    before = peak_megabytes()
    began = time.perf_counter()
    times = [time.process_time()]
    records = DataArguments(train_file=str(path)).load("train")
    times.append(time.process_time())
    refuse_markup_in_thoughts(records, markup)
    times.append(time.process_time())
    if processes.is_main_process:
        describe_records(records, 0)
    times.append(time.process_time())
    found = dict(zip(STAGES, np.diff(times).tolist(), strict=True))
    clock = time.perf_counter() - began
    print(json.dumps({**found, "clock": clock, "peak": peak_megabytes() - before}), flush=True)


def peak_megabytes() -> float:
    """Return the most memory this program held; getrusage would count its parent's as well."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise OSError("/proc/self/status has no VmHWM; expected Linux; run there")


def write_file(folder: Path, count: int, suffix: str) -> Path:
    """Write `count` generated records and their pictures."""
    (folder / "inodes").mkdir()
    rng = np.random.default_rng(0)
    for number in range(NUM_INODES):
        pixels = rng.integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "inodes" / f"{number}.png")
    for number in range(count):
        name = folder / picture_name(number)
        if number % 1000 == 0:
            name.parent.mkdir(parents=True)
        os.link(folder / "inodes" / f"{number % NUM_INODES}.png", name)
    path = folder / f"records{suffix}"
    write_records(path, generated(count))
    return path


def picture_name(number: int) -> str:
    """Return where the picture of a record is."""
    return f"images/source_{number // 1000}/{number}.png"


def generated(count: int) -> Iterator[Record]:
    """Yield records of about 500 bytes."""
    rng = random.Random(0)
    for number in range(count):
        words = rng.choices(WORDS, k=60)
        yield Record(
            id=f"generated-{number}",
            source="generated",
            query=Item(
                "Find the answer to the question: ", " ".join(words[:15]), (picture_name(number),)
            ),
            positive=Item(text=f"{number} {' '.join(words[15:20])}"),
            query_cot=" ".join(words[20:]) if number % 2 else None,
            metadata={"task": "questions"},
        )


if __name__ == "__main__":
    main()
