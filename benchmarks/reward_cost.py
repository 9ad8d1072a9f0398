"""What the reward of a GRPO step costs beside generation and the policy's forward and backward.

    python benchmarks/reward_cost.py --model outputs/demo/sft --queries 16 --tokens 12
    python benchmarks/reward_cost.py --queries 4 --tokens 128
    python benchmarks/reward_cost.py --count_only true

Without a model it is a random Qwen3-VL of middle size. The parts of a step are what TRL does with
N = queries x generations rows: `generate`, then forward and backward of the same rows. The reward
is `RolloutScorer.columns`, beside two others: every rollout read with its whole prompt, with and
without its thought (naive), and targets and rollouts embedded anew at each step (as UME-R1 does,
in-batch negatives). All take turns in one process. TRL's own host work is left out, so shares are
upper bounds. The same parts are counted in operations at the shapes of Qwen3-VL 2B, 4B and 8B.
"""

from __future__ import annotations

import random
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn.functional import normalize

from twn_rl.data.record import Item, Record
from twn_rl.demo.random_qwen import SHAPES, Shape, random_backbone
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, use_adapter
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.training.grpo import freeze_scorer
from twn_rl.training.rollout_scorer import RolloutScorer, embed_items
from twn_rl.training.target_bank import TargetBank

REWARD = ("scorer: reading", "similarity", "host work of the reward")
OTHERS = ("naive: every rollout read whole", "UME-R1: targets and rollouts anew")
WORDS = [f"w{number}" for number in range(200)]
# Of the pictures of random records, and the least the processor takes them for.
SIDE, TINY_SIDE = 384, 64


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model: str | None = field(
        default=None, metadata={"help": "Warm-started model; null: a random Qwen3-VL."}
    )
    queries: int = field(default=4, metadata={"help": "Queries of a step."})
    generations: int = field(default=8, metadata={"help": "Rollouts of a query."})
    tokens: int = field(default=64, metadata={"help": "Tokens of a thought."})
    targets: int = field(default=10_000, metadata={"help": "Vectors of the bank."})
    repeats: int = field(default=3, metadata={"help": "Rounds after one that warms up."})
    threads: int = field(default=1, metadata={"help": "Threads of torch."})
    tiny: bool = field(default=False, metadata={"help": "The smallest random model, for tests."})
    count_only: bool = field(default=False, metadata={"help": "Only count operations."})


def main() -> None:
    """Measure the parts of a step, print their shares, then count them."""
    script, data = parse_arguments((BenchmarkArguments, DataArguments), description=__doc__)
    torch.set_num_threads(script.threads)
    if not script.count_only:
        with tempfile.TemporaryDirectory() as folder:
            if script.model is None:
                name, side = ("tiny", TINY_SIDE) if script.tiny else ("middle", SIDE)
                backbone = random_backbone(name, smallest_pixels=side**2)
                model = DualLoraModel.from_backbone(backbone, TwnConfig())
                records = random_records(script.queries, side)
            else:
                model = DualLoraModel.from_pretrained(script.model, is_trainable=True)
                records = list(data.load("rl"))
            step = Step(model, records, script, Path(folder))
            report(step.measure(), step, script)
        print_switches("tiny" if script.tiny else "2b")
    print_counts()


class Step:
    """One GRPO step, part by part, on fixed thoughts."""

    def __init__(
        self,
        model: DualLoraModel,
        records: Sequence[Record],
        script: BenchmarkArguments,
        folder: Path,
    ) -> None:
        """Build the bank and write the thoughts."""
        freeze_scorer(model)
        self.model, self.records, self.script = model, records, script
        self.scorer = RolloutScorer(model, records, folder)
        grow(self.scorer.targets, script.targets)
        rng = random.Random(0)
        shown = random.Random(1).sample(range(len(records)), script.queries)
        self.indices = [index for index in shown for _ in range(script.generations)]
        words = [word for word in model.tokenizer.get_vocab() if word.isalnum()]
        self.completions = [
            model.completion_ids(
                model.renderer.completion(" ".join(rng.choices(words, k=script.tokens))),
                add_eos=True,
            )[-script.tokens - 3 :]
            for _ in self.indices
        ]
        opening = model.think_open_ids
        self.completions = [
            ids if ids[: len(opening)] == opening else [*opening, *ids[len(opening) :]]
            for ids in self.completions
        ]
        self.items = [records[index].query for index in self.indices]
        self.seconds: dict[str, list[float]] = defaultdict(list)

    def measure(self) -> dict[str, float]:
        """Return the median seconds of every part."""
        with watched(self.scorer) as inside:
            for repeat in range(self.script.repeats + 1):
                self.round(inside)
                if not repeat:  # the first round warms up
                    self.seconds.clear()
        return {name: statistics.median(values) for name, values in self.seconds.items()}

    def round(self, inside: dict[str, float]) -> None:
        """Do every part once."""
        for name, part in (
            ("generation", self.generate),
            ("forward and backward", self.learn),
            (OTHERS[0], self.naive),
            (OTHERS[1], self.anew),
        ):
            started = time.perf_counter()
            part()
            self.seconds[name].append(time.perf_counter() - started)
        inside.clear()
        started = time.perf_counter()
        columns = self.scorer.columns(self.indices, self.completions)
        REWARDS["margin"](self.completions, **columns)
        REWARDS["format"](self.completions, **columns)
        whole = time.perf_counter() - started
        assert all(columns["is_think_complete"]), "a thought of the benchmark is malformed"
        self.seconds[REWARD[0]].append(inside["_embed"])
        self.seconds[REWARD[1]].append(inside["_similarities"])
        self.seconds[REWARD[2]].append(whole - inside["_embed"] - inside["_similarities"])

    @torch.no_grad()
    def generate(self) -> None:
        """Write as many tokens as the thoughts have, for every row by itself, as TRL does."""
        model, length = self.model, len(self.completions[0])
        batch = model.collate(self.items)
        with evaluating(model), use_adapter(model.peft_model, REASONING_ADAPTER):
            model.peft_model.generate(
                **batch,
                do_sample=True,
                min_new_tokens=length,
                max_new_tokens=length,
                suppress_tokens=model.suppressed_token_ids,
            )

    def learn(self) -> None:
        """Go forward and backward through all rows."""
        batch = self.model.collate(self.items, self.completions)
        self.model.token_nll(batch)[0].sum().backward()
        self.model.zero_grad()

    @torch.no_grad()
    def naive(self) -> None:
        """Embed every rollout, with and without its thought, with its whole prompt."""
        with evaluating(self.model):
            vectors = self.model.embed(self.model.collate(self.items, self.completions))
            self.model.embed(self.model.collate(self.items))
        self.scorer._similarities(vectors, self.indices, 0)

    @torch.no_grad()
    def anew(self) -> None:
        """Embed the rollouts, and the step's positives and listed negatives; no bank."""
        with evaluating(self.model):
            vectors = self.model.embed(self.model.collate(self.items, self.completions))
        shown = [self.records[index] for index in dict.fromkeys(self.indices)]
        targets = [item for record in shown for item in (record.positive, *record.negatives[:1])]
        torch.matmul(vectors, embed_items(self.model, targets).T)


@contextmanager
def watched(scorer: RolloutScorer) -> Iterator[dict[str, float]]:
    """Time what the scorer does inside `columns`."""
    inside: dict[str, float] = {}
    whole = {name: getattr(scorer, name) for name in ("_embed", "_similarities")}

    def timed(name: str) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            started = time.perf_counter()
            try:
                return whole[name](*args, **kwargs)
            finally:
                inside[name] = time.perf_counter() - started

        return run

    for name in whole:
        setattr(scorer, name, timed(name))
    yield inside


def report(seconds: dict[str, float], step: Step, script: BenchmarkArguments) -> None:
    """Print the parts of a step, their shares, and the other ways to reward."""
    parts = ("generation", "forward and backward", *REWARD)
    total = sum(seconds[name] for name in parts)
    parameters = sum(p.numel() for p in step.model.backbone.model.parameters())
    prompt = step.model.collate(step.items[:1])["input_ids"].shape[1]
    print(
        f"{script.model or 'random Qwen3-VL'}, {parameters / 1e6:.1f} million parameters; "
        f"{script.queries} queries of about {prompt} tokens x {script.generations} thoughts of "
        f"{len(step.completions[0])} tokens; {script.targets:,} targets; {script.threads} threads, "
        f"medians of {script.repeats}\n"
    )
    for name in parts:
        print(f"{name:36s} {seconds[name]:8.3f} s  {seconds[name] / total:6.1%}")
    reward = sum(seconds[name] for name in REWARD)
    print(f"{'reward, together':36s} {reward:8.3f} s  {reward / total:6.1%}")
    for name in OTHERS:
        other = total - reward + seconds[name]
        print(f"{name:36s} {seconds[name]:8.3f} s  {seconds[name] / other:6.1%} of its step")
    print()


def print_switches(name: str) -> None:
    """Print what using the other adapter and coming back takes, as PEFT does it and here.

    The model is as narrow as can be and has the modules of shape `name`: only these count.
    """
    tiny, like = SHAPES["tiny"], SHAPES[name]
    text = {**tiny.text, "num_hidden_layers": like.text["num_hidden_layers"]}
    depth = {key: like.vision[key] for key in ("depth", "deepstack_visual_indexes")}
    narrow = replace(tiny, text=text, vision={**tiny.vision, **depth})
    model = DualLoraModel.from_backbone(random_backbone(narrow), TwnConfig())
    peft_model, times = model.peft_model, 20

    def by_peft() -> None:
        flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
        for name in (EMBEDDING_ADAPTER, REASONING_ADAPTER):
            peft_model.set_adapter(name)
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

    def here() -> None:
        with use_adapter(peft_model, EMBEDDING_ADAPTER):
            pass

    milliseconds: dict[str, list[float]] = {"PEFT's set_adapter": [], "use_adapter": []}
    for _ in range(times):
        for name, switch in zip(milliseconds, (by_peft, here), strict=True):
            started = time.perf_counter()
            switch()
            milliseconds[name].append(1000 * (time.perf_counter() - started))
    modules = sum(1 for _ in peft_model.modules())
    print(f"to the other adapter and back, {modules} modules, medians of {times}:")
    for name, values in milliseconds.items():
        print(f"{name:36s} {statistics.median(values):8.3f} ms")
    print()


def grow(bank: TargetBank, size: int) -> None:
    """Add random unit vectors to an open bank, in memory, until it has `size`."""
    missing = size - len(bank)
    if missing <= 0:
        return
    generator = torch.Generator().manual_seed(0)
    width = bank.embeddings.shape[1]
    added = normalize(torch.randn(missing, width, generator=generator), dim=1).numpy()
    bank.embeddings = np.concatenate([bank.embeddings, added])
    bank.ids = [*bank.ids, *(f"random {number}" for number in range(missing))]
    for name in bank.pools:
        bank.pools[name] = np.arange(size)


def random_records(count: int, side: int) -> list[Record]:
    """Return records about noise: a picture and words to find words with."""
    rng = random.Random(0)
    pixels = np.random.default_rng(0)

    def words(number: int) -> str:
        return " ".join(rng.choices(WORDS, k=number))

    return [
        Record(
            id=str(number),
            source="random",
            query=Item(
                text=words(24),
                images=(Image.fromarray(pixels.integers(0, 255, (side, side, 3), np.uint8)),),
            ),
            positive=Item(text=words(16)),
            negatives=(Item(text=words(16)),),
        )
        for number in range(count)
    ]


@dataclass(frozen=True)
class Operations:
    """Operations of the parts of a model of some shape."""

    shape: Shape

    def read(self, tokens: float, context: float) -> float:
        """Return those of a forward through the layers; `context` is seen on average."""
        text = self.shape.text
        layers, width, heads = (
            text[key] for key in ("num_hidden_layers", "hidden_size", "num_attention_heads")
        )
        attention = width * text["head_dim"] * (2 * heads + 2 * text["num_key_value_heads"])
        weights = layers * (attention + 3 * width * text["intermediate_size"])
        return tokens * (2 * weights + 4 * layers * heads * text["head_dim"] * context)

    def see(self, image_tokens: int) -> float:
        """Return those of the vision tower for a picture; 4 patches are a token."""
        width, inner = self.shape.vision["hidden_size"], self.shape.vision["intermediate_size"]
        patches = 4 * image_tokens
        each = 2 * (4 * width**2 + 2 * width * inner) + 4 * width * patches
        return patches * self.shape.vision["depth"] * each

    def speak(self, tokens: float) -> float:
        """Return those of the language head."""
        return 2.0 * tokens * self.shape.text["hidden_size"] * self.shape.text["vocab_size"]


def count(model: Operations, image: int, *, text: int = 64, thought: int = 256) -> dict[str, float]:
    """Return the operations of a step's parts for one query with 8 rollouts, and 1 M targets.

    Trained with gradient checkpointing: forward twice, and once as much backward, since frozen
    weights have no gradient.
    """
    group, readouts, targets = 8, 4, 1_000_000
    prompt = image + text
    whole = prompt + thought
    once = model.see(image) + model.read(prompt, prompt / 2)
    behind = model.read(thought, prompt + thought / 2)
    tail = model.read(readouts, whole)
    product = 2.0 * targets * model.shape.text["hidden_size"]
    return {
        "generation": group * (once + behind + model.speak(thought)),
        "forward and backward": group
        * (model.see(image) + 3 * model.read(whole, whole / 2) + 3 * model.speak(thought)),
        "reading": once + model.read(readouts, prompt) + group * (behind + tail),
        "similarity": (1 + group) * product,
        OTHERS[0]: group * (2 * once + behind + 2 * tail) + 2 * group * product,
        OTHERS[1]: group * (once + behind + tail) + 2 * model.read(prompt, prompt / 2),
    }


def print_counts() -> None:
    """Print the counted table."""
    print("counted, TFLOP for 8 rollouts of a query, 256-token thoughts, 1 M targets\n")
    head = ("model", "image tokens", "generation", "fwd + bwd", "reading", "similarity", "share")
    print("| " + " | ".join((*head, "naive", "UME-R1")) + " |")
    print("| --- |" + " ---: |" * 8)
    for name in ("2b", "4b", "8b"):
        for image in (256, 1024):
            parts = count(Operations(SHAPES[name]), image)
            rest = parts["generation"] + parts["forward and backward"]
            reward = parts["reading"] + parts["similarity"]
            shown = ("generation", "forward and backward", "reading", "similarity")
            cells = [f"{parts[part] / 1e12:.2f}" for part in shown]
            shares = [value / (rest + value) for value in (reward, *(parts[o] for o in OTHERS))]
            row = (name.upper(), str(image), *cells, *(f"{share:.1%}" for share in shares))
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
