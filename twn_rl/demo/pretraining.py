"""How the embedded backbone learns to see: alignment, then scene facts; knows no adapters."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from twn_rl.demo import questions, scenes
from twn_rl.demo.scenes import GRID, PLACES, ROW_WORDS, STEPS, STYLES, Scene, concepts

# Words that are given rather than asked keep a little weight: the model still learns to write them.
GIVEN_WEIGHT = 0.03
ALIGNMENT_TEMPERATURE = 0.05
# Share of "find" facts about an object that the text has placed before. Copying from the text is
# learned at once and grows the heads that match equal contents; without it the same match with a
# tile was not found in 2,600 steps.
REPEATED_FIND_SHARE = 0.5


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
            process_pictures(processor, [scene.draw() for scene in tqdm(drawn, desc="drawing")]),
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


def align(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    store: PictureStore,
    *,
    steps: int,
    batch_size: int,
    seed: int,
) -> float:
    """Train tower and connector to map each tile onto its word embedding, direction and length.

    Returns the share of the last batch's tiles nearest to their word.

    Without this stage the language model sat at 15 % of words for a thousand steps; with it it
    starts from pictures that already "are" words.
    """
    names = list(concepts())
    name_ids = torch.tensor(processor.tokenizer.convert_tokens_to_ids(names))
    words = model.get_input_embeddings().weight.detach()[name_ids]
    directions = F.normalize(words, dim=-1)
    tiles = torch.tensor([[names.index(n) for n in scene.objects] for scene in store.scenes])
    singles = torch.tensor([names.index(n) for n in store.single_names])
    parameters = [*model.model.vision_model.parameters(), *model.model.connector.parameters()]
    optimizer, schedule = _optimizer(parameters, steps, peak=2e-3)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():  # start at the length of words
        length = tile_features(model, store.pixels[:8, :9].flatten(0, 1)).norm(dim=-1).mean()
        projection = model.model.connector.modality_projection.proj
        projection.weight.mul_(words.norm(dim=-1).mean() / length)
    accuracy = 0.0
    for step in tqdm(range(steps), desc="alignment"):
        rows = torch.randint(len(tiles), (batch_size,), generator=generator)
        lone = torch.randint(len(singles), (batch_size,), generator=generator)
        pixels = torch.cat([store.pixels[rows, :9].flatten(0, 1), store.single_pixels[lone, 9]])
        target = torch.cat([tiles[rows].flatten(), singles[lone]])
        states = tile_features(model, pixels)
        logits = F.normalize(states, dim=-1) @ directions.T / ALIGNMENT_TEMPERATURE
        # A picture longer than a word would drown the place that attention adds to it later.
        excess = states.norm(dim=-1) / words.norm(dim=-1)[target] - 1
        loss = F.cross_entropy(logits, target) + excess.square().mean()
        _update(loss, parameters, optimizer, schedule)
        accuracy = (logits.argmax(-1) == target).float().mean().item()
        if step % 100 == 99:
            tqdm.write(
                f"alignment step {step + 1}: loss {loss.item():.3f}, tiles right {accuracy:.3f}"
            )
    return accuracy


def tile_features(model: Idefics3ForConditionalGeneration, tiles: Tensor) -> Tensor:
    """Return one feature per tile, (T, D), of (T, 3, 32, 32) pixels."""
    features: Any = model.model.get_image_features(tiles[None].float())
    return features.pooler_output[0]


@torch.no_grad()
def picture_features(model: Idefics3ForConditionalGeneration, pixels: Tensor) -> Tensor:
    """Return (N, 10, D) features of (N, 10, 3, 32, 32) pixels, without gradient."""
    parts = [tile_features(model, chunk.flatten(0, 1)) for chunk in pixels.split(64)]
    return torch.cat(parts).view(*pixels.shape[:2], -1)


Part = tuple[str, float]
# Picture features (10, D), the user's words, the weighted answer.
Lesson = tuple[Tensor, str, list[Part]]


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
) -> Lesson:
    """Draw one lesson; ``features`` are those of the store's scenes and of its single pictures."""
    of_scenes, of_singles = features
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


def word_logits(model: Idefics3ForConditionalGeneration, batch: dict[str, Tensor]) -> Tensor:
    """Return (B, T, V) logits with known picture features in the places of the image tokens."""
    embeds = model.get_input_embeddings()(batch["input_ids"])
    is_image = (batch["input_ids"] == model.config.image_token_id)[..., None]
    embeds = embeds.masked_scatter(is_image, batch["features"])
    states = model.model.text_model(inputs_embeds=embeds, attention_mask=batch["attention_mask"])
    return model.lm_head(states.last_hidden_state)


def learn_scenes(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    store: PictureStore,
    *,
    steps: int,
    batch_size: int,
    seed: int,
    find_share: float,
) -> Iterator[tuple[int, float, float]]:
    """Train the language model on lessons; yield (step, loss, share of asked words right)."""
    write = LessonTokenizer(processor)
    rng = random.Random(seed)
    features = (picture_features(model, store.pixels), picture_features(model, store.single_pixels))
    parameters = list(
        model.model.text_model.parameters()
    )  # the output layer is tied to its embeddings
    optimizer, schedule = _optimizer(parameters, steps, peak=1.5e-3)
    for step in range(1, steps + 1):
        batch = write.batch(
            [lesson(store, features, rng, find_share=find_share) for _ in range(batch_size)]
        )
        weights = batch.pop("weights")[:, 1:]
        targets = batch["input_ids"][:, 1:]
        logits = word_logits(model, batch)[:, :-1]
        losses = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        loss = (losses * weights).sum() / weights.sum()
        _update(loss, parameters, optimizer, schedule)
        asked = weights == 1.0
        right = (logits.detach().argmax(-1) == targets)[asked].float().mean().item()
        yield step, loss.item(), right


@torch.no_grad()
def examine(
    model: Idefics3ForConditionalGeneration,
    processor: Idefics3Processor,
    *,
    style: str,
    num_scenes: int = 128,
    seed: int = 1_000_003,
) -> dict[str, float]:
    """Return shares on new scenes: cells named, objects found, direct one- and two-hop answers."""
    rng = random.Random(seed)
    drawn = [Scene.sample(rng, style) for _ in range(num_scenes)]
    pixels = process_pictures(processor, [scene.draw() for scene in drawn])
    write = LessonTokenizer(processor)
    scores: dict[str, list[float]] = {}
    for scene, picture in zip(drawn, picture_features(model, pixels), strict=True):
        cells = rng.sample(range(GRID * GRID), GRID * GRID)
        described = [
            ("describe the scene", [(f"{PLACES[c]}", 0.0), (scene.objects[c], 1.0)]) for c in cells
        ]
        found = [("describe the scene", [(scene.objects[c], 0.0), (PLACES[c], 1.0)]) for c in cells]
        asked = [questions.ask_hops(scene, hops, rng, held_out=False) for hops in (1, 1, 2, 2)]
        direct = [(q.text, [(q.answer, 1.0)]) for q in asked]
        lessons = [(picture, user, list(answer)) for user, answer in [*described, *found, *direct]]
        batch = write.batch(lessons)
        weights = batch.pop("weights")[:, 1:]
        hits = word_logits(model, batch)[:, :-1].argmax(-1) == batch["input_ids"][:, 1:]
        is_right = ((hits | (weights < 1.0)).all(-1)).float().tolist()
        names = (
            ["cell_named"] * 9
            + ["object_found"] * 9
            + ["one_hop_direct"] * 2
            + ["two_hops_direct"] * 2
        )
        for name, value in zip(names, is_right, strict=True):
            scores.setdefault(name, []).append(value)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _optimizer(
    parameters: list[torch.nn.Parameter], steps: int, *, peak: float
) -> tuple[torch.optim.AdamW, torch.optim.lr_scheduler.OneCycleLR]:
    optimizer = torch.optim.AdamW(parameters, lr=peak, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=peak, total_steps=steps, pct_start=0.1
    )
    return optimizer, schedule


def _update(
    loss: Tensor,
    parameters: list[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
) -> None:
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()
