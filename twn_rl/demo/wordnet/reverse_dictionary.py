"""Synsets -> records: a definition asks for its word.

The query is a definition, the target the word with its kind ("sparrow, a kind of passerine"), the
negatives are words of the same kind, and the chain of thought names kind, features and word. Every
word stands for its most frequent meaning only, so a word belongs to one split.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from twn_rl.data.record import Item, Record
from twn_rl.demo.wordnet.database import Nouns, Synset, is_first_sense
from twn_rl.demo.wordnet.split_files import SPLITS, write_splits
from twn_rl.runtime.problems import Problems

INSTRUCTION = "Which word has this definition?"
SOURCE = "wordnet"


@dataclass(frozen=True)
class ReverseDictionarySettings:
    """What is written; equal settings and WordNet files give byte-identical records.

    Attributes:
        seed: Decides splits and negatives.
        num_train: Records of the warm start.
        num_rl: Records of RL.
        num_validation: Records to tune on.
        num_test: Held-out meanings.
        num_ood: Held-out kinds: no word of the same direct hypernym is in any other split.
        num_negatives: Most words of the same kind listed per record.
        num_features: Words of the definition the chain of thought repeats, the rarest first.
        num_kinds: Levels of hypernyms the chain of thought names.
        max_definition_words: Longer definitions are left out.
        everyday_words_only: Leave out words that WordNet's sense-tagged texts do not have.
    """

    seed: int = 0
    num_train: int = 5000
    num_rl: int = 200
    num_validation: int = 100
    num_test: int = 200
    num_ood: int = 100
    num_negatives: int = 8
    num_features: int = 2
    num_kinds: int = 2
    max_definition_words: int = 24
    everyday_words_only: bool = True

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        sizes = (f"num_{split}" for split in SPLITS)
        problems.expect(self, ">= 1", *sizes, "num_kinds", "max_definition_words")
        problems.expect(self, ">= 0", "seed", "num_negatives", "num_features")
        problems.refuse("ReverseDictionarySettings")

    def size(self, split: str) -> int:
        """Return the number of records of a split."""
        return int(getattr(self, f"num_{split}"))


@dataclass(frozen=True)
class Entry:
    """A word with one meaning and one kind.

    Attributes:
        word: First lemma of the synset.
        synset: Its meaning.
        kind: The direct hypernym, the first one if there are several.
    """

    word: str
    synset: Synset
    kind: Synset

    @property
    def target(self) -> Item:
        """The item to be found."""
        return Item(text=f"{self.word}, a kind of {self.kind.lemmas[0]}")


# Offset of a kind -> its words; offset of a kind's kind -> the words below, which are cousins.
Families = tuple[dict[str, list[Entry]], dict[str, list[Entry]]]


def families_of(entries: Iterable[Entry]) -> Families:
    """Return the entries by kind and by the kind of their kind; order is kept."""
    by_kind, by_next_kind = {}, {}
    for entry in entries:
        by_kind.setdefault(entry.kind.offset, []).append(entry)
        by_next_kind.setdefault(_next_kind(entry.kind), []).append(entry)
    return by_kind, by_next_kind


def _next_kind(kind: Synset) -> str:
    return kind.hypernyms[0] if kind.hypernyms else kind.offset


def names_itself(definition: str, lemmas: Iterable[str]) -> bool:
    """Tell whether a definition has one of its words in it, also in the plural or as a part.

    >>> names_itself("a house for dogs", ["dog house", "kennel"])
    False
    >>> names_itself("any of several Kennels for dogs", ["dog house", "kennel"])
    True
    """
    text = definition.lower()
    return any(re.search(rf"\b{re.escape(lemma.lower())}", text) for lemma in lemmas)


def usable_entries(nouns: Nouns, settings: ReverseDictionarySettings) -> list[Entry]:
    """Return an entry for each word with a definition to ask for, in the order of the file.

    Left out: names (instances have no kind), meanings that are not the most frequent one of their
    first lemma, definitions that name the word, very long ones, and (by default) rare words.
    """
    entries: list[Entry] = []
    words: set[str] = set()
    for synset in nouns.synsets.values():
        word = synset.lemmas[0]
        is_usable = (
            synset.hypernyms
            and is_first_sense(synset, nouns, everyday_words_only=settings.everyday_words_only)
            and 0 < len(synset.definition.split()) <= settings.max_definition_words
            and not names_itself(synset.definition, synset.lemmas)
        )
        if is_usable and word.lower() not in words:
            words.add(word.lower())
            entries.append(Entry(word, synset, nouns.synsets[synset.hypernyms[0]]))
    return entries


def split_entries(
    entries: Sequence[Entry], settings: ReverseDictionarySettings
) -> dict[str, list[Entry]]:
    """Return split -> entries. No word, meaning or, for `ood`, kind is in two splits.

    Raises:
        ValueError: If there are fewer entries than asked for.
    """
    rng = random.Random(f"{settings.seed}/splits")
    families, _ = families_of(entries)
    # Families of one have no negatives, very large ones would make the split about one kind.
    order = [name for name, family in families.items() if 1 < len(family) <= 20]
    rng.shuffle(order)
    splits: dict[str, list[Entry]] = {split: [] for split in SPLITS}
    held_out: set[str] = set()
    for name in order:
        if len(splits["ood"]) >= settings.num_ood:
            break
        held_out.add(name)
        splits["ood"] += families[name]
    splits["ood"] = splits["ood"][: settings.num_ood]
    rest = [entry for entry in entries if entry.kind.offset not in held_out]
    rng.shuffle(rest)
    # The test split first: it stays the same when others change their size.
    for split in ("test", "validation", "rl", "train"):
        splits[split], rest = rest[: settings.size(split)], rest[settings.size(split) :]
    short = {s: len(splits[s]) for s in SPLITS if len(splits[s]) < settings.size(s)}
    if short:
        raise ValueError(
            f"splits {short} are smaller than asked for: {len(entries)} words can be used; "
            "expected at least the sum of all sizes; lower the num_* settings"
        )
    return splits


def feature_words(entry: Entry, counts: Counter[str], settings: ReverseDictionarySettings) -> str:
    """Return the definition's rarest words, in its order, and what the meaning is a part of."""
    kind_words = set(_words(" ".join(entry.kind.lemmas)))
    words = dict.fromkeys(_words(entry.synset.definition))
    candidates = [word for word in words if word not in kind_words and len(word) > 2]
    rarest = set(sorted(candidates, key=lambda word: counts[word])[: settings.num_features])
    return ", ".join(word for word in candidates if word in rarest)


def chain_of_thought(
    entry: Entry, nouns: Nouns, counts: Counter[str], settings: ReverseDictionarySettings
) -> str:
    """Return kind, features and word of an entry, such as "kind: bird, animal; ...; word: hen"."""
    kinds, synset = [entry.kind.lemmas[0]], entry.kind
    while len(kinds) < settings.num_kinds and synset.hypernyms:
        synset = nouns.synsets[synset.hypernyms[0]]
        kinds.append(synset.lemmas[0])
    features = [feature_words(entry, counts, settings)] if settings.num_features else []
    features += [f"of {nouns.synsets[offset].lemmas[0]}" for offset in entry.synset.holonyms[:1]]
    said = {"kind": kinds, "features": [part for part in features if part], "word": [entry.word]}
    return "; ".join(f"{name}: {', '.join(words)}" for name, words in said.items() if words)


def negatives(
    entry: Entry, families: Families, settings: ReverseDictionarySettings
) -> tuple[Item, ...]:
    """Return words of the same kind, then, if these are too few, of the next more general one.

    None shares a lemma with the entry, so that no synonym is taken for a wrong answer.
    """
    own = {lemma.lower() for lemma in entry.synset.lemmas}
    rng = random.Random(f"{settings.seed}/{entry.synset.offset}")
    chosen: list[Entry] = []
    by_kind, by_next_kind = families
    for family in (by_kind[entry.kind.offset], by_next_kind[_next_kind(entry.kind)]):
        others = [
            other
            for other in family
            if other not in chosen
            and own.isdisjoint(lemma.lower() for lemma in other.synset.lemmas)
        ]
        chosen += rng.sample(others, min(settings.num_negatives - len(chosen), len(others)))
    return tuple(other.target for other in chosen)


def build_records(nouns: Nouns, settings: ReverseDictionarySettings) -> dict[str, list[Record]]:
    """Return split -> records.

    Negatives of `train` and `rl` come from these two splits, so that no held-out word is trained on
    even as a negative; held-out records compete with all words.
    """
    entries = usable_entries(nouns, settings)
    splits = split_entries(entries, settings)
    counts = Counter(
        word for synset in nouns.synsets.values() for word in set(_words(synset.definition))
    )
    seen = families_of([*splits["train"], *splits["rl"]])
    everyone = families_of(entries)
    records: dict[str, list[Record]] = {}
    for split, members in splits.items():
        families = seen if split in ("train", "rl") else everyone
        records[split] = [
            Record(
                id=f"{split}-{entry.synset.offset}",
                source=SOURCE,
                query=Item(instruction=INSTRUCTION, text=entry.synset.definition),
                positive=entry.target,
                negatives=negatives(entry, families, settings),
                query_cot=chain_of_thought(entry, nouns, counts, settings),
                metadata={
                    "task": entry.synset.topic,
                    "word": entry.word,
                    "synset": entry.synset.offset,
                    "kind": entry.kind.offset,
                },
            )
            for entry in members
        ]
    return records


def write_reverse_dictionary(
    directory: str | Path, nouns: Nouns, settings: ReverseDictionarySettings
) -> dict[str, Path]:
    """Write every split as JSON lines below `directory` and return split -> file."""
    return write_splits(directory, build_records(nouns, settings), settings)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z][a-z'-]*[a-z]|[a-z]", text.lower())
