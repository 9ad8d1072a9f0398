"""What can be asked about a scene: question, answer, CoT, teacher mistakes."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from twn_rl.demo.scenes import GRID, PLACES, ROW_WORDS, STEPS, Scene, concepts, step

# Pairs of successive relations never asked in training; only the split of unseen pairs asks them.
HELD_OUT_PAIRS = (("left", "above"), ("above", "left"), ("right", "below"), ("below", "right"))
# Relations that a biased teacher swaps in the hop that decides the answer.
SWAPPED_RELATIONS = {"right": "below", "below": "right"}
OPPOSITES = {"left": "right", "right": "left", "above": "below", "below": "above"}
# Places that name a direction -> the two steps they are.
DIAGONALS = {
    f"{south_north}{west_east}": (one, other)
    for south_north, one in (("north", "above"), ("south", "below"))
    for west_east, other in (("west", "left"), ("east", "right"))
}

CLASSIFY = "classification"
ANSWER = "question_answering"
RETRIEVE = "retrieval"
GROUND = "grounding"
SCENE_RETRIEVAL = "scene_retrieval"
THERE_AND_BACK = "there_and_back"
# Kinds that only new domains ask.
REWORDED = "reworded"
INVERSE = "inverse"
DIAGONAL = "diagonal"


@dataclass(frozen=True)
class TeacherNoise:
    """How a teacher errs: shares of the chains of thought, each between 0 and 1.

    Attributes:
        random_rate: share of CoTs in which one hop goes to a random wrong cell.
        swap_rate: share of the last hops over a relation in ``SWAPPED_RELATIONS`` that are swapped.
    """

    random_rate: float = 0.15
    swap_rate: float = 0.7


@dataclass(frozen=True)
class Question:
    """One question about one scene. ``hops`` is None outside question answering."""

    task: str
    text: str
    answer: str
    gold_cot: str
    hops: int | None = None
    start: str | None = None
    relations: tuple[str, ...] = ()
    distractors: tuple[str, ...] = field(default=())


def write_hops(scene: Scene, start: str, relations: tuple[str, ...], cells: list[int]) -> str:
    """Write a walk as text: where it starts, every step with the cell it reaches, the object there.

    >>> scene = Scene(("camel", "pizza", "bus", *"abcdef"), "fluent", 0)
    >>> write_hops(scene, "camel", ("right",), [0, 1])
    'camel northwest ; right north ; pizza'
    """
    parts = [f"{start} {PLACES[cells[0]]}"]
    parts += [f"{r} {PLACES[c]}" for r, c in zip(relations, cells[1:], strict=True)]
    return " ; ".join([*parts, scene.objects[cells[-1]]])


def describe(scene: Scene, cells: Iterable[int]) -> str:
    """Write what is in some cells.

    >>> describe(Scene(("camel", "pizza", "bus", *"abcdef"), "fluent", 0), [1, 0])
    'pizza north ; camel northwest'
    """
    return " ; ".join(f"{scene.objects[cell]} {PLACES[cell]}" for cell in cells)


def walk(cell: int, relations: tuple[str, ...]) -> list[int] | None:
    """Return the visited cells, start included, or None when a step leaves the grid."""
    cells = [cell]
    for relation in relations:
        reached = step(cells[-1], relation)
        if reached is None:
            return None
        cells.append(reached)
    return cells


def is_round_trip(pair: tuple[str, ...]) -> bool:
    """Tell whether two steps undo each other, which would make the question trivial."""
    return len(pair) == 2 and all(a == -b for a, b in zip(*(STEPS[r] for r in pair), strict=True))


def ask_hops(scene: Scene, hops: int, rng: random.Random, *, held_out: bool) -> Question:
    """Ask for the object ``hops`` steps away from a named one (0: at a named cell).

    No step undoes the one before. With ``held_out`` every question of two hops or more has a pair
    of successive relations in ``HELD_OUT_PAIRS``, otherwise none has.
    """
    if hops == 0:
        cell = rng.randrange(GRID * GRID)
        answer = scene.objects[cell]
        place = PLACES[cell]
        return Question(ANSWER, f"which object is at the {place}", answer, f"{place} ; {answer}", 0)
    return _ask_walk(scene, *_draw_walk(hops, rng, held_out=held_out))


def ask_there_and_back(scene: Scene, rng: random.Random) -> Question:
    """Ask for the object one step and its opposite away from a named one, which is that object.

    Asked for its thought. Without it training has two second steps after each first, the same and
    the one turn that is not held out: a policy can tell them apart by whether a word is repeated,
    without reading which word it is, and fails on the turn that is held out.
    """
    while True:
        cell, first = rng.randrange(GRID * GRID), rng.choice(list(STEPS))
        relations = (first, OPPOSITES[first])
        cells = walk(cell, relations)
        if cells is not None:
            return _ask_walk(scene, relations, cells)


def ask_reworded(scene: Scene, hops: int, rng: random.Random, *, held_out: bool) -> Question:
    """Ask the same in other words, all of which training has, but not in this order."""
    relations, cells = _draw_walk(hops, rng, held_out=held_out)
    place = " the place ".join(_phrase(r) for r in reversed(relations))
    text = f"which object is at the place {place} the {scene.objects[cells[0]]}"
    return _about_walk(scene, text, relations, cells)


def ask_inverse(scene: Scene, hops: int, rng: random.Random, *, held_out: bool) -> Question:
    """Ask the same from the other end: what the named object is left of lies right of it."""
    relations, cells = _draw_walk(hops, rng, held_out=held_out)
    place = " the one ".join(_phrase(OPPOSITES[r]) for r in relations)
    text = f"the {scene.objects[cells[0]]} is {place} which object"
    return _about_walk(scene, text, relations, cells)


def ask_diagonal(scene: Scene, rng: random.Random) -> Question:
    """Ask for the object in a diagonal direction, which is two steps and no relation of others."""
    while True:
        cell, direction = rng.randrange(GRID * GRID), rng.choice(list(DIAGONALS))
        relations = DIAGONALS[direction]
        cells = walk(cell, relations)
        if cells is not None:
            text = f"which object is {direction} of the {scene.objects[cell]}"
            return _about_walk(scene, text, relations, cells)


def _draw_walk(
    hops: int, rng: random.Random, *, held_out: bool
) -> tuple[tuple[str, ...], list[int]]:
    """Return relations that stay on the grid, and the cells they visit, start included."""
    while True:
        cell = rng.randrange(GRID * GRID)
        relations = tuple(rng.choice(list(STEPS)) for _ in range(hops))
        successive = list(pairwise(relations))
        if any(is_round_trip(pair) for pair in successive):
            continue
        if successive and held_out != any(pair in HELD_OUT_PAIRS for pair in successive):
            continue
        cells = walk(cell, relations)
        if cells is not None:
            return relations, cells


def _ask_walk(scene: Scene, relations: tuple[str, ...], cells: list[int]) -> Question:
    # "above the one left of the camel" walks left first, then above.
    place = " the one ".join(_phrase(r) for r in reversed(relations))
    text = f"which object is {place} the {scene.objects[cells[0]]}"
    return _about_walk(scene, text, relations, cells)


def _about_walk(scene: Scene, text: str, relations: tuple[str, ...], cells: list[int]) -> Question:
    start, answer = scene.objects[cells[0]], scene.objects[cells[-1]]
    gold = write_hops(scene, start, relations, cells)
    return Question(ANSWER, text, answer, gold, len(relations), start, relations)


def _phrase(relation: str) -> str:
    return relation if relation in ("above", "below") else f"{relation} of"


def ask_classification(scene: Scene, rng: random.Random) -> Question:
    """Ask which object of a category is in a row, where exactly one is.

    The one scene in a million whose rows hold a single category each is asked for a caption.
    """
    alone = []
    for row in range(GRID):
        categories = [concepts()[name] for name in scene.row(row)]
        alone += [(row, n) for n in scene.row(row) if categories.count(concepts()[n]) == 1]
    if not alone:
        return ask_caption(scene, rng)
    row, answer = rng.choice(alone)
    text = f"which {concepts()[answer]} is in the {ROW_WORDS[row]} row"
    return Question(CLASSIFY, text, answer, f"{' '.join(scene.row(row))} ; {answer}")


def ask_grounding(scene: Scene, rng: random.Random) -> Question:
    """Ask in which cell an object is."""
    cell = rng.randrange(GRID * GRID)
    name = scene.objects[cell]
    place = PLACES[cell]
    return Question(GROUND, f"where is the {name}", place, f"{name} {place}")


def ask_caption(scene: Scene, rng: random.Random) -> Question:
    """Ask for the caption of a row; distractors permute it or exchange one object."""
    row = rng.randrange(GRID)
    names = list(scene.row(row))
    others = [name for name in scene.objects if name not in names]
    distractors = [" ".join(names[::-1]), " ".join([names[1], names[0], names[2]])]
    for place in range(GRID):
        changed = list(names)
        changed[place] = rng.choice(others)
        distractors.append(" ".join(changed))
    caption = " ".join(names)
    text = f"caption of the {ROW_WORDS[row]} row"
    return Question(
        RETRIEVE, text, caption, f"{ROW_WORDS[row]} row ; {caption}", distractors=tuple(distractors)
    )


def ask_scene(scene: Scene, rng: random.Random) -> Question:
    """Ask for the scene itself, which has no answer in words, by the words of one of its rows."""
    row = rng.randrange(GRID)
    cot = describe(scene, range(row * GRID, (row + 1) * GRID))
    return Question(SCENE_RETRIEVAL, f"{ROW_WORDS[row]} row is {' '.join(scene.row(row))}", "", cot)


def teach(
    scene: Scene, question: Question, noise: TeacherNoise, rng: random.Random
) -> tuple[str, str | None]:
    """Return the teacher's CoT and the kind of its mistake (``"random"``, ``"swap"`` or None).

    A mistaken CoT goes on consistently from its mistake, so that its answer is wrong too. Both dice
    are thrown for every question, so that one noise setting never changes the randomness of the
    other.
    """
    wants_swap, wants_random = rng.random() < noise.swap_rate, rng.random() < noise.random_rate
    detour = random.Random(rng.getrandbits(32))
    if question.hops is None or question.start is None:
        return question.gold_cot, None
    start_cell = scene.objects.index(question.start)
    last = question.relations[-1]
    if wants_swap and last in SWAPPED_RELATIONS:
        relations = (*question.relations[:-1], SWAPPED_RELATIONS[last])
        cells = walk(start_cell, relations)
        if cells is not None:
            return write_hops(scene, question.start, relations, cells), "swap"
    if wants_random:
        return _wrong_hop(scene, question, start_cell, detour), "random"
    return question.gold_cot, None


def _wrong_hop(scene: Scene, question: Question, start_cell: int, rng: random.Random) -> str:
    """Send one hop (0 is the look-up of the start) to a random wrong cell and go on from there."""
    gold = walk(start_cell, question.relations)
    while gold is not None:
        wrong_hop = rng.randrange(len(gold))
        cells = list(gold)
        cells[wrong_hop] = rng.choice([c for c in range(GRID * GRID) if c != gold[wrong_hop]])
        tail = walk(cells[wrong_hop], question.relations[wrong_hop:])
        if tail is not None and tail[-1] != gold[-1]:
            cells[wrong_hop:] = tail
            return write_hops(scene, question.start or "", question.relations, cells)
    raise ValueError(
        f"question.relations = {question.relations} leaves the grid from cell {start_cell}"
    )
