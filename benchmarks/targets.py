"""What a step's similarities cost over banks of many targets: time, memory, exactness.

    python benchmarks/targets.py --sizes 10000 100000 1000000 --threads 1

A bank of random unit vectors is written to `folder` for each size and type, and the rollouts of one
step (64, of 8 queries, with the 8 vectors without a thought) are compared with all of it: at once,
as one would write it by hand, and by `similarity_columns`. All arms take turns in one process.
Sizes that do not fit on the disk, or arms that do not fit in memory, are left out and say why.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from twn_rl.metrics.ranking import TIE_TOLERANCE
from twn_rl.runtime.whole_files import map_file, write_array_header
from twn_rl.training.bank_product import Asked, BankProduct
from twn_rl.training.bank_rows import BLOCK_ROWS, FILE_TYPES, to_stored
from twn_rl.training.candidate_pools import CandidatePools, audit
from twn_rl.training.similarity_columns import similarity_columns
from twn_rl.training.target_bank import TargetBank

QUERIES, ROLLOUTS, NEGATIVES = 8, 64, 16
NUM_CANDIDATES = 1024
PROCESSES = 8  # of the arm that shows the share of one of them
BASE_ROWS = 65_536
EXACT_ROWS = 200_000  # rows that are also compared in float64
Columns = dict[str, list[Any]]


@dataclass
class Step:
    """What a step compares with the bank: 8 queries without a thought, then 64 thoughts.

    Attributes:
        vectors: (72, D).
        positives: Row of each.
        numbers: Query of each.
    """

    vectors: Tensor
    positives: list[int]
    numbers: list[int]

    def ids(self) -> list[str]:
        """Return the positives' ids."""
        return [str(row) for row in self.positives]


def main() -> None:
    """Write banks, time the arms, print a table for each size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"], choices=FILE_TYPES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=None, help="default: a temporary one")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{ROLLOUTS} rollouts and {QUERIES} baselines x targets x {arguments.width},")
    print(f"{arguments.threads} threads, medians of {arguments.repeats}\n")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
            measure_size(size, arguments, Path(name))


def measure_size(size: int, arguments: argparse.Namespace, folder: Path) -> None:
    """Measure all arms on banks of one size."""
    arms: dict[str, Callable[[], Columns]] = {}
    banks: dict[str, TargetBank] = {}
    for dtype in arguments.dtypes:
        needed = np.dtype(FILE_TYPES[dtype]).itemsize * size * arguments.width
        if needed > 0.9 * shutil.disk_usage(folder).free:
            print(f"{size:,} targets in {dtype}: {needed / 1e9:.1f} GB do not fit on the disk")
            continue
        banks[dtype] = write_bank(folder / dtype, size, arguments.width, dtype)
    if not banks:
        return
    step = make_step(next(iter(banks.values())))
    for dtype, bank in banks.items():
        arms |= arms_of(bank, dtype, step)
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    found: dict[str, Columns] = {}
    for repeat in range(arguments.repeats + 1):
        for name, arm in arms.items():
            started = time.perf_counter()
            found[name] = arm()
            if repeat:  # the first round warms up, and brings the file into memory if it fits
                seconds[name].append(time.perf_counter() - started)
    print(f"{size:,} targets")
    for name, values in seconds.items():
        bank = banks[name.split(",")[0]]
        note = apart(found[name], exact(bank, step)) if size <= EXACT_ROWS else ""
        spread = f"({min(values):.3f} to {max(values):.3f})"
        print(f"  {name:46s} {statistics.median(values):8.3f} s {spread:20s} {note}")
    for dtype, bank in banks.items():
        print(f"  {dtype}: {bank.embeddings.nbytes / 1e9:.2f} GB on disk")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(f"  most memory of this process so far, pages of files included: {peak:.1f} GB\n")


def arms_of(bank: TargetBank, dtype: str, step: Step) -> dict[str, Callable[[], Columns]]:
    """Return name -> function that compares the step with a bank."""
    arms: dict[str, Callable[[], Columns]] = {}
    if 4 * len(bank) * (bank.embeddings.shape[1] + 2 * ROLLOUTS) < 0.5 * free_memory():
        arms[f"{dtype}, at once, copied"] = lambda: at_once(bank, step)
    else:
        print(f"{len(bank):,} targets in {dtype}, at once: left out, memory is short")
    arms[f"{dtype}, in blocks from the file"] = lambda: similarity_columns(
        step.vectors, step.ids(), bank, num_negatives=NEGATIVES
    )
    each = -(-len(bank) // BLOCK_ROWS // PROCESSES) * BLOCK_ROWS
    share = range(min(len(bank), max(each, BLOCK_ROWS)))
    asked = [Asked(row, (row,), None) for row in step.positives]
    product = BankProduct(bank, NEGATIVES, BLOCK_ROWS, None, None)
    arms[f"{dtype}, share of one of {PROCESSES} processes"] = lambda: product.standings(
        step.vectors, asked, share
    ).columns(None)
    if len(bank) > 2 * NUM_CANDIDATES:
        arms[f"{dtype}, {NUM_CANDIDATES} candidates of each query"] = candidate_arm(bank, step)
    return arms


def candidate_arm(bank: TargetBank, step: Step) -> Callable[[], Columns]:
    """Return the arm that compares with candidates; say what finding them took, and the audit."""
    pools = CandidatePools(bank, NUM_CANDIDATES)
    asked = [Asked(row, (row,), None) for row in step.positives]
    started = time.perf_counter()
    pools.find(range(QUERIES), step.vectors[:QUERIES], asked[:QUERIES])
    seconds = time.perf_counter() - started

    def arm() -> Columns:
        return pools.columns(step.numbers, step.vectors, asked, NEGATIVES, None)

    whole = similarity_columns(step.vectors, step.ids(), bank, num_negatives=NEGATIVES)
    others = {name: np.mean(values[QUERIES:]) for name, values in audit(arm(), whole).items()}
    print(
        f"{len(bank):,} targets: candidates of {QUERIES} queries found in {seconds:.2f} s; "
        f"{others['is_other_margin']:.1%} of rollouts would get another margin, "
        f"{others['is_other_rank']:.1%} another rank"
    )
    return arm


def at_once(bank: TargetBank, step: Step) -> Columns:
    """Compare with all targets in one product, after copying them."""
    targets = bank.rows(np.arange(len(bank)), step.vectors.device)
    similarities = step.vectors @ targets.T
    rows = torch.arange(len(step.vectors))
    positive = similarities[rows, step.positives]
    similarities[rows, step.positives] = -torch.inf
    rivals = (similarities >= positive[:, None] - TIE_TOLERANCE).sum(1)
    return {
        "positive_similarity": positive.tolist(),
        "negative_similarities": similarities.topk(NEGATIVES, dim=1).values.tolist(),
        "target_rank": (1 + rivals).tolist(),
    }


def exact(bank: TargetBank, step: Step) -> Columns:
    """Compare in float64."""
    targets = bank.rows(np.arange(len(bank)), step.vectors.device).double()
    similarities = (step.vectors.double() @ targets.T).numpy()
    rows = np.arange(len(similarities))
    positive = similarities[rows, step.positives].copy()
    similarities[rows, step.positives] = -np.inf
    return {
        "positive_similarity": positive.tolist(),
        "negative_similarities": np.sort(similarities, axis=1)[:, : -NEGATIVES - 1 : -1].tolist(),
        "target_rank": (1 + (similarities >= positive[:, None] - TIE_TOLERANCE).sum(1)).tolist(),
    }


def apart(found: Columns, expected: Columns) -> str:
    """Say how far two results are apart; nothing for a share, which sees other targets."""
    names = ("positive_similarity", "negative_similarities")
    gaps = [np.abs(np.array(found[name]) - np.array(expected[name])).max() for name in names]
    ranks = np.mean(np.array(found["target_rank"]) != np.array(expected["target_rank"]))
    if gaps[1] > 1e-3:
        return ""
    return f"{max(gaps):.0e} from float64, {ranks:.1%} of ranks differ"


def make_step(bank: TargetBank) -> Step:
    """Return baselines, and rollouts that lie near them on the way to their positive."""
    generator = torch.Generator().manual_seed(1)

    def noise(count: int) -> Tensor:
        return normalize(torch.randn(count, bank.embeddings.shape[1], generator=generator), dim=1)

    own = torch.randint(0, len(bank), (QUERIES,), generator=generator)
    targets = bank.rows(own.numpy(), torch.device("cpu"))
    baselines = normalize(0.1 * targets + noise(QUERIES), dim=1)
    number = torch.arange(ROLLOUTS) // (ROLLOUTS // QUERIES)
    steps = 0.2 * torch.rand(ROLLOUTS, 1, generator=generator) * targets[number]
    rollouts = normalize(baselines[number] + steps + 0.3 * noise(ROLLOUTS), dim=1)
    numbers = [*range(QUERIES), *number.tolist()]
    return Step(torch.cat([baselines, rollouts]), own[numbers].tolist(), numbers)


def write_bank(folder: Path, size: int, width: int, dtype: str) -> TargetBank:
    """Return a bank of random unit vectors; blocks are the first one with its columns moved."""
    folder.mkdir()
    path, kind = folder / "embeddings.npy", FILE_TYPES[dtype]
    with path.open("wb") as file:
        write_array_header(file, (size, width), kind)
        for part in blocks(size, width):
            file.write(np.ascontiguousarray(to_stored(part, dtype), dtype=kind).data)
    bank = TargetBank(folder)
    vectors = map_file(path, (size, width), kind, mode="c")
    assert vectors is not None
    bank.embeddings = vectors
    bank.ids, bank.row_of = _Numbers(size), _Rows()  # type: ignore[assignment]
    return bank


def blocks(size: int, width: int) -> Iterator[Tensor]:
    """Yield `size` unit vectors in blocks."""
    generator = torch.Generator().manual_seed(0)
    base = normalize(torch.randn(min(size, BASE_ROWS), width, generator=generator), dim=1)
    for number, start in enumerate(range(0, size, BASE_ROWS)):
        yield base.roll(37 * number, dims=1)[: size - start].contiguous()


class _Numbers:
    """Ids of the targets: their numbers, without a string for each."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size


class _Rows:
    """Id -> row, the number itself."""

    def __getitem__(self, target_id: str) -> int:
        return int(target_id)

    def __contains__(self, target_id: object) -> bool:
        return True


def free_memory() -> float:
    """Return the bytes that can be had now."""
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))


if __name__ == "__main__":
    main()
