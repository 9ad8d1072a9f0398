"""The embedded backbone: its processor, pretraining's shortcut, what the weights can do."""

import random
from typing import Any

import pytest
import torch

from twn_rl.data.record import Item
from twn_rl.demo import tiny_vlm
from twn_rl.demo.lessons import (
    LessonTokenizer,
    PictureStore,
    lesson,
    process_pictures,
    scene_facts,
)
from twn_rl.demo.pretraining import examine, picture_features, word_logits
from twn_rl.demo.scenes import PLACES, STYLES, Scene, concepts
from twn_rl.modeling.model import DualLoraModel

IS_TRAINED = (tiny_vlm.BACKBONE_DIR / "model.safetensors").exists()
TILES = 10  # nine cells and the whole picture


@pytest.fixture(scope="module")
def processor():
    return tiny_vlm.make_processor()


@pytest.fixture(scope="module")
def model(processor):
    with torch.random.fork_rng():
        return tiny_vlm.make_model(processor, seed=0).eval()


def draw(count: int = 2) -> list[Scene]:
    rng = random.Random(0)
    return [Scene.sample(rng, STYLES[i % 2]) for i in range(count)]


def test_every_word_is_one_token_and_survives_decoding(processor) -> None:
    tokenizer = processor.tokenizer
    vocabulary = tiny_vlm.vocabulary()
    assert len(vocabulary) == len(set(vocabulary)) == len(tokenizer)
    words = [*concepts(), *concepts().values(), *PLACES, ";", "<think>", "</think>"]
    ids = tokenizer(" ".join(words), add_special_tokens=False)["input_ids"]
    assert len(ids) == len(words)
    assert tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True).split() == words


def test_think_marks_stand_apart_without_spaces(processor) -> None:
    ids = processor.tokenizer("<think>camel</think>", add_special_tokens=False)["input_ids"]
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["<think>", "camel", "</think>"]


def test_the_template_knows_every_word_around_the_question(processor) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "find the name"}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "which object"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    batch = processor(text=text, images=[[draw()[0].draw()]], return_tensors="pt")
    tokens = processor.tokenizer.convert_ids_to_tokens(batch["input_ids"][0])
    assert "<unk>" not in tokens
    assert tokens[-1] == "<assistant>"
    assert tokens.count("<image>") == TILES


def test_a_scene_becomes_ten_tiles_of_its_cells_in_reading_order(processor) -> None:
    scene = draw()[0]
    picture = scene.draw()
    pixels = process_pictures(processor, [picture])
    assert pixels.shape == (1, TILES, 3, 32, 32)
    for cell in range(9):
        box = (cell % 3 * 32, cell // 3 * 32, cell % 3 * 32 + 32, cell // 3 * 32 + 32)
        tile = torch.tensor(list(picture.crop(box).tobytes())).view(32, 32, 3).permute(2, 0, 1)
        torch.testing.assert_close(
            pixels[0, cell].float() * 0.5 + 0.5, tile / 255, atol=2e-3, rtol=0
        )


def test_the_shortcut_of_pretraining_equals_the_real_forward(processor, model) -> None:
    """Features made beforehand, put in place by hand, give the logits of the processor's batch."""
    drawn = draw()
    pictures = [scene.draw() for scene in drawn]
    pixels = process_pictures(processor, pictures)
    features = picture_features(model, pixels)
    answers = [("camel", 1.0)], [("pizza west", 1.0)]
    lessons = [
        (feature, "describe the scene", list(answer))
        for feature, answer in zip(features, answers, strict=True)
    ]
    batch = LessonTokenizer(processor).batch(lessons)
    texts = []
    for answer in answers:
        content = [{"type": "image"}, {"type": "text", "text": "describe the scene"}]
        messages = [{"role": "user", "content": content}]
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        texts.append(f"{prompt} {answer[0][0]} <end_of_utterance>")
    processor.tokenizer.padding_side = "right"
    try:
        real = processor(
            text=texts, images=[[p] for p in pictures], padding=True, return_tensors="pt"
        )
    finally:
        processor.tokenizer.padding_side = "left"
    torch.testing.assert_close(batch["input_ids"], real["input_ids"])
    torch.testing.assert_close(batch["attention_mask"], real["attention_mask"])
    with torch.no_grad():
        expected = model(**{**real, "pixel_values": pixels.float()}).logits
        shortcut = word_logits(model, batch)
        exact = model(**real).logits
    rows = real["attention_mask"].bool()
    torch.testing.assert_close(shortcut[rows], expected[rows], atol=1e-4, rtol=1e-4)
    # The store's half precision is all that is lost.
    torch.testing.assert_close(shortcut[rows], exact[rows], atol=2e-2, rtol=0)


def test_lesson_weights_sit_on_the_asked_words(processor) -> None:
    write = LessonTokenizer(processor)
    ids, weights = write("describe the scene", [("camel", 0.0), ("west", 1.0)])
    tokens = processor.tokenizer.convert_ids_to_tokens(ids)
    assert [t for t, w in zip(tokens, weights, strict=True) if w == 1.0] == ["west"]
    assert tokens[-1] == "<end_of_utterance>"


def test_scene_facts_are_true() -> None:
    for seed in range(60):
        rng = random.Random(seed)
        scene = draw()[0]
        facts = " ".join(words for words, _ in scene_facts(scene, rng, find_share=0.4)).split(" ; ")
        assert len(facts) == 9
        for fact in facts:
            words = fact.split()
            if len(words) == 2:  # an object and its place, in either order
                name, place = words if words[0] in concepts() else words[::-1]
                assert scene.objects[PLACES.index(place)] == name
            if len(words) == 3 and words[1] == "is":
                assert concepts()[words[0]] == words[2]


@pytest.mark.parametrize("hop_share", [0.0, 1.0])
def test_hops_are_asked_in_the_share_of_lessons_that_is_wanted(processor, hop_share: float) -> None:
    store = PictureStore.build(processor, num_scenes=2, num_singles=1, seed=0)
    features = torch.arange(2.0)[:, None, None], torch.zeros(1, 1, 1)
    rng = random.Random(0)
    for _ in range(60):
        picture, asked, answer = lesson(store, features, rng, find_share=0.4, hop_share=hop_share)
        is_hop = any(f"{word} the" in asked for word in ("left of", "right of", "above", "below"))
        assert is_hop == bool(hop_share)
        if is_hop:
            assert [words in store.scenes[int(picture)].objects for words, _ in answer] == [True]


def test_the_store_draws_both_styles_and_repeats_by_seed(processor) -> None:
    stores = [PictureStore.build(processor, num_scenes=4, num_singles=4, seed=s) for s in (0, 0, 1)]
    assert {scene.style for scene in stores[0].scenes} == set(STYLES)
    assert stores[0].pixels.shape == (4, TILES, 3, 32, 32)
    assert stores[0].single_pixels.shape == (4, TILES, 3, 32, 32)
    assert torch.equal(stores[0].pixels, stores[1].pixels)
    assert torch.equal(stores[0].single_pixels, stores[1].single_pixels)
    assert stores[0].scenes != stores[2].scenes


def test_the_model_is_small_and_repeats_by_seed(processor, model) -> None:
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 4e6
    with torch.random.fork_rng():
        again = tiny_vlm.make_model(processor, seed=0)
    for (name, old), new in zip(model.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(old, new), name


@pytest.mark.skipif(not IS_TRAINED, reason="the pretrained weights are not there")
def test_the_shipped_weights_see_but_do_not_reason() -> None:
    model = DualLoraModel.from_backbone(tiny_vlm.BACKBONE_DIR).backbone
    for style in STYLES:
        vlm: Any = model.model.eval()
        scores = examine(vlm, model.processor, style=style, num_scenes=16)
        assert scores["cell_named"] >= 0.97, (style, scores)
        assert scores["two_hops_direct"] < 0.5, (style, scores)


@pytest.mark.skipif(not IS_TRAINED, reason="the pretrained weights are not there")
def test_the_shipped_processor_is_the_one_in_the_code(processor) -> None:
    model = DualLoraModel.from_backbone(tiny_vlm.BACKBONE_DIR)
    assert model.tokenizer.get_vocab() == processor.tokenizer.get_vocab()
    picture = draw()[0].draw()
    items = [Item(instruction="find the name", text="where is the camel", images=(picture,))]
    batch = model.collate(items)
    assert batch["pixel_values"].shape[1] == TILES
    half = process_pictures(processor, [picture])
    torch.testing.assert_close(batch["pixel_values"].half(), half)
