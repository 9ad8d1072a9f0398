"""How the embedded backbone learns to see: alignment, then scene facts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import Idefics3ForConditionalGeneration, Idefics3Processor

from twn_rl.demo import questions
from twn_rl.demo.lessons import LessonTokenizer, PictureStore, lesson, process_pictures
from twn_rl.demo.scenes import GRID, PLACES, Scene, concepts

ALIGNMENT_TEMPERATURE = 0.05


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
    for step in tqdm(range(steps), desc="alignment", disable=None):
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
    hop_share: float = 0.0,
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
            [
                lesson(store, features, rng, find_share=find_share, hop_share=hop_share)
                for _ in range(batch_size)
            ]
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
