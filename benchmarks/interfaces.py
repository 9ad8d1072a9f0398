"""Side by side: reading the CoT again (`reencode`) against reading the cache (`kv_detach`).

    python benchmarks/interfaces.py --batch_size 32 --repeats 5

Both arms embed the same prompts with the same CoTs, interleaved in one process, on untrained
adapters of the embedded backbone. The third arm starts from picture features made beforehand, as
the passes of one training step share them. Printed are medians and ratios.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

import torch

from twn_rl.data.record import Item
from twn_rl.demo.scenes import Scene
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.vision import encode_images


def main() -> None:
    """Time both interfaces, and one think pass with and without shared picture features."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    models = {
        name: DualLoraModel.from_backbone(BACKBONE_DIR, TwnConfig(interface=name)).eval()  # pyright: ignore[reportArgumentType]
        for name in ("reencode", "kv_detach")
    }
    batch = make_batch(models["reencode"], arguments.batch_size)
    features = encode_images(models["reencode"].backbone, batch)
    arms: dict[str, Callable[[], object]] = {
        "reencode": lambda: models["reencode"].embed(batch),
        "kv_detach": lambda: models["kv_detach"].embed(batch),
        "reencode, pictures encoded before": lambda: models["reencode"].embed(features),
    }
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    with torch.no_grad():
        for repeat in range(arguments.repeats + 1):
            for name, arm in arms.items():
                started = time.perf_counter()
                arm()
                if repeat:  # the first round warms up
                    seconds[name].append(time.perf_counter() - started)
    base = statistics.median(seconds["reencode"])
    for name, values in seconds.items():
        median = statistics.median(values)
        print(f"{name:36s} {1000 * median:8.1f} ms   ratio to reencode {median / base:.2f}")


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
