"""How large the parts of the GPU battery are, what they are given, and their random records."""

from __future__ import annotations

import resource
import time
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import TrainerCallback

from twn_rl.data.chat import Think
from twn_rl.data.record import Item, Record
from twn_rl.demo.random_qwen import random_backbone
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.whole_files import write_json


@dataclass(frozen=True)
class Sizes:
    """Sizes of every part.

    Attributes:
        shape: Of the backbone, see `twn_rl.demo.random_qwen.SHAPES`.
        picture: Width and height of a query's picture in pixels.
        words: Words of a query, of a target and of a thought.
        batch_size: Records of a warm start's step.
        think_tokens: Longest thought that is written.
        rollouts: Rollouts of an RL step, and of a group.
        model_length: Longest prompt and thought in tokens that vLLM makes room for.
        inputs: How many are embedded, and labelled.
        contrastive: Batches of pairs that go through in chunks.
        small_picture: Picture of those pairs.
        demo_steps: Steps of the demo's warm start and RL.
        demo_batch: Records of a step of the demo; 0 leaves its own.
        side: Of the matrices that tell how fast the machine is.
        flags: What else changes in the ready configurations.
    """

    shape: str = "2b"
    picture: tuple[int, int] = (768, 768)
    words: tuple[int, int, int] = (32, 64, 128)
    batch_size: int = 64
    think_tokens: int = 256
    rollouts: tuple[int, int] = (32, 8)
    model_length: int = 4096
    inputs: int = 64
    contrastive: tuple[int, ...] = (512, 2048)
    small_picture: tuple[int, int] = (256, 256)
    demo_steps: tuple[int, int] = (30, 5)
    demo_batch: int = 0
    side: int = 8192
    flags: dict[str, Any] = field(default_factory=dict)


TINY = Sizes(
    shape="tiny",
    picture=(64, 64),
    words=(4, 4, 4),
    batch_size=4,
    think_tokens=4,
    rollouts=(4, 2),
    model_length=256,
    inputs=4,
    contrastive=(8, 16),
    small_picture=(64, 64),
    demo_steps=(2, 2),
    demo_batch=8,
    side=128,
    flags={"contrastive_chunk_tokens": 64, "dataloader_num_workers": 0},
)


@dataclass
class Bench:
    """What a part is given.

    Attributes:
        sizes: How large it is.
        device: Where it runs.
        folder: Its own, for whatever it writes.
        file: Where its figures go, each as soon as it is known.
        figures: What it has told.
    """

    sizes: Sizes
    device: torch.device
    folder: Path
    file: Path
    figures: dict[str, Any] = field(default_factory=dict)

    @property
    def is_gpu(self) -> bool:
        """Whether it runs on a GPU."""
        return self.device.type == "cuda"

    def tell(self, **figures: Any) -> None:
        """Add figures and write all of them down."""
        rounded = {k: round(v, 6) if isinstance(v, float) else v for k, v in figures.items()}
        self.figures |= rounded
        write_json(self.file, self.figures)

    def now(self) -> float:
        """Return the time in seconds once the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def forget_peak(self) -> None:
        """Let the next peak be of what comes from here on."""
        if self.is_gpu:
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self, name: str = "peak") -> dict[str, float]:
        """Return the peak memory in GB: of the GPU, or of this process where there is none."""
        if self.is_gpu:
            allocated = torch.cuda.max_memory_allocated(self.device)
            reserved = torch.cuda.max_memory_reserved(self.device)
            return {f"{name}_gb": allocated / 1e9, f"{name}_reserved_gb": reserved / 1e9}
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return {f"{name}_process_gb": 1024 * kilobytes / 1e9}


class AnyThought(DualLoraModel):
    """A model of random weights, which writes no marks: all it writes counts as a thought."""

    def think(self, ids: Any) -> Think:
        """Take every completion for a whole thought."""
        return Think(text=f"{len(ids)} tokens", is_complete=True)


def build_model(bench: Bench, arguments: Any, folder: Path | None = None) -> DualLoraModel:
    """Return new adapters of a ready configuration on a random backbone; tell what that took.

    Args:
        bench: Gives shape and device.
        arguments: `ModelArguments` of a configuration.
        folder: Where the backbone is saved, and loaded from, for what must find it on disk.
    """
    dtype = torch.bfloat16 if bench.is_gpu else torch.float32
    started = bench.now()
    backbone = random_backbone(
        bench.sizes.shape,
        device=bench.device,
        dtype=dtype,
        attn_implementation=arguments.attn_implementation,
        smallest_pixels=min(65536, bench.sizes.small_picture[0] * bench.sizes.small_picture[1]),
    )
    parameters = sum(p.numel() for p in backbone.model.parameters())
    source: Any = backbone
    if folder is not None:
        backbone.model.save_pretrained(folder)
        backbone.processor.save_pretrained(folder)
        source = folder
    config = replace(arguments.config(), backbone="")
    model = AnyThought.from_backbone(source, config, dtype=dtype).to(bench.device)
    trained = sum(p.numel() for p in model.peft_model.parameters() if p.requires_grad)
    bench.tell(build_seconds=bench.now() - started)
    bench.tell(frozen_parameters=parameters, trained_parameters=trained)
    return model


def layer_parameters(model: DualLoraModel) -> int:
    """Return how many frozen parameters the language model's layers have."""
    layers = model.backbone.model.get_submodule(f"{model.backbone.language_prefix}.layers")
    return sum(p.numel() for name, p in layers.named_parameters() if "lora_" not in name)


def make_records(
    bench: Bench, count: int, *, picture: tuple[int, int], has_thoughts: bool = True
) -> list[Record]:
    """Write random pictures and return records that ask about them, targets and negatives in text.

    Args:
        bench: Gives folder and lengths.
        count: How many.
        picture: Width and height in pixels.
        has_thoughts: Whether a query has a thought to be taught.
    """
    generator, folder = np.random.default_rng(0), bench.folder / f"pictures_{picture[0]}"
    folder.mkdir(parents=True, exist_ok=True)
    query_words, target_words, thought_words = bench.sizes.words

    def words(length: int) -> str:
        return " ".join(f"w{number}" for number in generator.integers(0, 200, length))

    records = []
    for number in range(count):
        pixels = generator.integers(0, 255, (16, 16, 3), dtype=np.uint8)
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels).resize(picture).save(path, quality=90)
        records.append(
            Record(
                id=f"r{number}",
                source="random",
                query=Item(instruction=words(4), text=words(query_words), images=(path,)),
                positive=Item(text=words(target_words)),
                negatives=(Item(text=words(target_words)),),
                query_cot=words(thought_words) if has_thoughts else None,
            )
        )
    return records


class Stopwatch:
    """Seconds by name; what is timed inside of something else counts there alone."""

    def __init__(self, bench: Bench) -> None:
        """Take the clock of a bench."""
        self.bench, self.seconds = bench, dict[str, float]()
        self._inner: list[float] = []

    def watch(self, holder: Any, method: str, name: str) -> None:
        """Time every call of an object's method from here on."""
        function = getattr(holder, method)

        @wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.bench.now()
            self._inner.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                spent = self.bench.now() - started
                own = spent - self._inner.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + own
                if self._inner:
                    self._inner[-1] += spent

        setattr(holder, method, timed)


class StepClock(TrainerCallback):
    """Tells how long a trainer's steps take, and how long they wait for their data.

    The first steps warm up and do not count; a stopwatch starts anew after them.
    """

    def __init__(self, bench: Bench, stopwatch: Stopwatch | None = None, warm_up: int = 1) -> None:
        """Count the steps after `warm_up`."""
        self.bench, self.stopwatch, self.warm_up = bench, stopwatch, warm_up
        self.last, self.waits, self.steps = bench.now(), list[float](), list[float]()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long the data took."""
        now = self.bench.now()
        self.waits.append(now - self.last)
        self.last = now
        if state.global_step == self.warm_up and self.stopwatch is not None:
            self.stopwatch.seconds.clear()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note how long the step took."""
        now = self.bench.now()
        self.steps.append(now - self.last)
        self.last = now
        if len(self.steps) == 1:
            self.bench.tell(first_step_seconds=self.steps[0])

    def timed(self) -> tuple[float, float]:
        """Return the mean seconds of a step and of its wait for data."""
        steps, waits = self.steps[self.warm_up :], self.waits[self.warm_up :]
        return sum(steps) / len(steps), sum(waits) / len(waits)
