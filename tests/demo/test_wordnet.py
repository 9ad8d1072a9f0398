"""WordNet's own file format becomes a reverse dictionary whose splits share no word."""

from pathlib import Path

import pytest
from wordnet_files import DATA, INDEX, write_wordnet

from twn_rl.data.record_files import load_records
from twn_rl.demo.wordnet.database import (
    Nouns,
    Sense,
    Synset,
    WordNetError,
    find_wordnet,
    parse_synset,
    read_nouns,
)
from twn_rl.demo.wordnet.reverse_dictionary import (
    ReverseDictionarySettings,
    build_records,
    split_entries,
    usable_entries,
    write_reverse_dictionary,
)
from twn_rl.demo.wordnet.split_files import SPLITS

SMALL = ReverseDictionarySettings(
    num_train=4, num_rl=2, num_validation=1, num_test=2, num_ood=3, num_negatives=2
)


@pytest.fixture
def nouns(tmp_path: Path) -> Nouns:
    return read_nouns(write_wordnet(tmp_path / "dict"))


def test_a_synset_has_its_words_topic_definition_and_noun_pointers(nouns: Nouns) -> None:
    assert nouns.synsets["00000500"] == Synset(
        offset="00000500",
        topic="animal",
        lemmas=("hen", "biddy"),
        definition="adult female chicken kept for eggs",
        hypernyms=("00000300",),
    )
    assert nouns.synsets["00000300"].holonyms == ("00001900",)
    assert nouns.synsets["00000700"].lemmas == ("sparrow", "hedge sparrow")
    assert nouns.synsets["00000900"].definition == (
        "nocturnal hunter with a hawk-like beak; an owl sees well"
    )
    assert len(nouns.synsets) == 19


def test_a_word_count_is_hexadecimal_and_an_instance_has_no_kind(nouns: Nouns) -> None:
    words = " ".join(f"w{i} 0" for i in range(0x0B))
    assert len(parse_synset(f"00000001 03 n 0b {words} 000 | many words").lemmas) == 11
    assert nouns.synsets["00001700"].hypernyms == ()


def test_the_first_offset_of_the_index_is_the_most_frequent_meaning(nouns: Nouns) -> None:
    assert nouns.first_senses["hedge sparrow"] == Sense("00000700", is_tagged=True)
    assert nouns.first_senses["parrot"] == Sense("00000600", is_tagged=False)
    assert "1" not in nouns.first_senses  # the licence


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("data", " | adult female", " adult female", r"data\.noun, line 7: '00000500 05 n 02"),
        ("data", "hen 0 biddy 0 002", "hen 0 biddy 0 003", "do not add up"),
        ("data", "00000600 05 n 01", "00000600 99 n 01", r"data\.noun, line 8"),
        ("data", "00000300 05 n 01 bird", "00000301 05 n 01 bird", "points to 00000300"),
        ("index", "hen n 1 1 @ 1 1 00000500", "hen n 2 1 @ 2 1 00000500", "meanings is not the"),
        ("index", "hen n 1 1 @ 1 1 00000500", "hen n 1 1 @ 1 1 00000501", "files of one version"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, file, old, new, message) -> None:
    texts = {"data": DATA, "index": INDEX}
    assert old in texts[file]
    texts[file] = texts[file].replace(old, new)
    with pytest.raises(WordNetError, match=message):
        read_nouns(write_wordnet(tmp_path / "dict", **texts))


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(WordNetError, match=r"data\.noun"):
        read_nouns(write_wordnet(tmp_path, data=DATA[: len(DATA) // 2]))


def test_a_missing_wordnet_says_how_to_get_one(tmp_path: Path) -> None:
    write_wordnet(tmp_path / "WordNet-3.0" / "dict")
    assert find_wordnet(tmp_path / "WordNet-3.0") == tmp_path / "WordNet-3.0" / "dict"
    with pytest.raises(FileNotFoundError, match="apt-get install wordnet-base") as error:
        find_wordnet(tmp_path / "nowhere")
    assert "nowhere" in str(error.value)
    assert "--wordnet_dir" in str(error.value)


def test_names_self_naming_definitions_rare_words_and_roots_are_left_out(nouns: Nouns) -> None:
    words = [entry.word for entry in usable_entries(nouns, SMALL)]
    assert words == [
        *("animal", "bird", "fish", "hen", "sparrow", "dunnock", "salmon", "trout", "eel"),
        *("tool", "hammer", "saw", "file", "tooth", "flock"),
    ]
    with_rare = ReverseDictionarySettings(everyday_words_only=False)
    assert "parrot" in [entry.word for entry in usable_entries(nouns, with_rare)]
    short = ReverseDictionarySettings(max_definition_words=5)
    assert "sparrow" not in [entry.word for entry in usable_entries(nouns, short)]


def test_the_splits_share_no_word_no_meaning_and_ood_no_kind(nouns: Nouns) -> None:
    for seed in range(5):
        settings = ReverseDictionarySettings(**{**vars(SMALL), "seed": seed})
        splits = split_entries(usable_entries(nouns, settings), settings)
        assert [len(splits[split]) for split in SPLITS] == [4, 2, 1, 2, 3]
        entries = [entry for members in splits.values() for entry in members]
        assert len({entry.word.lower() for entry in entries}) == len(entries)
        assert len({entry.synset.offset for entry in entries}) == len(entries)
        kinds = {split: {e.kind.offset for e in members} for split, members in splits.items()}
        for split in SPLITS[:-1]:
            assert kinds["ood"].isdisjoint(kinds[split])


def test_the_test_split_does_not_depend_on_the_size_of_training(nouns: Nouns) -> None:
    fewer = ReverseDictionarySettings(**{**vars(SMALL), "num_train": 1})
    one, two = build_records(nouns, SMALL), build_records(nouns, fewer)
    for split in ("validation", "test", "ood"):
        assert one[split] == two[split]
    assert len(two["train"]) == 1


def test_another_seed_gives_other_splits_and_the_same_one_the_same(nouns: Nouns) -> None:
    other = ReverseDictionarySettings(**{**vars(SMALL), "seed": 1})
    assert build_records(nouns, SMALL) == build_records(nouns, SMALL)
    assert build_records(nouns, SMALL)["train"] != build_records(nouns, other)["train"]


def test_more_records_than_words_are_refused(nouns: Nouns) -> None:
    settings = ReverseDictionarySettings(**{**vars(SMALL), "num_train": 100})
    with pytest.raises(ValueError, match=r"splits \{'train': \d+\} are smaller than asked for"):
        split_entries(usable_entries(nouns, settings), settings)


def all_records(nouns: Nouns) -> dict[str, tuple]:
    built = build_records(nouns, SMALL)
    return {r.metadata["word"]: (split, r) for split in SPLITS for r in built[split]}


def test_a_record_asks_with_the_definition_for_the_word_and_its_kind(nouns: Nouns) -> None:
    found = all_records(nouns)
    word = next(word for word in ("hen", "sparrow", "salmon", "trout") if word in found)
    _, record = found[word]
    synset = nouns.synsets[record.metadata["synset"]]
    kind = nouns.synsets[synset.hypernyms[0]].lemmas[0]
    assert record.query.text == synset.definition
    assert record.positive.text == f"{word}, a kind of {kind}"
    assert record.query_cot.startswith(f"kind: {kind}, animal; features: ")
    assert record.query_cot.endswith(f"; word: {word}")
    assert record.metadata["task"] == "animal"


def test_the_thought_names_rare_words_of_the_definition_and_the_whole(nouns: Nouns) -> None:
    cots = {}
    for seed in range(6):  # every word is in some split of some seed
        settings = ReverseDictionarySettings(**{**vars(SMALL), "seed": seed})
        for records in build_records(nouns, settings).values():
            cots |= {record.metadata["word"]: record.query_cot for record in records}
    assert cots["hen"] == "kind: bird, animal; features: adult, female; word: hen"
    assert (
        cots["tooth"] == "kind: tool, entity; features: something, resembling, of saw; word: tooth"
    )


def test_negatives_share_the_kind_first_and_are_no_synonyms(nouns: Nouns) -> None:
    for seed in range(6):
        settings = ReverseDictionarySettings(**{**vars(SMALL), "seed": seed, "num_negatives": 9})
        for word, (_, record) in {
            r.metadata["word"]: (s, r)
            for s, rs in build_records(nouns, settings).items()
            for r in rs
        }.items():
            texts = [str(item.text) for item in record.negatives]
            target = str(record.positive.text)
            assert target not in texts
            assert len(set(texts)) == len(texts)
            # "hedge sparrow" is a word of both: one is no wrong answer for the other.
            if word in ("sparrow", "dunnock"):
                assert not any(t.startswith(("sparrow,", "dunnock,")) for t in texts)
            kind = target.partition(", ")[2]
            is_same = [text.endswith(kind) for text in texts]
            assert is_same == sorted(is_same, reverse=True)


def test_no_held_out_word_is_trained_on_as_a_negative(nouns: Nouns) -> None:
    built = build_records(nouns, SMALL)
    held_out = {r.positive.text for s in ("validation", "test", "ood") for r in built[s]}
    trained = {
        i.text for s in ("train", "rl") for r in built[s] for i in (r.positive, *r.negatives)
    }
    assert trained.isdisjoint(held_out)
    assert trained


def test_the_files_load_as_records(nouns: Nouns, tmp_path: Path) -> None:
    files = write_reverse_dictionary(tmp_path / "out", nouns, SMALL)
    assert {s: len(load_records(path)) for s, path in files.items()} == {
        "train": 4,
        "rl": 2,
        "validation": 1,
        "test": 2,
        "ood": 3,
    }
    first = {split: path.read_bytes() for split, path in files.items()}
    write_reverse_dictionary(tmp_path / "out", nouns, SMALL)
    assert {split: path.read_bytes() for split, path in files.items()} == first


def test_settings_that_cannot_work_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"num_train = 0.*num_features = -1"):
        ReverseDictionarySettings(num_train=0, num_features=-1)
