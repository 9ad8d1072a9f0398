"""Questions over kinds: facts hold what is asked for, splits share no word, three hops are new."""

import sys
from itertools import pairwise
from pathlib import Path

import pytest
from wordnet_files import write_wordnet

from twn_rl.cli import main
from twn_rl.data.record_files import load_records
from twn_rl.demo.wordnet.database import Nouns, Sense, Synset
from twn_rl.demo.wordnet.kinds import (
    CHAIN_FACTS,
    KindsSettings,
    build_records,
    chains,
    write_kinds,
)
from twn_rl.demo.wordnet.split_files import SPLITS
from twn_rl.evaluation.retrieval_pools import collect_candidates

SMALL = KindsSettings(num_train=6, num_rl=2, num_validation=2, num_test=3, num_ood=2)


def two_trees(*, words: int = 8) -> Nouns:
    """Return two unrelated trees of kinds, each with as many words at its leaves."""
    synsets: dict[str, Synset] = {}

    def add(name: str, definition: str, *kinds: str) -> None:
        synsets[name] = Synset(name, "animal", (name,), definition, kinds)

    for tree in ("beast", "tool"):
        add(f"{tree} root", f"what every {tree} is")
        add(f"wide {tree}", f"a {tree} of a wide sort", f"{tree} root")
        add(f"near {tree}", f"a {tree} of a near sort", f"wide {tree}")
        for number in range(words):
            add(f"{tree}{number}", f"the {tree} of number {number}", f"near {tree}")
    return Nouns(synsets, {name: Sense(name, is_tagged=True) for name in synsets})


def test_a_chain_is_a_word_and_its_three_kinds() -> None:
    nouns = two_trees(words=2)
    names = [[part.lemmas[0] for part in chain] for chain in chains(nouns, SMALL)]
    tree = ["near beast", "wide beast", "beast root"]
    assert names[:2] == [["beast0", *tree], ["beast1", *tree]]
    assert len(names) == 4
    assert all(len(chain) == CHAIN_FACTS + 1 for chain in names)


def test_rare_words_long_definitions_and_full_kinds_are_left_out() -> None:
    nouns = two_trees(words=3)
    rare = {**nouns.first_senses, "beast0": Sense("beast0", is_tagged=False)}
    wordy = {
        **nouns.synsets,
        "tool1": Synset("tool1", "artifact", ("tool1",), "so " * 17, ("near tool",)),
    }
    left = [chain[0].lemmas[0] for chain in chains(Nouns(wordy, rare), SMALL)]
    assert left == ["beast1", "beast2", "tool0", "tool2"]
    few = chains(nouns, KindsSettings(max_per_kind=1))
    assert [chain[0].lemmas[0] for chain in few] == ["beast0", "tool0"]


def test_the_query_holds_every_fact_on_the_way_and_the_thought_walks_it() -> None:
    records = build_records(two_trees(), SMALL)
    for split in SPLITS:
        for record in records[split]:
            hops, word = record.metadata["hops"], str(record.metadata["word"])
            way = str(record.query_cot).split(", ")
            text = str(record.query.text)
            assert way[0] == word
            assert len(way) == hops + 1
            for lower, upper in pairwise(way):
                assert f"{lower} is a kind of {upper}." in text
            assert text.endswith(f" Describe {'the kind of ' * hops}{word}.")
            assert str(record.positive.text).startswith(f"{way[-1]}: ")
            assert record.metadata["answer"] == way[-1]
            assert record.metadata["task"] == "animal"


def test_negatives_are_the_other_entries_of_the_facts() -> None:
    for record in build_records(two_trees(), SMALL)["train"]:
        named = {str(item.text).partition(":")[0] for item in record.negatives}
        facts = str(record.query.text).split(" Describe ", maxsplit=1)[0]
        words = {
            word.strip(" .") for fact in facts.split(".") for word in fact.split(" is a kind of ")
        }
        assert named == words - {"", str(record.metadata["answer"])}
        trees = {"beast" in name for name in named}
        assert trees == {True, False}, "the distraction comes from elsewhere"


def test_hops_up_to_two_are_trained_on_and_three_are_not() -> None:
    records = build_records(two_trees(), SMALL)
    hops = {split: sorted({r.metadata["hops"] for r in records[split]}) for split in SPLITS}
    assert hops["train"] == hops["test"] == [0, 1, 2]
    assert hops["ood"] == [3]


def test_splits_share_no_word_that_is_asked_about_and_test_does_not_depend_on_training() -> None:
    nouns = two_trees()
    records = build_records(nouns, SMALL)
    words = [r.metadata["word"] for split in SPLITS for r in records[split]]
    assert len(words) == len(set(words)) == 15
    fewer = build_records(nouns, KindsSettings(**{**vars(SMALL), "num_train": 3}))
    assert [fewer[split] for split in ("test", "ood")] == [records["test"], records["ood"]]
    other = build_records(nouns, KindsSettings(**{**vars(SMALL), "seed": 1}))
    assert other["test"] != records["test"]


def test_files_load_as_records_whose_candidates_are_entries(tmp_path: Path) -> None:
    files = write_kinds(tmp_path, two_trees(), SMALL)
    sizes = {split: len(load_records(path)) for split, path in files.items()}
    assert sizes == {"train": 6, "rl": 2, "validation": 2, "test": 3, "ood": 2}
    pool = collect_candidates(load_records(files["test"]))
    assert all(": " in str(item.text) for item in pool.items)
    before = {path: path.read_bytes() for path in files.values()}
    write_kinds(tmp_path, two_trees(), SMALL)
    assert {path: path.read_bytes() for path in files.values()} == before


def test_the_command_reads_wordnets_own_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # Another test may have imported what a command runs as its main program.
    monkeypatch.delitem(sys.modules, "twn_rl.recipes.prepare.wordnet_kinds", raising=False)
    monkeypatch.setattr(sys, "argv", ["twn-rl"])
    source, target = write_wordnet(tmp_path / "dict"), tmp_path / "kinds"
    sizes = [f"--num_{split}={2 if split == 'train' else 1}" for split in SPLITS]
    folders = [f"--wordnet_dir={source}", f"--output_dir={target}"]
    assert main(["prepare-wordnet-kinds", *folders, *sizes]) == 0
    assert f"{target / 'train.jsonl'}: 2 records" in capsys.readouterr().err
    (record,) = load_records(target / "ood.jsonl")
    word = record.metadata["word"]
    assert record.query_cot in [f"{word}, {kind}, animal, entity" for kind in ("bird", "fish")]


def test_too_many_records_and_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"15 records were asked for, but only 6 words"):
        build_records(two_trees(words=3), SMALL)
    with pytest.raises(ValueError, match=r"num_train = 0.*max_per_kind = 0"):
        KindsSettings(num_train=0, max_per_kind=0)
