"""Pictures of random pixels, and records about them on disk."""

from pathlib import Path

import numpy as np
from PIL import Image

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Return a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def picture_records(folder: Path, count: int = 6, *, with_cots: bool = True) -> RecordSet:
    """Write and load records whose queries are pictures and whose targets are pictures or words.

    Every second target is a picture; the last record shares its positive with the first.
    """
    objects = ["camel", "pizza", "zebra", "tree"]
    sides = ["left", "right", "above", "below"]
    records = []
    for i in range(count):
        for name in (f"scene{i}", f"object{i}"):
            picture(1000 * i + len(name)).save(folder / f"{name}.png")
        word = Item(text=f"{objects[i % 4]} {sides[i // 4 % 4]}")
        positive = Item(images=(f"object{i}.png",)) if i % 2 else word
        if i == count - 1:
            positive = records[0].positive
        records.append(
            Record(
                id=f"r{i}",
                source="test",
                query=Item("find the object", f"{sides[i % 4]} of", (f"scene{i}.png",)),
                positive=positive,
                negatives=(Item(text="center"), Item(text="row"), Item(text="column"))[: i % 4],
                query_cot=f"{objects[i % 4]} {sides[i % 4]} " * (1 + i % 2) if with_cots else None,
                metadata={"pool": "all", "task": "find", "hops": i % 3},
            )
        )
    write_records(folder / "records.jsonl", records)
    return load_records(folder / "records.jsonl")
