"""Synsets -> records: facts about kinds, a question over one or two of them, an entry to be found.

The query lists what is a kind of what ("lamb is a kind of sheep."), for one word and its kinds and
for another word as a distraction, in a drawn order, and asks for the entry of the word (no hop), of
its kind (one hop) or of its kind's kind (two). The target is a dictionary's entry, "sheep: woolly
horned ruminant mammal related to the goat", the negatives are the entries of the other words in the
facts, and the chain of thought walks from the word to the answer. All steps stand in the query; the
hops are what a vector without a thought must take in one reading. (The answer may be another sense
of its word than the first; the facts hint at which.)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from twn_rl.data.record import Item, Record
from twn_rl.demo.wordnet.database import Nouns, Synset, is_first_sense
from twn_rl.demo.wordnet.split_files import SPLITS, write_splits
from twn_rl.runtime.problems import Problems

INSTRUCTION = "Find the dictionary entry that is asked for."
SOURCE = "wordnet_kinds"
# Facts about the word that is asked about, and about the one that distracts.
CHAIN_FACTS = 3
OTHER_FACTS = 2
HOPS = (0, 1, 2)
OOD_HOPS = 3


@dataclass(frozen=True)
class KindsSettings:
    """What is written; equal settings and WordNet files give byte-identical records.

    Attributes:
        seed: Decides splits, hops, order of facts and distractions.
        num_train: Records of the warm start.
        num_rl: Records of RL.
        num_validation: Records to tune on.
        num_test: Records about words no other split asks about, hops as in training; as kinds of
            other words some are in training, and so are some of the right entries.
        num_ood: The same with three hops.
        max_definition_words: Words with longer definitions are left out.
        max_per_kind: Most words of one kind, so that no kind is the answer to everything.
    """

    seed: int = 0
    num_train: int = 1500
    num_rl: int = 400
    num_validation: int = 150
    num_test: int = 300
    num_ood: int = 100
    max_definition_words: int = 16
    max_per_kind: int = 12

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        sizes = (f"num_{split}" for split in SPLITS)
        problems.expect(self, ">= 1", *sizes, "max_definition_words", "max_per_kind")
        problems.expect(self, ">= 0", "seed")
        problems.refuse("KindsSettings")

    def size(self, split: str) -> int:
        """Return the number of records of a split."""
        return int(getattr(self, f"num_{split}"))


# A word, its kind, its kind's kind and so on.
Chain = tuple[Synset, ...]


def chains(nouns: Nouns, settings: KindsSettings) -> list[Chain]:
    """Return a chain of three kinds for each everyday word that has one, in the order of the file.

    A synset stands for its first lemma; no two of a chain share one. Left out: definitions that are
    too long, words whose most frequent meaning is another, and kinds that have their words already.
    """
    found: list[Chain] = []
    uses: Counter[str] = Counter()
    words: set[str] = set()
    for synset in nouns.synsets.values():
        chain = tuple(_upwards(synset, nouns))
        names = [part.lemmas[0].lower() for part in chain]
        is_usable = (
            len(chain) == CHAIN_FACTS + 1
            and is_first_sense(synset, nouns, everyday_words_only=True)
            and len(set(names)) == len(names)
            and all(
                0 < len(part.definition.split()) <= settings.max_definition_words for part in chain
            )
        )
        if is_usable and names[0] not in words and uses[chain[1].offset] < settings.max_per_kind:
            uses[chain[1].offset] += 1
            words.add(names[0])
            found.append(chain)
    return found


def _upwards(synset: Synset, nouns: Nouns) -> Iterator[Synset]:
    """Yield a synset and its kinds, at most as many as a chain has."""
    yield synset
    for _ in range(CHAIN_FACTS):
        if not synset.hypernyms:
            return
        synset = nouns.synsets[synset.hypernyms[0]]
        yield synset


def build_records(nouns: Nouns, settings: KindsSettings) -> dict[str, list[Record]]:
    """Return split -> records; no split asks about a word of another.

    Kinds are shared: there are few of them, and what a kind is called is no secret of the query.

    Raises:
        ValueError: If there are fewer chains than records asked for.
    """
    usable = chains(nouns, settings)
    wanted = sum(settings.size(split) for split in SPLITS)
    if len(usable) < wanted:
        raise ValueError(
            f"{wanted} records were asked for, but only {len(usable)} words have {CHAIN_FACTS} "
            "kinds with short definitions; lower the num_* settings"
        )
    random.Random(f"{settings.seed}/splits").shuffle(usable)
    records: dict[str, list[Record]] = {}
    # The test split first: it stays the same when others change their size.
    for split in ("test", "ood", "validation", "rl", "train"):
        members, usable = usable[: settings.size(split)], usable[settings.size(split) :]
        records[split] = [
            build_record(split, row, members, settings.seed) for row in range(len(members))
        ]
    return {split: records[split] for split in SPLITS}


def build_record(split: str, row: int, members: Sequence[Chain], seed: int) -> Record:
    """Return the record about one chain of a split; another one of the split distracts."""
    chain = members[row]
    rng = random.Random(f"{seed}/{split}/{chain[0].offset}")
    hops = OOD_HOPS if split == "ood" else HOPS[row % len(HOPS)]
    others = [other for other in members if not _share_a_word(chain, other)]
    other = rng.choice(others)[: OTHER_FACTS + 1] if others else ()
    facts = [fact(*pair) for part in (chain, other) for pair in pairwise(part)]
    rng.shuffle(facts)
    answer = chain[hops]
    return Record(
        id=f"{split}-{chain[0].offset}",
        source=SOURCE,
        query=Item(instruction=INSTRUCTION, text=f"{' '.join(facts)} {question(chain[0], hops)}"),
        positive=entry(answer),
        negatives=tuple(entry(part) for part in (*chain, *other) if part is not answer),
        query_cot=chain_of_thought(chain, hops),
        metadata={
            "task": chain[0].topic,
            "hops": hops,
            "word": chain[0].lemmas[0],
            "answer": answer.lemmas[0],
        },
    )


def fact(word: Synset, kind: Synset) -> str:
    """Return the sentence that a word is a kind of another."""
    return f"{word.lemmas[0]} is a kind of {kind.lemmas[0]}."


def question(word: Synset, hops: int) -> str:
    """Return the question for what is `hops` kinds above a word."""
    return f"Describe {'the kind of ' * hops}{word.lemmas[0]}."


def entry(synset: Synset) -> Item:
    """Return the item to be found for a synset."""
    return Item(text=f"{synset.lemmas[0]}: {synset.definition}")


def chain_of_thought(chain: Chain, hops: int) -> str:
    """Return the way from the word to the answer, such as "lamb, sheep, bovid"."""
    return ", ".join(part.lemmas[0] for part in chain[: hops + 1])


def _share_a_word(chain: Chain, other: Chain) -> bool:
    names = {lemma.lower() for part in chain for lemma in part.lemmas}
    return any(lemma.lower() in names for part in other for lemma in part.lemmas)


def write_kinds(directory: str | Path, nouns: Nouns, settings: KindsSettings) -> dict[str, Path]:
    """Write every split as JSON lines below `directory` and return split -> file."""
    return write_splits(directory, build_records(nouns, settings), settings)
