"""Side by side: the three interfaces: vectors, a step of the warm start, serving, a step of RL.

    python benchmarks/interfaces.py --batch_size 32 --repeats 5
    python benchmarks/interfaces.py --models outputs/demo/refit outputs/shared/grpo --queries 128

All arms take turns in one process; printed are medians and ratios to the first. Without models,
untrained adapters of the embedded backbone embed the same prompts with the same CoTs, and take the
losses and gradients of a warm start's step. With models, queries of the test split are embedded
without thoughts, half of them with and all with thoughts, and a step of GRPO is taken, without an
optimiser; and what is kept of each query that waits for its thought is counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch

from twn_rl.data.record import Item
from twn_rl.demo.scenes import Scene
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.thought_pool import Chunk
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.config import INTERFACES, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encode_images
from twn_rl.rewards import REWARDS
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer, make_scorer
from twn_rl.training.reward_loading import load_rewards

Arms = dict[str, Callable[[], object]]


@dataclass
class BenchmarkArguments:
    """What to measure."""

    models: list[str] = field(
        default_factory=list, metadata={"help": "Checkpoints, one an interface; none: untrained."}
    )
    batch_size: int = field(default=32, metadata={"help": "Prompts a forward."})
    queries: int = field(default=128, metadata={"help": "Queries of the test split, for models."})
    repeats: int = field(default=5, metadata={"help": "Rounds after one that warms up."})
    rl_step: bool = field(default=True, metadata={"help": "Also take steps of GRPO with models."})
    clock: Literal["wall", "cpu"] = field(
        default="wall",
        metadata={"help": "cpu: seconds of this process, steadier beside other programs."},
    )


def main() -> None:
    """Time the arms and print what they cost against each other."""
    script, data = parse_arguments((BenchmarkArguments, DataArguments), description=__doc__)
    clock = time.process_time if script.clock == "cpu" else time.perf_counter
    show = partial(report, repeats=script.repeats, clock=clock)
    if not script.models:
        untrained = {
            name: DualLoraModel.from_backbone(BACKBONE_DIR, TwnConfig(interface=name))  # pyright: ignore[reportArgumentType]
            for name in INTERFACES
        }
        show("vectors with a thought", vector_arms(untrained, script.batch_size))
        show("a step of the warm start", step_arms(untrained, script.batch_size))
        return
    models: dict[str, DualLoraModel] = {}
    for folder in script.models:
        model = DualLoraModel.from_pretrained(folder, is_trainable=True).eval()
        models[model.config.interface] = model
    records = list(data.load("test"))[: script.queries]
    items = [record.query for record in records]
    print_kept(models, items[: script.batch_size])
    halves = {"never": False, "half think": [n % 2 == 0 for n in range(len(items))], "always": True}
    for name, think in halves.items():
        show(name, encode_arms(models, items, think, script.batch_size))
    if script.rl_step:
        with TemporaryDirectory() as folder:
            show("a step of RL", rl_arms(models, data, Path(folder)))


def report(title: str, arms: Arms, *, repeats: int, clock: Callable[[], float]) -> None:
    """Let the arms take turns, and print medians, ranges and ratios to the first one."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for repeat in range(repeats + 1):
        for name, arm in arms.items():
            started = clock()
            arm()
            if repeat:  # the first round warms up
                seconds[name].append(clock() - started)
    print(f"\n{title}")
    base = seconds[next(iter(arms))]
    for name, values in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(values, base, strict=True))
        median, least, most = (1000 * f(values) for f in (statistics.median, min, max))
        print(f"  {name:36s} {median:8.1f} ms ({least:.1f} to {most:.1f})   ratio {ratio:.2f}")


@torch.no_grad()
def _embed(model: DualLoraModel, batch: Mapping[str, Any]) -> None:
    model.eval().embed(batch)


def vector_arms(models: Mapping[str, DualLoraModel], batch_size: int) -> Arms:
    """Return one arm an interface, and one that starts from picture features made beforehand."""
    first = models["reencode"]
    batch = make_batch(first, batch_size)
    arms: Arms = {name: partial(_embed, model, batch) for name, model in models.items()}
    features = encode_images(first.backbone, batch)
    return {**arms, "reencode, pictures encoded before": partial(_embed, first, features)}


def step_arms(models: Mapping[str, DualLoraModel], batch_size: int) -> Arms:
    """Return arms that compute the losses of a warm start's step and their gradients."""
    thinking = make_batch(models["reencode"], batch_size)
    queries = {key: value for key, value in thinking.items() if "completion" not in key}
    words = [Item(text=f"pizza {number}") for number in range(batch_size)]
    targets = models["reencode"].collate(words)

    def step(model: DualLoraModel) -> None:
        embed = {"no_think": queries, "think": thinking, "target": targets}
        output = model.train()(embed=embed, token_nll=thinking)
        vectors = output["embeds"]
        scores = [vectors[key] @ vectors["target"].T / 0.05 for key in ("no_think", "think")]
        loss = torch.stack([s.logsumexp(1).mean() - s.diagonal().mean() for s in scores]).sum()
        (loss + output["token_nll"].mean()).backward()
        model.zero_grad(set_to_none=True)

    return {name: partial(step, model) for name, model in models.items()}


def encode_arms(
    models: Mapping[str, DualLoraModel], items: list[Item], think: Any, batch_size: int
) -> Arms:
    """Return arms that embed all items, those that `think` names with thoughts of their own."""
    thinks = [think] * len(items) if isinstance(think, bool) else think

    def encode(embedder: ThinkingEmbedder) -> None:
        embedder.encode_query(items, think=thinks, batch_size=batch_size)

    return {name: partial(encode, ThinkingEmbedder(model)) for name, model in models.items()}


def print_kept(models: Mapping[str, DualLoraModel], items: list[Item]) -> None:
    """Print the bytes that are kept of a query from its reading to its thought."""
    print("kept of a query that waits for its thought")
    for name, model in models.items():
        batch = model.collate(items)
        start, prefix = model.read_both(model.prepare(batch))
        kept = Chunk(list(range(len(items))), [""] * len(items), start, prefix).num_bytes()
        tokens = int(batch["attention_mask"].sum())
        print(f"  {name:36s} {kept / len(items) / 1024:8.1f} KiB   {kept / tokens:.0f} a token")


def rl_arms(models: Mapping[str, DualLoraModel], data: DataArguments, folder: Path) -> Arms:
    """Return arms that sample, score and compute the gradient of one step of the demo's GRPO."""
    records = list(data.load("rl"))[:256]

    def step(trainer: EmbedGRPOTrainer) -> None:
        inputs: Any = next(iter(trainer.get_train_dataloader()))
        policy: Any = trainer.model
        trainer.training_step(policy.train(), inputs, None)
        policy.zero_grad(set_to_none=True)

    arms: Arms = {}
    for name, model in models.items():
        config = EmbedGRPOConfig(
            output_dir=str(folder / name),
            per_device_train_batch_size=128,
            num_generations=8,
            max_completion_length=32,
            beta=0.0,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            dataloader_pin_memory=False,
            report_to=[],
        )
        scorer = make_scorer(model, records, config, folder / name)
        rewards = load_rewards(["margin"], REWARDS)
        trainer = EmbedGRPOTrainer(model, rewards, config, records, scorer)
        trainer.current_gradient_accumulation_steps = 1  # which `train` would have set
        arms[name] = partial(step, trainer)
    return arms


def make_batch(model: DualLoraModel, batch_size: int) -> dict[str, torch.Tensor]:
    """Return prompts about fresh scenes, each with a two-hop CoT."""
    rng = random.Random(0)
    scenes = [Scene.sample(rng, "fluent").draw() for _ in range(batch_size)]
    text = "which object is above the one right of the camel"
    items = [Item(instruction="find the name", text=text, images=(scene,)) for scene in scenes]
    cot = model.renderer.completion("camel west ; right center ; above north ; pizza")
    return model.collate(items, [cot] * batch_size)


if __name__ == "__main__":
    main()
