"""Side by side: photographs from files, opened a batch ahead on threads, and opened as asked for.

    python benchmarks/pictures.py --model outputs/demo/refit --pictures 64 --megapixels 12

Photographs are made here: JPEG files of smoothed noise. Both arms embed the same ones in one
process, in turn; the second is given pictures that `PIL.Image.open` has not decoded yet, which the
embedder decodes when it needs them. Printed are medians, the ratio, and how far vectors are apart.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.parsing import parse_arguments


@dataclass
class PicturesArguments:
    """What to measure."""

    model: str = field(default="outputs/demo/refit", metadata={"help": "Checkpoint folder."})
    pictures: int = field(default=64, metadata={"help": "How many photographs."})
    megapixels: float = field(default=12.0, metadata={"help": "Of each."})
    batch_size: int = field(default=16, metadata={"help": "Pictures a forward."})
    repeats: int = field(default=3, metadata={"help": "Rounds after one that warms up."})


def main() -> None:
    """Time both arms and print what they cost against each other."""
    (script,) = parse_arguments((PicturesArguments,), description=__doc__)
    embedder = ThinkingEmbedder.from_pretrained(script.model)
    with tempfile.TemporaryDirectory() as folder:
        files = photographs(Path(folder), script.pictures, script.megapixels)
        arms: dict[str, Callable[[], list[Any]]] = {
            "opened ahead": lambda: list(files),
            "opened as asked for": lambda: [Image.open(file) for file in files],
        }
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        vectors: dict[str, Any] = {}
        for _ in range(script.repeats + 1):
            for name, inputs in arms.items():
                started = time.perf_counter()
                vectors[name] = embedder.encode(
                    inputs(), think="never", batch_size=script.batch_size
                )
                seconds[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, median in medians.items():
        print(f"{name:22} {median:6.2f} s   {script.pictures / median:6.1f} pictures/s")
    ahead, asked = medians.values()
    apart = float(np.abs(vectors["opened ahead"] - vectors["opened as asked for"]).max())
    print(
        f"opened ahead / opened as asked for: {ahead / asked:.2f}   vectors differ by {apart:.0e}"
    )


def photographs(folder: Path, count: int, megapixels: float) -> list[Path]:
    """Write JPEG files of smoothed noise, 4 to 3; return their paths."""
    height = int((megapixels * 1e6 * 3 / 4) ** 0.5)
    size, random = (height * 4 // 3, height), np.random.default_rng(0)
    files = []
    for number in range(count):
        noise = random.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        files.append(folder / f"{number:05}.jpg")
        Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(files[-1], quality=90)
    return files


if __name__ == "__main__":
    main()
