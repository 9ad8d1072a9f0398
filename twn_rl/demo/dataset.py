"""Emoji-scene records on disk: splits, task mix, teacher CoTs, pictures.

Splits: ``train`` (warm start), ``rl`` (mostly hops), ``gate`` (asks as ``test`` does; no adapter is
trained on it), ``validation``, ``test``, and three that differ from what is trained on:
``unseen_pairs`` (Noto artwork, which the backbone knows and the adapters do not, and of the two-hop
questions the held-out pairs only), ``three_hops`` (nothing but the number of hops) and
``unseen_style`` (nothing but artwork without colour, which the backbone has not seen either).
"""

from __future__ import annotations

import json
import logging
import random
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm.auto import tqdm

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import write_records
from twn_rl.data.verified_blocks import FORMER_SUFFIX, STORE_SUFFIX
from twn_rl.demo import questions
from twn_rl.demo.questions import SCENE_RETRIEVAL, Question, TeacherNoise
from twn_rl.demo.scenes import GREY_STYLE, PLACES, STYLES, Scene, concepts, draw_tile
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

# Raised when equal settings give other records, so that older folders are written anew.
LAYOUT = 4
QUESTIONS_PER_SCENE = 4
# Kind of question -> share of the records. Easy kinds (no walk over the grid) are 65 % by default.
DEFAULT_MIX = {
    "hop0": 0.25,
    "hop1": 0.15,
    "hop2": 0.20,
    questions.CLASSIFY: 0.10,
    questions.GROUND: 0.10,
    questions.RETRIEVE: 0.10,
    SCENE_RETRIEVAL: 0.10,
}
# For the warm start a third of the two steps are a step and its opposite, 4 of 12 pairs.
TRAIN_MIX = {**DEFAULT_MIX, "hop2": 0.13, questions.THERE_AND_BACK: 0.07}
RL_MIX = {"hop0": 0.10, "hop1": 0.40, "hop2": 0.50}


@dataclass(frozen=True)
class SplitPlan:
    """What a split asks about and how it is drawn.

    Attributes:
        mix: Kind of question -> share of the records.
        style: Artwork of its scenes and picture targets.
        held_out: Whether hops over held-out pairs of relations are asked, or never.
        dice: Name its draws start from; None is its own.
    """

    mix: Mapping[str, float] = field(default_factory=lambda: DEFAULT_MIX)
    style: str = STYLES[0]
    held_out: bool = False
    dice: str | None = None


PLANS = {
    "train": SplitPlan(mix=TRAIN_MIX),
    "rl": SplitPlan(mix=RL_MIX),
    "gate": SplitPlan(),
    "validation": SplitPlan(),
    "test": SplitPlan(),
    # The dice keep the name of the first published figures, and so the questions.
    "unseen_pairs": SplitPlan(style=STYLES[1], held_out=True, dice="ood"),
    "three_hops": SplitPlan(mix={"hop3": 1.0}),
    "unseen_style": SplitPlan(style=GREY_STYLE),
}
SPLITS = tuple(PLANS)
# Start of a kind whose rest is the number of hops -> what asks it.
WALKING = {
    "hop": questions.ask_hops,
    questions.REWORDED: questions.ask_reworded,
    questions.INVERSE: questions.ask_inverse,
}
# Files of earlier layouts, which are replaced.
FORMER_SPLITS = ("ood",)
# Files of `new_domains` and of the experiment with few thoughts, made from the same settings.
DOMAIN_PREFIX = "new_domain_"
FEW_THOUGHTS_PREFIX = "few_thoughts_"


@dataclass(frozen=True)
class DemoSettings:
    """What the generator writes; equal settings give byte-identical records.

    The warm start's 560 steps of 24 read each record of `train` once.

    Attributes:
        seed: Seed of scenes, questions and teachers.
        noise: How teachers err.
        asides: Most cells that a teacher's CoT about a picture describes before it comes to the
            point, 0 to 9, row by row: thoughts longer than they need be, for RL to shorten. How
            many is drawn for each, or no sample would be shorter than another; which is not, or a
            policy could only guess what to say next.
    """

    seed: int = 0
    num_train: int = 13_440
    num_rl: int = 1600
    num_gate: int = 4800
    num_validation: int = 1000
    num_test: int = 1000
    num_unseen_pairs: int = 600
    num_three_hops: int = 300
    num_unseen_style: int = 400
    noise: TeacherNoise = field(default_factory=TeacherNoise)
    asides: int = 0

    def __post_init__(self) -> None:
        """Refuse more asides than a picture has cells."""
        if not 0 <= self.asides <= len(PLACES):
            raise ValueError(
                f"teacher_asides = {self.asides}; expected 0 to {len(PLACES)}, the cells of a scene"
            )

    def size(self, split: str) -> int:
        """Return the number of records of a split."""
        return int(getattr(self, f"num_{split}"))


def write_demo(directory: Path, settings: DemoSettings) -> dict[str, Path]:
    """Write all splits below ``directory``, or reuse an equal data set; return split -> file."""
    files = {split: directory / f"{split}.jsonl" for split in SPLITS}
    stamp = directory / "settings.json"
    told = asdict(settings)
    del told["asides"]  # folders from before there were any are equal
    if settings.asides:
        told["first_asides"] = settings.asides
    wanted = json.dumps({"layout": LAYOUT, **told}, indent=1, sort_keys=True)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        logger.info("Reusing the emoji-scene records in %s", directory)
        return files
    if directory.exists():
        _refuse_foreign(directory, stamp)
        shutil.rmtree(directory)
    _write_pictures(directory)
    for split, plan in PLANS.items():
        records = make_records(directory, split, plan, settings.size(split), settings)
        write_records(files[split], records)
    write_text(stamp, wanted)
    return files


def _refuse_foreign(directory: Path, stamp: Path) -> None:
    files = [f"{split}.jsonl" for split in (*SPLITS, *FORMER_SPLITS)]
    beside = (f"{file}{suffix}" for file in files for suffix in (STORE_SUFFIX, FORMER_SUFFIX))
    known = {stamp.name, "images", *files, *beside}
    names = [path.name for path in directory.iterdir() if path.name not in known]
    foreign = sorted(
        name for name in names if not name.startswith((DOMAIN_PREFIX, FEW_THOUGHTS_PREFIX))
    )
    if foreign:
        raise ValueError(
            f"data_dir = {directory} holds files that are not the demo's: {foreign[:5]}; expected "
            "an empty folder or an earlier demo data set; choose another folder"
        )


def _write_pictures(directory: Path) -> None:
    for style in dict.fromkeys(plan.style for plan in PLANS.values()):
        folder = directory / "images" / "emoji" / style
        folder.mkdir(parents=True, exist_ok=True)
        for name in concepts():
            draw_tile(name, style).save(folder / f"{name}.png")


def noisy_teachers(split: str, settings: DemoSettings, count: int) -> dict[str, list[str]]:
    """Return record id -> `count` CoTs of independent teachers, each erring by `settings.noise`.

    Teachers agree where `questions.teach` makes no mistakes: outside questions with hops, and on
    scenes that are asked for.
    """
    cots: dict[str, list[str]] = {}
    plan = PLANS[split]
    for i, kind, scene, draw in _draws(split, plan, settings.size(split), settings.seed):
        question = ask(kind, scene, draw, held_out=plan.held_out)
        dice = [random.Random(f"{settings.seed}/{split}/{i}/teacher{n}") for n in range(count)]
        asides = _asides(split, i, kind, scene, settings)
        cots[_identity(split, i)] = [
            asides + questions.teach(scene, question, settings.noise, die)[0] for die in dice
        ]
    return cots


def _asides(split: str, number: int, kind: str, scene: Scene, settings: DemoSettings) -> str:
    """Return what a teacher's CoT begins with, from dice of its own: other settings stay equal."""
    if kind == SCENE_RETRIEVAL or not settings.asides:
        return ""
    dice = random.Random(f"{settings.seed}/{split}/{number}/asides")
    cells = range(dice.randint(0, settings.asides))
    return questions.describe(scene, cells) + " ; " if cells else ""


def _draws(
    split: str, plan: SplitPlan, size: int, seed: int
) -> Iterator[tuple[int, str, Scene, random.Random]]:
    """Yield number, kind of question, scene and dice of every record of a split."""
    rng = random.Random(f"{seed}/{plan.dice or split}")
    kinds = rng.choices(list(plan.mix), weights=list(plan.mix.values()), k=size)
    scene = Scene.sample(rng, plan.style)
    for i, kind in enumerate(kinds):
        if i % QUESTIONS_PER_SCENE == 0:
            scene = Scene.sample(rng, plan.style)
        yield i, kind, scene, random.Random(rng.getrandbits(64))


def _identity(split: str, number: int) -> str:
    return f"{split}-{number:05d}"


def make_records(
    directory: Path, split: str, plan: SplitPlan, size: int, settings: DemoSettings
) -> list[Record]:
    """Return the records of a split, their scenes drawn below `directory`.

    Args:
        directory: Folder of the data set, which holds the pictures of the plan's style.
        split: Name, of which ids, folder and dice are made.
        plan: What is asked.
        size: Number of records.
        settings: Seed and the teacher's mistakes.
    """
    folder = directory / "images" / "scenes" / split
    folder.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    picture, draws = "", _draws(split, plan, size, settings.seed)
    for i, kind, scene, draw in tqdm(draws, desc=f"writing {split}", total=size, disable=None):
        if i % QUESTIONS_PER_SCENE == 0:
            picture = f"images/scenes/{split}/{i // QUESTIONS_PER_SCENE:05d}.png"
            scene.draw().save(directory / picture, compress_level=1)
        question = ask(kind, scene, draw, held_out=plan.held_out)
        cot, mistake = question.gold_cot, None
        if kind == SCENE_RETRIEVAL:  # no mistakes, so no dice are thrown for them
            targets = _scene_targets(scene, picture, records[-400:], draw)
        else:
            cot, mistake = questions.teach(scene, question, settings.noise, draw)
            targets = _targets(scene, question, draw)
        pool, instruction, positive, negatives = targets
        record = Record(
            id=_identity(split, i),
            source=f"emoji_scenes/{question.task}",
            query=Item(
                instruction=instruction,
                text=question.text,
                images=() if kind == SCENE_RETRIEVAL else (picture,),
            ),
            positive=positive,
            negatives=negatives,
            query_cot=_asides(split, i, kind, scene, settings) + cot,
            metadata={
                "task": question.task,
                "hops": question.hops,
                "relations": list(question.relations),
                "style": scene.style,
                "pool": pool,
                "caption": question.answer or None,
                "gold_cot": question.gold_cot,
                "teacher_mistake": mistake,
            },
        )
        records.append(record)
    return records


def ask(kind: str, scene: Scene, rng: random.Random, *, held_out: bool) -> Question:
    """Ask a question of one kind of the mix."""
    for name, walking in WALKING.items():
        if kind.startswith(name):
            return walking(scene, int(kind.removeprefix(name)), rng, held_out=held_out)
    asking = {
        questions.DIAGONAL: questions.ask_diagonal,
        questions.THERE_AND_BACK: questions.ask_there_and_back,
        questions.CLASSIFY: questions.ask_classification,
        questions.GROUND: questions.ask_grounding,
        questions.RETRIEVE: questions.ask_caption,
        SCENE_RETRIEVAL: questions.ask_scene,
    }
    return asking[kind](scene, rng)


# Pool, instruction, positive and negatives of a question.
Targets = tuple[str, str, Item, tuple[Item, ...]]


def _targets(scene: Scene, question: Question, rng: random.Random) -> Targets:
    """Return the answer, in words or as a picture, among others of its kind."""
    if question.task == questions.GROUND:
        pool, instruction, others = "place", "find the place", list(PLACES)
    elif question.task == questions.RETRIEVE:
        pool, instruction, others = "caption", "find the caption", list(question.distractors)
    else:
        is_picture = rng.random() < 0.5
        pool = f"picture/{scene.style}" if is_picture else "name"
        instruction = "find the picture" if is_picture else "find the name"
        category = concepts()[question.answer]
        others = list(scene.objects) + [n for n, c in concepts().items() if c == category]
    negatives = [name for name in dict.fromkeys(others) if name != question.answer]
    return (
        pool,
        instruction,
        _target(question.answer, pool),
        tuple(_target(name, pool) for name in negatives),
    )


def _target(answer: str, pool: str) -> Item:
    if pool.startswith("picture/"):
        return Item(images=(f"images/emoji/{pool.split('/')[1]}/{answer}.png",))
    return Item(text=answer)


def _scene_targets(
    scene: Scene, picture: str, earlier: list[Record], rng: random.Random
) -> Targets:
    """Return the scene itself among earlier ones."""
    shown = dict.fromkeys(r.query.images[0] for r in earlier if r.query.images)
    pictures = [other for other in shown if other != picture]
    negatives = tuple(Item(images=(p,)) for p in rng.sample(pictures, min(4, len(pictures))))
    return f"scene/{scene.style}", "find the scene", Item(images=(picture,)), negatives
