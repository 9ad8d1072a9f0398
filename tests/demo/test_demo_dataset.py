"""The emoji records: splits, held-out pairs, vocabulary, reuse, and independence of the noise."""

import random
from collections import Counter
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import pytest
from PIL import Image

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.demo.dataset import (
    DEFAULT_MIX,
    RL_MIX,
    SPLITS,
    TRAIN_MIX,
    DemoSettings,
    ask,
    write_demo,
)
from twn_rl.demo.questions import (
    ANSWER,
    HELD_OUT_PAIRS,
    RETRIEVE,
    THERE_AND_BACK,
    TeacherNoise,
    is_round_trip,
)
from twn_rl.demo.scenes import GREY_STYLE, PLACES, STEPS, STYLES, Scene, concepts
from twn_rl.demo.tiny_vlm import make_tokenizer

SIZES = {
    "num_train": 160,
    "num_rl": 120,
    "num_gate": 24,
    "num_validation": 24,
    "num_test": 60,
    "num_unseen_pairs": 120,
    "num_three_hops": 40,
    "num_unseen_style": 40,
}
Splits = dict[str, RecordSet]
# The same few pictures are targets and negatives of all records.
content_key = cache(Item.content_key)


def write(folder: Path, **settings) -> Splits:
    files = write_demo(folder, DemoSettings(**{**SIZES, **settings}))
    return {split: load_records(file) for split, file in files.items()}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Splits:
    return write(tmp_path_factory.mktemp("demo") / "data")


def pairs(records: RecordSet) -> set[tuple[str, ...]]:
    return {p for r in records for p in pairwise(r.metadata["relations"])}


def name_of(item: Item) -> str:
    return item.text or Path(str(item.images[0])).stem


def test_every_split_has_its_size_and_loads_without_a_bad_record(demo: Splits) -> None:
    assert set(demo) == set(SPLITS)
    for split, records in demo.items():
        assert len(records) == SIZES[f"num_{split}"]
        assert not records.skipped
        assert len({record.id for record in records}) == len(records)


def test_held_out_pairs_are_asked_in_one_split_only(demo: Splits) -> None:
    for split in SPLITS:
        assert pairs(demo[split])
        if split == "unseen_pairs":
            assert pairs(demo[split]) <= set(HELD_OUT_PAIRS)
        else:
            assert not pairs(demo[split]) & set(HELD_OUT_PAIRS)


def test_round_trips_are_asked_in_training_only(demo: Splits) -> None:
    trips = {split: {*filter(is_round_trip, pairs(records))} for split, records in demo.items()}
    assert len(trips.pop("train")) == 4
    assert not any(trips.values())


def test_each_two_steps_of_training_are_asked_about_equally_often() -> None:
    draws = random.Random(0)
    asked = Counter()
    for kind, share in TRAIN_MIX.items():
        if kind in ("hop2", THERE_AND_BACK):
            scenes = (Scene.sample(draws, STYLES[0]) for _ in range(round(10_000 * share)))
            asked.update(ask(kind, scene, draws, held_out=False).relations for scene in scenes)
    assert len(asked) == len(STEPS) ** 2 - len(HELD_OUT_PAIRS)
    assert max(asked.values()) < 2 * min(asked.values())


def test_three_hops_are_asked_in_their_own_split_only(demo: Splits) -> None:
    for split, records in demo.items():
        hops = {record.metadata["hops"] for record in records}
        assert hops == {3} if split == "three_hops" else 3 not in hops
    for record in demo["three_hops"]:
        steps = str(record.query.text).count(" the one ") + 1
        assert steps == len(record.metadata["relations"]) == 3
        # The start, three places, the answer.
        assert record.metadata["gold_cot"].count(" ; ") == 4


def test_every_split_is_drawn_in_its_style(demo: Splits) -> None:
    other = {"unseen_pairs": STYLES[1], "unseen_style": GREY_STYLE}
    for split, records in demo.items():
        styles = {record.metadata["style"] for record in records}
        assert styles == {other.get(split, STYLES[0])}


def test_the_unseen_style_has_no_colour_and_the_others_have(demo: Splits) -> None:
    def has_colour(split: str) -> bool:
        folder = demo[split].data_root / "images" / "scenes" / split
        with Image.open(folder / "00000.png") as picture:
            red, green, blue = picture.split()
        return not red.tobytes() == green.tobytes() == blue.tobytes()

    assert {split for split in SPLITS if not has_colour(split)} == {"unseen_style"}


def test_the_positive_is_never_a_negative_and_negatives_are_distinct(demo: Splits) -> None:
    for records in demo.values():
        for record in records:
            keys = [content_key(item) for item in record.negatives]
            assert content_key(record.positive) not in keys
            assert len(set(keys)) == len(keys)


def test_the_gold_cot_ends_with_the_answer(demo: Splits) -> None:
    for records in demo.values():
        for record in records:
            gold = record.metadata["gold_cot"]
            if record.metadata["task"] == "scene_retrieval":
                assert gold.split()[-1] in PLACES
            elif record.metadata["task"] == RETRIEVE:
                assert gold.endswith(f"; {record.positive.text}")
            else:
                assert gold.split()[-1] == name_of(record.positive)


def test_targets_that_are_pictures_of_one_object_have_a_caption(demo: Splits) -> None:
    for records in demo.values():
        for record in records:
            is_scene = record.metadata["task"] == "scene_retrieval"
            assert record.metadata["caption"] == (None if is_scene else name_of(record.positive))


def test_records_of_an_older_layout_are_written_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DemoSettings(num_train=2, num_rl=2, num_validation=2, num_test=2)
    monkeypatch.setattr("twn_rl.demo.dataset.LAYOUT", 1)
    train = write_demo(tmp_path / "data", settings)["train"]
    monkeypatch.undo()
    train.write_text("old")
    former = tmp_path / "data" / "ood.jsonl"
    former.write_text("old")
    write_demo(tmp_path / "data", settings)
    assert train.read_text() != "old"
    assert not former.exists()


def test_metadata_tells_which_cots_are_wrong(demo: Splits) -> None:
    for records in demo.values():
        for record in records:
            is_gold = record.query_cot == record.metadata["gold_cot"]
            assert is_gold == (record.metadata["teacher_mistake"] is None)
    mistakes = {record.metadata["teacher_mistake"] for record in demo["rl"]}
    assert mistakes == {None, "random", "swap"}


def test_the_mix_is_kept(demo: Splits) -> None:
    def share(split: str, hops: int) -> float:
        return sum(r.metadata["hops"] == hops for r in demo[split]) / len(demo[split])

    assert share("rl", 2) == pytest.approx(RL_MIX["hop2"], abs=0.15)
    assert share("train", 2) == pytest.approx(DEFAULT_MIX["hop2"], abs=0.1)
    for mix in (DEFAULT_MIX, TRAIN_MIX, RL_MIX):
        assert sum(mix.values()) == pytest.approx(1.0)
    assert {record.metadata["task"] for record in demo["rl"]} == {ANSWER}


def test_picture_targets_are_in_the_style_of_the_scene(demo: Splits) -> None:
    for records in demo.values():
        for record in records:
            if record.metadata["pool"].startswith("picture/"):
                for item in (record.positive, *record.negatives):
                    path = Path(str(item.images[0]))
                    assert path.parent.name == record.metadata["style"]
                    assert path.stem in concepts()


def texts_of(record: Record) -> list[str]:
    renderer = Renderer()
    cots = (str(record.query_cot), record.metadata["gold_cot"])
    texts = [renderer.completion(cot) for cot in cots]
    for item in (record.query, record.positive, *record.negatives):
        texts += [part for part in (item.instruction, item.text) if part]
    return texts


def test_every_word_is_in_the_vocabulary(demo: Splits) -> None:
    known = set(make_tokenizer().get_vocab())
    words = {
        word
        for records in demo.values()
        for record in records
        for text in texts_of(record)
        for word in text.split()
    }
    for seed in range(200):
        rng = random.Random(seed)
        scene = Scene.sample(rng, STYLES[0])
        for kind in [*DEFAULT_MIX][:-1]:
            question = ask(kind, scene, rng, held_out=seed % 2 == 0)
            words |= {*question.text.split(), *question.gold_cot.split()}
    assert not words - known
    assert words >= {*concepts(), *concepts().values(), *PLACES}


def contents(records: RecordSet) -> list[tuple]:
    return [(r.id, r.query.text, name_of(r.positive), r.metadata["gold_cot"]) for r in records]


def test_the_same_seed_gives_the_same_records_and_another_seed_others(
    demo: Splits, tmp_path: Path
) -> None:
    again, other = write(tmp_path / "again"), write(tmp_path / "other", seed=1)
    for split in SPLITS:
        first, second = demo[split].data_root, again[split].data_root
        file = f"{split}.jsonl"
        assert (first / file).read_bytes() == (second / file).read_bytes()
        assert contents(demo[split]) != contents(other[split])
    picture = "images/scenes/rl/00003.png"
    roots = [data["rl"].data_root for data in (demo, again, other)]
    drawn = [(root / picture).read_bytes() for root in roots]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_records_are_those_that_published_figures_were_measured_on(demo: Splits) -> None:
    """A change of these digests is another data set: figures in the docs must be measured anew."""
    digests = {}
    for split in ("train", "rl", "validation", "test", "unseen_pairs"):
        text = (demo[split].data_root / f"{split}.jsonl").read_text(encoding="utf-8")
        # The split of unseen pairs was called ood then.
        digests[split] = sha256(text.replace("unseen_pairs", "ood").encode()).hexdigest()[:16]
    assert digests == {
        "train": "7b13975287bfac1f",
        "rl": "74067b3befa243a2",
        "validation": "426bab496676a3c1",
        "test": "e693edc4d00b7c2c",
        "unseen_pairs": "08d825ba82fe396a",
    }


def test_noise_changes_the_cots_and_nothing_else(demo: Splits, tmp_path: Path) -> None:
    clean = write(tmp_path / "clean", noise=TeacherNoise(0.0, 0.0))
    for split in SPLITS:
        assert contents(clean[split]) == contents(demo[split])
        for noisy, gold in zip(demo[split], clean[split], strict=True):
            assert gold.query_cot == gold.metadata["gold_cot"]
            assert gold.metadata["teacher_mistake"] is None
            assert [*map(content_key, noisy.items())] == [*map(content_key, gold.items())]


def test_a_teacher_with_asides_describes_true_cells_first_and_changes_nothing_else(
    demo: Splits, tmp_path: Path
) -> None:
    wordy = write(tmp_path / "wordy", asides=4)
    described: Counter[int] = Counter()
    for split in SPLITS:
        assert contents(wordy[split]) == contents(demo[split])
        for long, short in zip(wordy[split], demo[split], strict=True):
            assert long.metadata == short.metadata
            if not long.query.images:
                assert long.query_cot == short.query_cot
                continue
            assert long.query_cot
            assert short.query_cot
            assert long.query_cot.endswith(short.query_cot)
            *asides, _ = long.query_cot.removesuffix(short.query_cot).split(" ; ")
            described[len(asides)] += 1
            places = [aside.split()[1] for aside in asides]
            assert places == list(PLACES[: len(asides)]), "what comes next can be learned"
            gold = f" ; {short.metadata['gold_cot']} ; "
            for name, place in (aside.split() for aside in asides):
                assert name in concepts()
                if short.metadata["task"] == ANSWER and f" ; {place} ; " in gold:
                    assert f" ; {name} ; " in gold  # what the question asks for stands there
    assert set(described) == {0, 1, 2, 3, 4}, "a sample must be able to be shorter"
    assert described.total() > 300
    assert min(described.values()) > 0.1 * described.total()
    with pytest.raises(ValueError, match="teacher_asides = 10; expected 0 to 9"):
        DemoSettings(asides=10)


def test_an_equal_data_set_is_reused_and_another_one_replaced(tmp_path: Path) -> None:
    small = dict.fromkeys(SIZES, 8)
    folder = tmp_path / "data"
    write(folder, **small)
    before = (folder / "train.jsonl").stat().st_mtime_ns
    write(folder, **small)
    assert (folder / "train.jsonl").stat().st_mtime_ns == before
    assert len(write(folder, **{**small, "num_train": 12})["train"]) == 12
    assert not (folder / "images" / "scenes" / "train" / "00003.png").exists()


def test_an_interrupted_data_set_is_written_anew(tmp_path: Path) -> None:
    small = dict.fromkeys(SIZES, 8)
    folder = tmp_path / "data"
    write(folder, **small)
    (folder / "settings.json").unlink()
    (folder / "rl.jsonl").unlink()
    assert len(write(folder, **small)["rl"]) == 8


def test_a_foreign_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    thesis = tmp_path / "thesis.tex"
    thesis.write_text("years of work", encoding="utf-8")
    with pytest.raises(ValueError, match=r"thesis\.tex.*choose another folder"):
        write(tmp_path)
    assert thesis.read_text(encoding="utf-8") == "years of work"
    assert list(tmp_path.iterdir()) == [thesis]
