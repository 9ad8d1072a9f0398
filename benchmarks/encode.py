"""Side by side: `ThinkingEmbedder` against what one would write by hand, and its modes.

    python benchmarks/encode.py --model outputs/demo/refit --queries 256 --repeats 3
    python benchmarks/encode.py --model outputs/demo/refit --latent_model outputs/demo/latent

Queries of the test split are embedded by all arms in turn, in one process; printed are medians,
ratios, and how far the vectors of arms that must agree are apart. Who thinks in the arms named
"some" is decided by the model's gate if it has one, else by the hops of the demo's questions. A
model with reason tokens adds what its latent thoughts cost beside no and written ones.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from twn_rl.data.record import Item
from twn_rl.inference.batches import in_batches
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel

# Arm, arm it is compared with, whether both give the same vectors.
COMPARISONS = (
    ("some think", "all think", False),
    ("few think", "all think", False),
    ("nobody thinks", "all think", False),
    ("nobody thinks", "plain: collate, embed", True),
    ("nobody thinks", "plain: embed alone", True),
    ("some think", "some, written per batch", True),
    ("few think", "few, written per batch", True),
    ("some think", "some, prompts read again", True),
    ("all think", "all, prompts read again", True),
)
LATENT_COMPARISONS = (
    ("latent thoughts", "latent model, nobody thinks", False),
    ("latent thoughts", "nobody thinks", False),
    ("latent thoughts", "all think", False),
)


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model: str = field(default="outputs/demo/refit", metadata={"help": "Checkpoint folder."})
    latent_model: str | None = field(
        default=None,
        metadata={"help": "Checkpoint with reason tokens; default: `model` if it has some."},
    )
    queries: int = field(default=256, metadata={"help": "Queries of the test split."})
    repeats: int = field(default=3, metadata={"help": "Rounds after one that warms up."})
    batch_size: int = field(default=32, metadata={"help": "Queries a forward."})
    few: float = field(default=0.1, metadata={"help": "Share of the queries in the arms 'few'."})
    max_think_tokens: int = field(default=64, metadata={"help": "Longest thought in tokens."})
    clock: Literal["wall", "cpu"] = field(
        default="wall",
        metadata={"help": "cpu: seconds of this process, steadier beside other programs."},
    )


def main() -> None:
    """Time every arm and print what they cost against each other."""
    script, data = parse_arguments((BenchmarkArguments, DataArguments), description=__doc__)
    embedder = ThinkingEmbedder.from_pretrained(script.model)
    records = list(data.load("test"))[: script.queries]
    items = [record.query for record in records]
    hops = [bool(record.metadata.get("hops")) for record in records]
    has_gate = "query" in embedder.model.gates
    some = gated(embedder, items) if has_gate else hops
    few = np.random.default_rng(0).random(len(items)) < script.few
    arms = make_arms(embedder, items, some, few.tolist(), script)
    if has_gate:
        arms["some think"] = lambda: embedder.encode_query(items, think="auto", **limits(script))
    latent = ThinkingEmbedder.from_pretrained(script.latent_model or script.model)
    comparisons = COMPARISONS
    if script.latent_model or latent.model.reason_ids:
        arms |= latent_arms(latent, items, script)
        comparisons += LATENT_COMPARISONS
    seconds, vectors = measure(arms, script)
    print(f"{len(items)} queries; some: {sum(some)} think ({'gate' if has_gate else 'hops'});")
    print(
        f"few: {few.sum()} think; batches of {script.batch_size}, {script.repeats} rounds, "
        f"{script.clock} clock\n"
    )
    for name, values in seconds.items():
        rate = len(items) / statistics.median(values)
        spread = f"{min(values):.2f} to {max(values):.2f}"
        print(f"{name:28s} {statistics.median(values):7.2f} s ({spread})  {rate:6.1f} queries/s")
    print()
    for name, other, must_agree in comparisons:
        ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
        note = ""
        if must_agree:
            apart = np.abs(vectors[name] - vectors[other]).max()
            note = f"   vectors differ by at most {apart:.0e}"
        print(f"{name} / {other}: {statistics.median(ratios):.2f}{note}")


def limits(script: BenchmarkArguments) -> dict[str, Any]:
    """Return the options all arms share."""
    return {"batch_size": script.batch_size, "max_think_tokens": script.max_think_tokens}


def gated(embedder: ThinkingEmbedder, items: Sequence[Item]) -> list[bool]:
    """Return whom the model's gate lets think."""
    details = embedder.encode_query(list(items), think="auto", return_details=True)
    return [bool(texts) for texts in details.thoughts]


def make_arms(
    embedder: ThinkingEmbedder,
    items: list[Item],
    some: list[bool],
    few: list[bool],
    script: BenchmarkArguments,
) -> dict[str, Callable[[], Any]]:
    """Return name -> function that embeds all items."""
    model, options = embedder.model, limits(script)
    everyone = [True] * len(items)
    parts = in_batches(items, script.batch_size)
    batches = [(list(part), list(part.values())) for part in parts]
    collated = [model.collate(part) for _, part in batches]
    return {
        "all think": lambda: embedder.encode_query(items, think="always", **options),
        "some think": lambda: embedder.encode_query(items, think=some, **options),
        "few think": lambda: embedder.encode_query(items, think=few, **options),
        "nobody thinks": lambda: embedder.encode_query(items, think="never", **options),
        "plain: collate, embed": lambda: plain(model, batches),
        "plain: embed alone": lambda: plain(model, batches, collated),
        "some, written per batch": lambda: per_batch(model, batches, some, script),
        "few, written per batch": lambda: per_batch(model, batches, few, script),
        "some, prompts read again": lambda: reencoded(model, batches, some, script),
        "all, prompts read again": lambda: reencoded(model, batches, everyone, script),
    }


def latent_arms(
    embedder: ThinkingEmbedder, items: list[Item], script: BenchmarkArguments
) -> dict[str, Callable[[], Any]]:
    """Return the arms of a model with reason tokens."""
    options = limits(script)
    return {
        "latent thoughts": lambda: embedder.encode_query(items, think="latent", **options),
        "latent model, nobody thinks": lambda: embedder.encode_query(
            items, think="never", **options
        ),
    }


def measure(
    arms: dict[str, Callable[[], Any]], script: BenchmarkArguments
) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Return seconds of each round and the vectors of each arm; arms take turns in every round."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    vectors: dict[str, Any] = {}
    clock = time.process_time if script.clock == "cpu" else time.perf_counter
    for repeat in range(script.repeats + 1):
        for name, arm in arms.items():
            started = clock()
            vectors[name] = arm()
            if repeat:  # the first round warms up
                seconds[name].append(clock() - started)
    return seconds, vectors


Batches = Sequence[tuple[list[int], list[Item]]]


def plain(model: DualLoraModel, batches: Batches, collated: Sequence[Any] = ()) -> Any:
    """Embed without thinking, by one pass a batch."""
    vectors = np.zeros((sum(len(rows) for rows, _ in batches), model.hidden_size), np.float32)
    with torch.no_grad(), evaluating(model):
        for index, (positions, items) in enumerate(batches):
            batch = collated[index] if collated else model.collate(items)
            vectors[positions] = model.embed(batch).cpu().numpy()
    return vectors


def per_batch(
    model: DualLoraModel, batches: Batches, thinks: list[bool], script: BenchmarkArguments
) -> Any:
    """Read prompts once, but write the thoughts of each batch by themselves."""
    vectors = np.zeros((len(thinks), model.hidden_size), np.float32)
    for positions, items in batches:
        prompts = model.prepare(model.collate(items))
        prefix = model.read(prompts)
        states = model.read_out(prefix)
        chosen = [row for row, position in enumerate(positions) if thinks[position]]
        if chosen:
            ids = model.reason(prompts, chosen, max_think_tokens=script.max_think_tokens)
            completions = [model.completion_for_embedding(row) for row in ids]
            states[chosen] = model.read_out(prefix.select(chosen), completions)
        vectors[positions] = torch.nn.functional.normalize(states, dim=-1).cpu().numpy()
    return vectors


def reencoded(
    model: DualLoraModel, batches: Batches, thinks: list[bool], script: BenchmarkArguments
) -> Any:
    """Read every prompt and its pictures anew for each of the three passes."""
    vectors = plain(model, batches)
    with torch.no_grad(), evaluating(model):
        for positions, items in batches:
            chosen = [row for row, position in enumerate(positions) if thinks[position]]
            if not chosen:
                continue
            own = [items[row] for row in chosen]
            ids = model.reason(model.collate(own), max_think_tokens=script.max_think_tokens)
            completions = [model.completion_for_embedding(row) for row in ids]
            batch = model.collate(own, completions)
            vectors[[positions[row] for row in chosen]] = model.embed(batch).cpu().numpy()
    return vectors


if __name__ == "__main__":
    main()
