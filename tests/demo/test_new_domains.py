"""New domains: what they ask, that no scene is the demo's, that no thought is given."""

import random
from pathlib import Path
from typing import Any

import pytest

from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.demo.dataset import SPLITS, DemoSettings, write_demo
from twn_rl.demo.new_domains import DOMAINS, PARTS, DomainSizes, write_domain
from twn_rl.demo.questions import (
    DIAGONALS,
    HELD_OUT_PAIRS,
    ask_diagonal,
    ask_inverse,
    ask_reworded,
)
from twn_rl.demo.scenes import PLACES, Scene
from twn_rl.demo.tiny_vlm import make_tokenizer

SIZES = DomainSizes(train=40, validation=16, test=24)


def settings_of(size: int) -> DemoSettings:
    sizes: dict[str, Any] = {f"num_{split}": size for split in SPLITS}
    return DemoSettings(**sizes)


SETTINGS = settings_of(24)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "data"
    write_demo(folder, SETTINGS)
    return folder


def read(folder: Path, domain: str) -> dict[str, RecordSet]:
    files = write_domain(folder, domain, SETTINGS, SIZES)
    return {part: load_records(file) for part, file in files.items()}


@pytest.mark.parametrize("domain", DOMAINS)
def test_a_domain_has_pairs_alone_in_scenes_of_its_own(folder: Path, domain: str) -> None:
    parts = read(folder, domain)
    assert {part: len(records) for part, records in parts.items()} == vars(SIZES)
    known = set(make_tokenizer().get_vocab())
    for records in parts.values():
        for record in records:
            assert record.query_cot is None
            gold = record.metadata["gold_cot"]
            assert gold.split()[-1] == record.metadata["caption"]
            assert not {*str(record.query.text).split(), *gold.split()} - known
    every = [load_records(folder / f"{split}.jsonl") for split in SPLITS]
    pictures = [
        {Path(str(path)).read_bytes() for record in records for path in record.query.images}
        for records in (*parts.values(), *every)
    ]
    assert sum(map(len, pictures)) == len(set[bytes]().union(*pictures)), "a scene twice"


def test_what_is_new_is_what_the_name_says(folder: Path) -> None:
    found = {domain: [r for p in read(folder, domain).values() for r in p] for domain in DOMAINS}
    texts = {domain: " ".join(str(r.query.text) for r in rs) for domain, rs in found.items()}
    assert texts["reworded"].count("which object is at the place ") == 80
    assert texts["inverse"].count(" which object") == 80
    assert all(r.metadata["hops"] == 3 for r in found["three_hops"])
    assert all(r.metadata["style"] == "grey" for r in found["grey"])
    assert {tuple(r.metadata["relations"]) for r in found["unseen_pairs"]} <= set(HELD_OUT_PAIRS)
    assert set(DIAGONALS) <= set(texts["diagonal"].split())
    assert not {"above", "below", "left", "right"} & set(texts["diagonal"].split())


def test_an_equal_domain_is_reused_and_the_demo_is_left_as_it_was(folder: Path) -> None:
    before = {split: (folder / f"{split}.jsonl").read_bytes() for split in SPLITS}
    files = write_domain(folder, "inverse", SETTINGS, SIZES)
    times = [files[part].stat().st_mtime_ns for part in PARTS]
    write_domain(folder, "inverse", SETTINGS, SIZES)
    assert [files[part].stat().st_mtime_ns for part in PARTS] == times
    write_demo(folder, SETTINGS)
    assert {split: (folder / f"{split}.jsonl").read_bytes() for split in SPLITS} == before
    write_demo(folder, settings_of(8))
    assert not files["train"].exists(), "a demo of other settings takes its domains along"


def test_a_domain_that_does_not_exist_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"domain = 'moon'; expected one of \['reworded'"):
        write_domain(folder, "moon", SETTINGS)


def test_the_other_end_of_a_relation_and_a_diagonal_by_hand() -> None:
    scene = Scene(tuple("abcdefghi"), "fluent", 0)  # a b c / d e f / g h i
    asked = [ask_inverse(scene, 1, random.Random(n), held_out=False) for n in range(200)]
    answers = {question.text: question.answer for question in asked}
    assert answers["the a is left of which object"] == "b"
    assert answers["the e is below which object"] == "b"
    asked = [ask_inverse(scene, 2, random.Random(n), held_out=False) for n in range(2000)]
    answers = {question.text: question.answer for question in asked}
    # g is below d, which is left of e.
    assert answers["the g is below the one left of which object"] == "e"
    asked = [ask_reworded(scene, 2, random.Random(n), held_out=False) for n in range(2000)]
    answers = {question.text: question.answer for question in asked}
    # d is left of e, a is above d.
    text = "which object is at the place above the place left of the e"
    assert text not in answers, "a held-out pair"
    assert answers["which object is at the place right of the place above the d"] == "b"
    asked = [ask_diagonal(scene, random.Random(n)) for n in range(200)]
    answers = {question.text: question for question in asked}
    question = answers["which object is northeast of the e"]
    assert (question.answer, question.hops) == ("c", 2)
    assert question.gold_cot == f"e {PLACES[4]} ; above {PLACES[1]} ; right {PLACES[2]} ; c"
