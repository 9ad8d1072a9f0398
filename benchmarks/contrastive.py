"""Contrastive batches beyond memory: chunks, the whole batch, sentence-transformers' cached loss.

    python benchmarks/contrastive.py --batch_size 24 --factor 16 --rounds 3

Scenes of the embedded default with its backbone and both adapters, on one thread. Two kinds of
step: `pairs` is InfoNCE of (query, target) without thoughts, which sentence-transformers'
CachedMultipleNegativesRankingLoss does as well, on the same backbone, adapter and read-out; `warm
start` is the whole step of recipes/sft_embed.py, token loss and think vectors included. Every arm
sees the same records, in a process of its own, arms taking turns round by round. Time is that of
the training steps, from collated batches on; collating is a column of its own, since data loader
workers do it beside. Memory is the peak of the process above what it had before the first batch,
once with and once without the tensors of the collated batch, which wait on the host when there is a
GPU. Printed is a Markdown table with medians and ratios to the plain batch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from twn_rl.data.record import Item, Record
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.training.chunking import Chunks
from twn_rl.training.sft import SftConfig, SftTrainer

TEMPERATURE = 0.05
ARMS = {  # name: (kind of step, who computes it, whether the batch is large)
    "pairs, plain": ("pairs", "plain", False),
    "pairs, plain, large": ("pairs", "plain", True),
    "pairs, chunks, large": ("pairs", "chunks", True),
    "pairs, sentence-transformers, large": ("pairs", "cached", True),
    "warm start, plain": ("warm start", "plain", False),
    "warm start, plain, large": ("warm start", "plain", True),
    "warm start, chunks, large": ("warm start", "chunks", True),
}


def main() -> None:
    """Run all arms in turn, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--batch_size", type=int, default=24)
    parser.add_argument("--factor", type=int, default=16, help="large batch / plain batch")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="large steps a round")
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=list(ARMS))
    parser.add_argument("--arm", choices=list(ARMS), help="measure one arm, print JSON")
    parser.add_argument("--data", type=Path, help="folder of that arm's scenes")
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, float]]] = {name: [] for name in options.arms}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.rounds):
            for name in options.arms:
                found[name].append(run_arm(name, folder, options))
                print(f"round {number + 1}, {name}: {found[name][-1]}", file=sys.stderr)
    print_table(found)


def run_arm(name: str, folder: str, options: argparse.Namespace) -> dict[str, float]:
    """Measure one arm in a process of its own."""
    flags = {name: getattr(options, name) for name in ("batch_size", "factor", "steps")}
    words = [word for flag, value in flags.items() for word in (f"--{flag}", str(value))]
    command = [sys.executable, __file__, "--arm", name, "--data", folder, *words]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return json.loads(done.stdout.splitlines()[-1])


def print_table(found: dict[str, list[dict[str, float]]]) -> None:
    """Print medians over rounds, and ratios to the plain arm of the same kind of step."""
    names = ("batch", "ms_a_sample", "collate_ms_a_sample", "peak_mb", "batch_mb", "process_mb")
    medians = {
        arm: {key: statistics.median(row[key] for row in rows) for key in names}
        for arm, rows in found.items()
    }
    columns = ["step, arm", "batch", "ms a sample", "ratio", "collate ms a sample", "peak MB"]
    columns += ["ratio", "peak without batch MB", "ratio", "process MB", "ratio"]
    rows = []
    for arm, row in medians.items():
        plain = medians.get(f"{ARMS[arm][0]}, plain", row)
        bare, plain_bare = (r["peak_mb"] - r["batch_mb"] for r in (row, plain))
        own, base = row["ms_a_sample"], plain["ms_a_sample"]
        cells = [arm, f"{row['batch']:.0f}", f"{own:.2f}", f"{own / base:.2f}"]
        cells += [f"{row['collate_ms_a_sample']:.2f}", f"{row['peak_mb']:.0f}"]
        cells += [f"{row['peak_mb'] / plain['peak_mb']:.2f}", f"{bare:.0f}"]
        cells += [f"{bare / plain_bare:.2f}", f"{row['process_mb']:.0f}"]
        rows.append([*cells, f"{row['process_mb'] / plain['process_mb']:.2f}"])
    print(markdown_table(columns, rows), end="")


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return time and memory of one arm over `steps` large batches, or as many samples."""
    torch.set_num_threads(1)
    kind, who, is_large = ARMS[options.arm]
    size = options.batch_size * (options.factor if is_large else 1)
    records = make_records(options.data, kind, options.batch_size * options.factor)
    model = ModelArguments(reasoning_rank=16, embedding_rank=16).build(0)
    step, collate = make_step(kind, who, model, size, options)
    before, spent, collating, batch_bytes = resident_mb(), 0.0, 0.0, 0
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)
    for number, batch in enumerate(batches(records, size, options.steps)):
        started = time.perf_counter()
        collated = collate(batch)
        collating += time.perf_counter() - started
        if number == 0:
            batch_bytes = num_bytes(collated)
        started = time.perf_counter()
        step(collated)
        optimizer.step()
        optimizer.zero_grad()
        spent += time.perf_counter() - started
        del collated  # before the next one is made, or two would be counted
    samples = options.batch_size * options.factor * options.steps
    return {
        "batch": size,
        "ms_a_sample": 1000 * spent / samples,
        "collate_ms_a_sample": 1000 * collating / samples,
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before,
        "batch_mb": batch_bytes / 2**20,
        "process_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }


def make_records(folder: Path, kind: str, count: int) -> list[Record]:
    """Return records of scenes; of pairs, each with a target that no other record has."""
    data = DataArguments(demo_dir=str(folder / "scenes"), demo_scale=max(0.05, count / 4800))
    records = [record for record in data.load("train") if record.query.images]
    records = (records * (1 + count // len(records)))[:count]
    if kind == "warm start":
        return records
    scenes = [record.query.images for record in records]
    return [
        replace(
            record,
            id=str(row),
            positive=Item(text=f"{row}", images=scenes[(row + count // 2) % count]),
            negatives=(),
            query_cot=None,
            positive_cot=None,
        )
        for row, record in enumerate(records)
    ]


def batches(records: list[Record], size: int, repeats: int) -> Iterator[list[Record]]:
    """Return the records in batches, several times over."""
    for _ in range(repeats):
        for start in range(0, len(records), size):
            yield records[start : start + size]


def make_step(
    kind: str, who: str, model: DualLoraModel, size: int, options: argparse.Namespace
) -> tuple[Callable[[Any], Any], Callable[[list[Record]], Any]]:
    """Return the step of an arm, forward and backward, and what collates its batches."""
    if who == "cached":
        return cached_step(model, options.batch_size)
    args = SftConfig(
        output_dir="unused",
        per_device_train_batch_size=size,
        max_steps=1000,
        temperature=TEMPERATURE,
        num_hard_negatives=0 if kind == "pairs" else 1,
        token_weight=0.0 if kind == "pairs" else 1.0,
        self_written_from=1.0,
        # What a plain batch has: its rows, as long as the longest of them.
        contrastive_chunk_tokens=None if who == "plain" else 40 * options.batch_size,
        report_to=[],
        use_cpu=True,
    )
    trainer: Any = SftTrainer(model, args, [])
    trainer.current_gradient_accumulation_steps = 1  # HF sets it in its loop
    return lambda batch: trainer.training_step(trainer.model, batch), trainer.data_collator


class Reader(nn.Module):
    """The no-think vector of our model as a module of sentence-transformers."""

    def __init__(self, model: DualLoraModel) -> None:
        """Hold the model."""
        super().__init__()
        self.dual = model

    def forward(self, features: dict[str, Tensor], **kwargs: Any) -> dict[str, Tensor]:
        """Add `sentence_embedding` to the features."""
        keys = ("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask")
        batch = {key: features[key] for key in keys if key in features}
        return {**features, "sentence_embedding": self.dual(embed={"x": batch})["embeds"]["x"]}


def cached_step(
    model: DualLoraModel, mini_batch_size: int
) -> tuple[Callable[[Any], Any], Callable[[list[Record]], Any]]:
    """Return a step of sentence-transformers' cached loss, symmetric as ours."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.losses import CachedMultipleNegativesRankingLoss

    loss = CachedMultipleNegativesRankingLoss(
        SentenceTransformer(modules=[Reader(model)], device="cpu"),
        scale=1 / TEMPERATURE,
        mini_batch_size=mini_batch_size,
        directions=("query_to_doc", "doc_to_query"),
        partition_mode="per_direction",
    )

    def collate(records: list[Record]) -> list[dict[str, Tensor]]:
        sides = [[r.query for r in records], [r.positive for r in records]]
        return [model.collate(items) for items in sides]

    def step(features: list[dict[str, Tensor]]) -> None:
        loss(features, torch.empty(0)).backward()

    return step, collate


def num_bytes(batch: Any) -> int:
    """Return the bytes of all tensors in a collated batch."""
    if isinstance(batch, Tensor):
        return batch.nbytes
    if isinstance(batch, Chunks):
        return sum(
            num_bytes([c.prompt, c.completions]) for own in batch.kinds.values() for c in own
        )
    if isinstance(batch, dict):
        batch = list(batch.values())
    return sum(num_bytes(part) for part in batch) if isinstance(batch, list) else 0


def resident_mb() -> float:
    """Return what the process holds in memory now."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


if __name__ == "__main__":
    main()
