"""Emoji scenes: the artwork, the 3x3 grid and walking on it."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from PIL import Image

ARTWORK_DIR = Path(__file__).parent / "artwork"
# What the backbone was pretrained on.
STYLES = ("fluent", "noto")
# The first of them without colour, which it has never seen: every pixel has its luminance.
GREY_STYLE = "grey"
TILE_PIXELS = 32
GRID = 3
ROW_WORDS = ("top", "middle", "bottom")
# One word a cell, in reading order.
PLACES = (
    "northwest", "north", "northeast",
    "west", "center", "east",
    "southwest", "south", "southeast",
)  # fmt: skip
STEPS = {"left": (0, -1), "right": (0, 1), "above": (-1, 0), "below": (1, 0)}


@lru_cache(maxsize=1)
def concepts() -> dict[str, str]:
    """Return object name -> category, in the order of the artwork file (64 names, 8 categories)."""
    entries = json.loads((ARTWORK_DIR / "concepts.json").read_text(encoding="utf-8"))
    return {name: entry["category"] for name, entry in entries.items()}


@lru_cache(maxsize=256)
def emoji(name: str, style: str) -> Image.Image:
    """Return the RGBA artwork of one object, at most 64 pixels on its longer side."""
    folder = STYLES[0] if style == GREY_STYLE else style
    with Image.open(ARTWORK_DIR / folder / f"{name}.webp") as image:
        artwork = image.convert("RGBA")
    return artwork.convert("LA").convert("RGBA") if style == GREY_STYLE else artwork


def draw_tile(
    name: str, style: str, *, rng: random.Random | None = None, pixels: int = TILE_PIXELS
) -> Image.Image:
    """Draw one object on a pastel (``rng``) or white tile; ``rng`` also jitters scale and place.

    In `GREY_STYLE` the pastel is grey, too.
    """
    if rng is None:
        background, scale = (255, 255, 255), 0.94
    else:
        background = tuple(rng.randint(222, 255) for _ in range(3))
        scale = rng.uniform(0.78, 0.98)
        if style == GREY_STYLE:
            background = (background[0],) * 3
    side = max(8, round(pixels * scale))
    artwork = emoji(name, style)
    ratio = side / max(artwork.size)
    size = (max(1, round(artwork.width * ratio)), max(1, round(artwork.height * ratio)))
    artwork = artwork.resize(size, Image.Resampling.BILINEAR)
    room = (pixels - size[0], pixels - size[1])
    if rng is None:
        corner = (room[0] // 2, room[1] // 2)
    else:
        corner = (rng.randint(0, room[0]), rng.randint(0, room[1]))
    tile = Image.new("RGB", (pixels, pixels), background)
    tile.paste(artwork, corner, artwork)
    return tile


def step(cell: int, relation: str) -> int | None:
    """Return the neighbouring cell in the direction of ``relation``, or None beyond the edge.

    >>> step(4, "above"), step(0, "left")
    (1, None)
    """
    row, column = cell // GRID + STEPS[relation][0], cell % GRID + STEPS[relation][1]
    if 0 <= row < GRID and 0 <= column < GRID:
        return row * GRID + column
    return None


@dataclass(frozen=True)
class Scene:
    """Nine distinct objects in reading order, drawn in one artwork style."""

    objects: tuple[str, ...]
    style: str
    seed: int

    @classmethod
    def sample(cls, rng: random.Random, style: str) -> Scene:
        """Draw nine distinct objects."""
        return cls(tuple(rng.sample(list(concepts()), GRID * GRID)), style, rng.getrandbits(32))

    def row(self, index: int) -> tuple[str, ...]:
        """Return the three objects of a row, left to right."""
        return self.objects[index * GRID : (index + 1) * GRID]

    def draw(self) -> Image.Image:
        """Return the RGB scene, 96x96 pixels; the same scene always gives the same pixels."""
        rng = random.Random(self.seed)
        picture = Image.new("RGB", (GRID * TILE_PIXELS, GRID * TILE_PIXELS))
        for cell, name in enumerate(self.objects):
            tile = draw_tile(name, self.style, rng=rng)
            picture.paste(tile, (cell % GRID * TILE_PIXELS, cell // GRID * TILE_PIXELS))
        return picture
