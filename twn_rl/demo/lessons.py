"""What the embedded backbone is taught: pictures, and words about them."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm
from transformers import Idefics3Processor

from twn_rl.demo import questions, scenes
from twn_rl.demo.scenes import GRID, PLACES, ROW_WORDS, STEPS, STYLES, Scene, concepts

# Words that are given rather than asked keep a little weight: the model still learns to write them.
GIVEN_WEIGHT = 0.03
# Share of "find" facts about an object that the text has placed before. Copying from the text is
# learned at once and grows the heads that match equal contents; without it the same match with a
# tile was not found in 2,600 steps.
REPEATED_FIND_SHARE = 0.5

Part = tuple[str, float]
# Picture features (10, D), the user's words, the weighted answer.
Lesson = tuple[Tensor, str, list[Part]]


@dataclass
class PictureStore:
    """Pictures processed once: ``pixels`` is (N, 10, 3, 32, 32) float16, tiles and whole."""

    scenes: list[Scene]
    pixels: Tensor
    single_names: list[str]
    single_pixels: Tensor

    @classmethod
    def build(
        cls, processor: Idefics3Processor, *, num_scenes: int, num_singles: int, seed: int
    ) -> PictureStore:
        """Draw scenes of both styles and single objects, and run the image processor over them."""
        rng = random.Random(seed)
        drawn = [Scene.sample(rng, STYLES[i % len(STYLES)]) for i in range(num_scenes)]
        names = [rng.choice(list(concepts())) for _ in range(num_singles)]
        side = GRID * scenes.TILE_PIXELS
        singles = []
        for i, name in enumerate(names):
            jitter = rng if i % 2 else None
            tile = scenes.draw_tile(name, STYLES[i // 2 % len(STYLES)], rng=jitter)
            singles.append(tile.resize((side, side), Image.Resampling.LANCZOS))
        return cls(
            drawn,
            process_pictures(
                processor, [scene.draw() for scene in tqdm(drawn, desc="drawing", disable=None)]
            ),
            names,
            process_pictures(processor, singles),
        )


def process_pictures(processor: Idefics3Processor, pictures: list[Image.Image]) -> Tensor:
    """Return (N, 10, 3, 32, 32) float16 pixel values of 96x96 pictures."""
    parts = []
    for start in tqdm(range(0, len(pictures), 64), desc="processing pictures"):
        batch = [[picture] for picture in pictures[start : start + 64]]
        parts.append(processor.image_processor(batch, return_tensors="pt")["pixel_values"].half())
    return torch.cat(parts)


def scene_facts(
    scene: Scene, rng: random.Random, *, find_share: float, count: int = 9
) -> Iterator[Part]:
    """Yield (words, weight) of random facts about a scene; the order teaches no place by offset.

    Args:
        scene: What is described.
        rng: Decides order and kinds.
        find_share: Share of the facts that give an object and ask for its cell, the slowest skill.
        count: Number of facts.
    """
    others = {"name": 0.65, "row": 0.13, "category": 0.11, "neighbour": 0.11}
    kinds = rng.choices(
        ["find", *others],
        [find_share, *((1 - find_share) * share for share in others.values())],
        k=count,
    )
    fresh = rng.sample(range(GRID * GRID), GRID * GRID)
    placed: list[int] = []  # cells whose object and place already stand together in the text
    for i, kind in enumerate(kinds):
        if i:
            yield ";", GIVEN_WEIGHT
        is_repeated = kind == "find" and placed and rng.random() < REPEATED_FIND_SHARE
        cell = rng.choice(placed) if is_repeated else fresh[i % len(fresh)]
        yield from _fact(kind, scene, cell, rng)
        if kind in ("find", "name"):
            placed.append(cell)


def _fact(kind: str, scene: Scene, cell: int, rng: random.Random) -> Iterator[Part]:
    name, place = scene.objects[cell], PLACES[cell]
    if kind == "find":
        yield from ((name, GIVEN_WEIGHT), (place, 1.0))
    elif kind == "name":
        yield from ((place, GIVEN_WEIGHT), (name, 1.0))
    elif kind == "row":
        row = cell // GRID
        yield from ((f"{ROW_WORDS[row]} row", GIVEN_WEIGHT), (" ".join(scene.row(row)), 1.0))
    elif kind == "category":
        yield from ((f"{name} is", GIVEN_WEIGHT), (concepts()[name], 1.0))
    else:
        relation = rng.choice([r for r in STEPS if scenes.step(cell, r) is not None])
        reached = scenes.step(cell, relation)
        yield from ((f"{relation} of {place} is", GIVEN_WEIGHT), (PLACES[reached or 0], 1.0))


def lesson(
    store: PictureStore,
    features: tuple[Tensor, Tensor],
    rng: random.Random,
    *,
    find_share: float,
    hop_share: float = 0.0,
) -> Lesson:
    """Draw one lesson.

    Args:
        store: Scenes and single pictures.
        features: Those of the scenes and of the single pictures.
        rng: Decides everything.
        find_share: As of `scene_facts`.
        hop_share: Share of lessons that ask one or two hops for the answer alone.
    """
    of_scenes, of_singles = features
    if hop_share and rng.random() < hop_share:
        i = rng.randrange(len(store.scenes))
        question = questions.ask_hops(store.scenes[i], rng.choice((1, 1, 2)), rng, held_out=False)
        return of_scenes[i], question.text, [(question.answer, 1.0)]
    kind = rng.random()
    if kind < 0.12:
        i = rng.randrange(len(store.single_names))
        name = store.single_names[i]
        answer = [(name, 1.0), (f"; {concepts()[name]}", 0.5)]
        return of_singles[i], "name the picture", answer
    i = rng.randrange(len(store.scenes))
    scene = store.scenes[i]
    if kind < 0.17:
        question = questions.ask_hops(scene, 0, rng, held_out=False)
        return of_scenes[i], question.text, [(question.answer, 1.0)]
    if kind < 0.22:
        question = questions.ask_grounding(scene, rng)
        return of_scenes[i], question.text, [(question.answer, 1.0)]
    return of_scenes[i], "describe the scene", list(scene_facts(scene, rng, find_share=find_share))


class LessonTokenizer:
    """Writes lessons in the chat template; the image mark expands to the same tokens every time."""

    def __init__(self, processor: Idefics3Processor) -> None:
        """Expand the image mark once by the real processor."""
        self.tokenizer = processor.tokenizer
        blank = Image.new("RGB", (GRID * scenes.TILE_PIXELS, GRID * scenes.TILE_PIXELS))
        self.image_ids = processor(text="<image>", images=[[blank]])["input_ids"][0]

    def __call__(self, user: str, answer: list[Part]) -> tuple[list[int], list[float]]:
        """Return token ids and their loss weights."""
        encode = self.tokenizer.encode
        ids = [
            *encode("<user>"),
            *self.image_ids,
            *encode(f"{user} <end_of_utterance> <assistant>"),
        ]
        weights = [0.0] * len(ids)
        for words, weight in [*answer, ("<end_of_utterance>", GIVEN_WEIGHT)]:
            part = encode(words)
            ids += part
            weights += [weight] * len(part)
        return ids, weights

    def batch(self, lessons: list[Lesson]) -> dict[str, Tensor]:
        """Stack lessons, padded on the right: features, input_ids, attention_mask, weights."""
        rows = [self(user, answer) for _, user, answer in lessons]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        return {
            "features": torch.stack([features for features, _, _ in lessons]),
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]
            ),
            "weights": torch.tensor([w + [0.0] * (length - len(w)) for _, w in rows]),
        }
