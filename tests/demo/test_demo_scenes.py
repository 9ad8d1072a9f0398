"""The emoji scenes: artwork, grid walks, questions, and how often and where the teacher errs."""

import random
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from twn_rl.demo import questions, scenes
from twn_rl.demo.dataset import SCENE_RETRIEVAL, TRAIN_MIX, ask
from twn_rl.demo.questions import (
    HELD_OUT_PAIRS,
    SWAPPED_RELATIONS,
    Question,
    TeacherNoise,
    ask_hops,
    is_round_trip,
    teach,
    walk,
)
from twn_rl.demo.scenes import ARTWORK_DIR, GRID, PLACES, STEPS, STYLES, Scene, concepts, step

CELLS = GRID * GRID
PAIRS = [(a, b) for a in STEPS for b in STEPS]
KINDS = [kind for kind in TRAIN_MIX if kind != SCENE_RETRIEVAL]


def sample(seed: int, style: str = "fluent") -> tuple[Scene, random.Random]:
    rng = random.Random(seed)
    return Scene.sample(rng, style), rng


def many_hops(count: int, hops: int = 2) -> list[tuple[Scene, Question]]:
    rng = random.Random(0)
    drawn = [Scene.sample(rng, "fluent") for _ in range(count)]
    return [(scene, ask_hops(scene, hops, rng, held_out=False)) for scene in drawn]


def test_both_styles_are_complete() -> None:
    assert len(concepts()) == 64
    assert len(set(concepts().values())) >= 8
    assert min(Counter(concepts().values()).values()) >= 2
    for style in STYLES:
        assert {path.stem for path in (ARTWORK_DIR / style).iterdir()} == set(concepts())
        for name in concepts():
            artwork = scenes.emoji(name, style)
            assert artwork.mode == "RGBA"
            assert 32 <= max(artwork.size) <= 64
            assert artwork.getchannel("A").getextrema()[1] == 255, f"{name} is invisible"


def test_every_name_is_one_lower_case_word() -> None:
    words = [*concepts(), *concepts().values(), *PLACES]
    assert all(word.isalpha() and word.islower() for word in words)
    assert not set(concepts()) & set(STEPS)


def test_package_data_is_small() -> None:
    def size(folder: Path) -> int:
        return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())

    assert size(ARTWORK_DIR) < 2_000_000
    assert size(ARTWORK_DIR.parent) < 12_000_000


def test_the_same_scene_has_the_same_pixels_and_another_style_has_others() -> None:
    scene, _ = sample(3)
    picture = scene.draw()
    assert picture.mode == "RGB"
    assert picture.size == (96, 96)
    assert picture.tobytes() == Scene(scene.objects, "fluent", scene.seed).draw().tobytes()
    assert picture.tobytes() != Scene(scene.objects, "noto", scene.seed).draw().tobytes()
    assert picture.tobytes() != Scene(scene.objects, "fluent", scene.seed + 1).draw().tobytes()


def test_objects_stand_in_reading_order() -> None:
    scene, _ = sample(4)
    changed = list(scene.objects)
    changed[5] = next(name for name in concepts() if name not in scene.objects)
    before, after = scene.draw(), Scene(tuple(changed), "fluent", scene.seed).draw()
    box = (2 * 32, 32, 3 * 32, 2 * 32)  # cell 5: middle right
    assert before.crop(box).tobytes() != after.crop(box).tobytes()
    above = (0, 0, 96, 32)  # drawn before cell 5
    assert before.crop(above).tobytes() == after.crop(above).tobytes()
    assert len(set(scene.objects)) == CELLS


def test_tiles_without_jitter_are_white_and_centred() -> None:
    tile = scenes.draw_tile("camel", "noto")
    assert tile.size == (32, 32)
    assert tile.getpixel((0, 0)) == (255, 255, 255)
    assert isinstance(tile, Image.Image)


@pytest.mark.parametrize("relation", STEPS)
def test_a_step_and_its_opposite_return_and_the_edge_stops(relation: str) -> None:
    opposite = {"left": "right", "right": "left", "above": "below", "below": "above"}[relation]
    reached = {cell: step(cell, relation) for cell in range(CELLS)}
    assert sum(cell is None for cell in reached.values()) == GRID
    for cell, neighbour in reached.items():
        if neighbour is not None:
            assert step(neighbour, opposite) == cell


def test_walks_visit_every_cell_on_the_way_and_stop_at_the_edge() -> None:
    assert walk(0, ("right", "below")) == [0, 1, 4]
    assert walk(4, ()) == [4]
    assert walk(8, ("above", "right")) is None


def test_round_trips_are_the_four_pairs_that_undo_themselves() -> None:
    undone = {pair for pair in PAIRS if walk(4, pair) == [4, (walk(4, pair) or [0] * 3)[1], 4]}
    assert {pair for pair in PAIRS if is_round_trip(pair)} == undone
    assert len(undone) == 4
    assert not is_round_trip(("left",))


@pytest.mark.parametrize("held_out", [False, True])
def test_two_hop_questions_keep_to_their_side_of_the_held_out_pairs(held_out: bool) -> None:
    asked = Counter()
    for seed in range(400):
        scene, rng = sample(seed)
        asked[ask_hops(scene, 2, rng, held_out=held_out).relations] += 1
    expected = {
        pair
        for pair in PAIRS
        if (pair in HELD_OUT_PAIRS) == held_out and walk(4, pair) and not is_round_trip(pair)
    }
    expected |= {(r, r) for r in STEPS if not held_out}  # possible from an edge only
    assert set(asked) == expected


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_gold_cot_ends_with_the_answer(kind: str, held_out: bool) -> None:
    for seed in range(60):
        scene, rng = sample(seed)
        question = ask(kind, scene, rng, held_out=held_out)
        assert question.gold_cot.endswith(question.answer)
        assert question.answer not in question.distractors
        assert len(set(question.distractors)) == len(question.distractors)


@pytest.mark.parametrize("hops", [1, 2])
def test_the_gold_cot_is_the_walk_of_the_question(hops: int) -> None:
    for scene, question in many_hops(100, hops):
        start, *steps, answer = question.gold_cot.split(" ; ")
        name, _, words = start.partition(" ")
        assert name == question.start
        cells = [PLACES.index(words)]
        assert scene.objects[cells[0]] == name
        for part, relation in zip(steps, question.relations, strict=True):
            written, _, words = part.partition(" ")
            assert written == relation
            cells.append(PLACES.index(words))
        assert cells == walk(cells[0], question.relations)
        assert scene.objects[cells[-1]] == answer == question.answer
        # "above the one left of the camel": the text names the last step first.
        order = [word for word in question.text.split() if word in STEPS]
        assert order == list(reversed(question.relations))


def test_answers_of_the_easy_kinds_are_true() -> None:
    for seed in range(100):
        scene, rng = sample(seed)
        zero = ask_hops(scene, 0, rng, held_out=False)
        assert scene.objects[PLACES.index(zero.text.partition("at the ")[2])] == zero.answer
        where = questions.ask_grounding(scene, rng)
        assert scene.objects[PLACES.index(where.answer)] == where.text.removeprefix("where is the ")
        caption = questions.ask_caption(scene, rng)
        assert tuple(caption.answer.split()) in [scene.row(row) for row in range(GRID)]
        assert len(caption.distractors) == 5


def test_classification_asks_for_the_only_member_of_its_category_in_the_asked_scene() -> None:
    for seed in range(300):
        scene, rng = sample(seed)
        question = questions.ask_classification(scene, rng)
        words = question.text.split()
        row = scene.row(scenes.ROW_WORDS.index(words[-2]))
        members = [name for name in row if concepts()[name] == words[1]]
        assert members == [question.answer]


def test_a_scene_without_an_object_alone_in_its_category_is_asked_for_a_caption() -> None:
    categories = Counter(concepts().values())
    rows = [[n for n, c in concepts().items() if c == kind][:GRID] for kind in list(categories)[:3]]
    scene = Scene(tuple(name for row in rows for name in row), "fluent", 0)
    assert questions.ask_classification(scene, random.Random(0)).task == questions.RETRIEVE


def kind_of_mistake(scene: Scene, question: Question, cot: str) -> str | None:
    """Tell from the text alone what the teacher did."""
    if cot == question.gold_cot:
        return None
    written = tuple(part.split()[0] for part in cot.split(" ; ")[1:-1])
    return "random" if written == question.relations else "swap"


def test_shares_of_teacher_mistakes() -> None:
    noise = TeacherNoise(random_rate=0.2, swap_rate=0.6)
    asked = many_hops(3000)
    rng = random.Random(1)
    counts: Counter = Counter()
    for scene, question in asked:
        cot, mistake = teach(scene, question, noise, rng)
        assert kind_of_mistake(scene, question, cot) == mistake
        last = question.relations[-1]
        start = scene.objects.index(question.start or "")
        swapped = (*question.relations[:-1], SWAPPED_RELATIONS.get(last, last))
        can_swap = last in SWAPPED_RELATIONS and walk(start, swapped) is not None
        counts[can_swap, mistake] += 1
    able = sum(count for (can, _), count in counts.items() if can)
    unable = sum(count for (can, _), count in counts.items() if not can)
    assert min(able, unable) > 500
    assert counts[False, "swap"] == 0
    assert counts[True, "swap"] / able == pytest.approx(0.6, abs=0.06)
    assert counts[True, "random"] / able == pytest.approx(0.4 * 0.2, abs=0.04)
    assert counts[False, "random"] / unable == pytest.approx(0.2, abs=0.05)


@pytest.mark.parametrize("hops", [1, 2])
@pytest.mark.parametrize("noise", [TeacherNoise(1.0, 0.0), TeacherNoise(0.0, 1.0)])
def test_a_mistaken_cot_reaches_a_wrong_object_of_the_scene(noise: TeacherNoise, hops: int) -> None:
    rng = random.Random(2)
    mistakes = Counter()
    for scene, question in many_hops(300, hops):
        cot, mistake = teach(scene, question, noise, rng)
        mistakes[mistake] += 1
        *_, last_hop, answer = cot.split(" ; ")
        # The object it ends on is the one at the cell it says it reached: consistent, and wrong.
        assert scene.objects[PLACES.index(last_hop.partition(" ")[2])] == answer
        assert (answer != question.answer) == (mistake is not None)
    if noise.random_rate:
        assert set(mistakes) == {"random"}
    else:
        assert set(mistakes) == {"swap", None}


def test_a_random_mistake_is_one_wrong_cell_followed_faithfully() -> None:
    rng = random.Random(5)
    first_wrong = Counter()
    for scene, question in many_hops(400):
        gold = [part.partition(" ")[2] for part in question.gold_cot.split(" ; ")[:-1]]
        cot, _ = teach(scene, question, TeacherNoise(1.0, 0.0), rng)
        cells = [part.partition(" ")[2] for part in cot.split(" ; ")[:-1]]
        wrong = next(i for i in range(3) if cells[i] != gold[i])
        first_wrong[wrong] += 1
        rest = walk(PLACES.index(cells[wrong]), question.relations[wrong:])
        assert rest == [PLACES.index(words) for words in cells[wrong:]]
    assert set(first_wrong) == {0, 1, 2}


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_without_noise_writes_gold(kind: str) -> None:
    for seed in range(40):
        scene, rng = sample(seed)
        question = ask(kind, scene, rng, held_out=False)
        assert teach(scene, question, TeacherNoise(0.0, 0.0), rng) == (question.gold_cot, None)


def test_only_walks_are_mistaken() -> None:
    for kind in KINDS:
        scene, rng = sample(7)
        question = ask(kind, scene, rng, held_out=False)
        _, mistake = teach(scene, question, TeacherNoise(1.0, 0.0), rng)
        assert (mistake is None) == (kind not in ("hop1", "hop2", "there_and_back"))


def test_one_noise_setting_does_not_change_the_randomness_of_the_other() -> None:
    asked = many_hops(300)

    def mistakes(noise: TeacherNoise) -> list[str | None]:
        rng = random.Random(9)
        return [teach(scene, question, noise, rng)[1] for scene, question in asked]

    only_random, both = mistakes(TeacherNoise(0.3, 0.0)), mistakes(TeacherNoise(0.3, 0.7))
    assert "swap" in both
    for alone, together in zip(only_random, both, strict=True):
        assert together in (alone, "swap")
