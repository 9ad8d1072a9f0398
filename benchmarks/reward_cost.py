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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from twn_rl.data.record import Item, Record
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, use_adapter
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.training.grpo import freeze_scorer
from twn_rl.training.rollout_scorer import RolloutScorer, embed_items
from twn_rl.training.target_bank import TargetBank

REWARD = ("scorer: reading", "similarity", "host work of the reward")
OTHERS = ("naive: every rollout read whole", "UME-R1: targets and rollouts anew")
WORDS = [f"word{number}" for number in range(200)]
TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}"
    "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)


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
                model = DualLoraModel.from_backbone(random_backbone(script.tiny), TwnConfig())
                records = random_records(script.queries, side=64 if script.tiny else 384)
            else:
                model = DualLoraModel.from_pretrained(script.model, is_trainable=True)
                records = list(data.load("rl"))
            step = Step(model, records, script, Path(folder))
            report(step.measure(), step, script)
        print_switches(28 if not script.tiny else 2)
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


def print_switches(layers: int) -> None:
    """Print what using the other adapter and coming back takes, as PEFT does it and here.

    The model is as narrow as can be and has the modules of Qwen3-VL-2B: only these count.
    """
    model = DualLoraModel.from_backbone(
        random_backbone(True, layers, max(2, layers - 4)), TwnConfig()
    )
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


def random_backbone(is_tiny: bool, layers: int = 2, depth: int = 2) -> Backbone:
    """Return a Qwen3-VL with random weights; of middle size unless it is tiny."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>"]
    tokens = ["<pad>", "<unk>", *special, "<think>", "</think>", *WORDS, "user", "assistant"]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<|im_end|>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = TEMPLATE
    width, layers, depth = (64, layers, depth) if is_tiny else (640, 8, 6)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    config = Qwen3VLConfig(
        text_config={
            "hidden_size": width,
            "intermediate_size": 3 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": width // 32,
            "num_key_value_heads": width // 64,
            "head_dim": 32,
            "vocab_size": len(tokens) + 24,
            "max_position_embeddings": 4096,
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [8, 4, 4],
                "mrope_interleaved": True,
            },
        },
        vision_config={
            "depth": depth,
            "hidden_size": width // 2,
            "intermediate_size": 2 * width,
            "num_heads": 4,
            "out_hidden_size": width,
            "patch_size": 16,
            "num_position_embeddings": 576,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **{**ids, "video_token_id": len(tokens) + 1},
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLForConditionalGeneration(config).eval()
    return from_parts(model, ImageOnlyProcessor(tokenizer))


class ImageOnlyProcessor:
    """What Qwen's processor does for pictures; the real one needs torchvision for its videos."""

    def __init__(self, tokenizer: Any) -> None:
        """Keep the tokenizer; pictures keep their size."""
        self.tokenizer, self.chat_template = tokenizer, tokenizer.chat_template
        self.image_processor = Qwen2VLImageProcessorPil(
            patch_size=16, size={"shortest_edge": 32**2, "longest_edge": 1024**2}
        )

    def apply_chat_template(self, messages: list[dict[str, Any]], **kwargs: Any) -> str:
        """Render messages."""
        return self.tokenizer.apply_chat_template(messages, **kwargs)

    def __call__(
        self, *, text: list[str], images: list[list[Any]] | None = None, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        """Write image placeholders out and tokenize."""
        vision: dict[str, torch.Tensor] = {}
        if images:
            flat = [image for row in images for image in row]
            vision = dict(self.image_processor(images=flat, return_tensors="pt"))
            counts = iter((vision["image_grid_thw"].prod(-1) // 4).tolist())
            pieces = [row.split("<|image_pad|>") for row in text]
            text = [
                first + "".join("<|image_pad|> " * next(counts) + piece for piece in rest)
                for first, *rest in pieces
            ]
        batch = dict(self.tokenizer(text, return_token_type_ids=False, **kwargs))
        image_token = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        batch["mm_token_type_ids"] = (batch["input_ids"] == image_token).long()
        return {**batch, **vision}


@dataclass(frozen=True)
class Shape:
    """Sizes of a published Qwen3-VL."""

    name: str
    width: int
    layers: int
    inner: int
    heads: int
    vision: tuple[int, int, int]  # layers, width, inner width
    vocabulary: int = 151_936
    key_heads: int = 8
    head: int = 128

    def read(self, tokens: float, context: float) -> float:
        """Return the operations of a forward through the layers; `context` is seen on average."""
        attention = self.width * self.head * (2 * self.heads + 2 * self.key_heads)
        weights = self.layers * (attention + 3 * self.width * self.inner)
        return tokens * (2 * weights + 4 * self.layers * self.heads * self.head * context)

    def see(self, image_tokens: int) -> float:
        """Return the operations of the vision tower for a picture; 4 patches are a token."""
        layers, width, inner = self.vision
        patches = 4 * image_tokens
        return patches * layers * (2 * (4 * width**2 + 2 * width * inner) + 4 * width * patches)

    def speak(self, tokens: float) -> float:
        """Return the operations of the language head."""
        return 2.0 * tokens * self.width * self.vocabulary


SHAPES = (
    Shape("2B", 2048, 28, 6144, 16, (24, 1024, 4096)),
    Shape("4B", 2560, 36, 9728, 32, (24, 1024, 4096)),
    Shape("8B", 4096, 36, 12_288, 32, (27, 1152, 4304)),
)


def count(shape: Shape, image: int, *, text: int = 64, thought: int = 256) -> dict[str, float]:
    """Return the operations of a step's parts for one query with 8 rollouts, and 1 M targets.

    Trained with gradient checkpointing: forward twice, and once as much backward, since frozen
    weights have no gradient.
    """
    group, readouts, targets = 8, 4, 1_000_000
    prompt = image + text
    whole = prompt + thought
    once = shape.see(image) + shape.read(prompt, prompt / 2)
    behind = shape.read(thought, prompt + thought / 2)
    tail = shape.read(readouts, whole)
    product = 2.0 * targets * shape.width
    return {
        "generation": group * (once + behind + shape.speak(thought)),
        "forward and backward": group
        * (shape.see(image) + 3 * shape.read(whole, whole / 2) + 3 * shape.speak(thought)),
        "reading": once + shape.read(readouts, prompt) + group * (behind + tail),
        "similarity": (1 + group) * product,
        OTHERS[0]: group * (2 * once + behind + 2 * tail) + 2 * group * product,
        OTHERS[1]: group * (once + behind + tail) + 2 * shape.read(prompt, prompt / 2),
    }


def print_counts() -> None:
    """Print the counted table."""
    print("counted, TFLOP for 8 rollouts of a query, 256-token thoughts, 1 M targets\n")
    head = ("model", "image tokens", "generation", "fwd + bwd", "reading", "similarity", "share")
    print("| " + " | ".join((*head, "naive", "UME-R1")) + " |")
    print("| --- |" + " ---: |" * 8)
    for shape in SHAPES:
        for image in (256, 1024):
            parts = count(shape, image)
            rest = parts["generation"] + parts["forward and backward"]
            reward = parts["reading"] + parts["similarity"]
            names = ("generation", "forward and backward", "reading", "similarity")
            cells = [f"{parts[name] / 1e12:.2f}" for name in names]
            shares = [value / (rest + value) for value in (reward, *(parts[o] for o in OTHERS))]
            row = (shape.name, str(image), *cells, *(f"{share:.1%}" for share in shares))
            print("| " + " | ".join(row) + " |")


if __name__ == "__main__":
    main()
