"""Domains of which only pairs of query and target exist: what the demo's training never asks.

Each has records to train on, to choose by and to report, without thoughts; the right ones are in
their metadata, for evaluation. Scenes are drawn anew, so none is one of the demo's.
"""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from twn_rl.data.record_files import load_records, write_records
from twn_rl.demo import questions
from twn_rl.demo.dataset import DOMAIN_PREFIX, DemoSettings, SplitPlan, make_records
from twn_rl.demo.scenes import GREY_STYLE
from twn_rl.runtime.whole_files import read_json, write_json

logger = logging.getLogger(__name__)

PARTS = ("train", "validation", "test")


def _one_and_two(kind: str) -> dict[str, float]:
    return {f"{kind}1": 0.45, f"{kind}2": 0.55}


DOMAINS = {
    # "which object is at the place above the place left of the camel"
    "reworded": SplitPlan(mix=_one_and_two(questions.REWORDED)),
    # "the camel is left of the one above which object": from the other end
    "inverse": SplitPlan(mix=_one_and_two(questions.INVERSE)),
    # "which object is northeast of the camel": a relation that nobody has asked
    "diagonal": SplitPlan(mix={questions.DIAGONAL: 1.0}),
    # one step more than the demo's training has
    "three_hops": SplitPlan(mix={"hop3": 1.0}),
    # pairs of relations that the demo's training leaves out
    "unseen_pairs": SplitPlan(mix={"hop2": 1.0}, held_out=True),
    # artwork without colour
    "grey": SplitPlan(mix=_one_and_two("hop"), style=GREY_STYLE),
}


@dataclass(frozen=True)
class DomainSizes:
    """Records of each part of a domain."""

    train: int = 1600
    validation: int = 200
    test: int = 600


def write_domain(
    directory: Path, domain: str, settings: DemoSettings, sizes: DomainSizes | None = None
) -> dict[str, Path]:
    """Write a domain into the demo's folder, or reuse an equal one; return part -> file.

    Args:
        directory: Folder that `dataset.write_demo` has written, which has the pictures.
        domain: One of `DOMAINS`.
        settings: Those of the demo; a teacher's mistakes do not matter, there is no teacher.
        sizes: Records of each part; defaults if None.

    Raises:
        ValueError: If there is no such domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain = {domain!r}; expected one of {list(DOMAINS)}; correct the name")
    sizes = sizes or DomainSizes()
    names = {part: f"{DOMAIN_PREFIX}{domain}_{part}" for part in PARTS}
    files = {part: directory / f"{name}.jsonl" for part, name in names.items()}
    stamp = directory / f"{DOMAIN_PREFIX}{domain}.json"
    wanted = {"seed": settings.seed, **asdict(sizes)}
    if read_json(stamp) == wanted and all(file.is_file() for file in files.values()):
        logger.info("Reusing the domain %s in %s", domain, directory)
        return files
    for part, name in names.items():
        size = int(getattr(sizes, part))
        records = make_records(directory, name, DOMAINS[domain], size, settings)
        write_records(files[part], (replace(record, query_cot=None) for record in records))
    write_json(stamp, wanted)
    return files


def add_old_pairs(new: Path, old: Path, share: float) -> Path:
    """Write a file that holds a domain's pairs and the old one's, without thoughts; return it.

    Args:
        new: Pairs of the new domain; the file is written beside it.
        old: Records of the old domain, taken from the first on.
        share: Old pairs among all, from 0 up to below 1.

    Raises:
        ValueError: If the old domain has fewer.
    """
    fresh, known = load_records(new), load_records(old)
    wanted = round(len(fresh) * share / (1 - share))
    if wanted > len(known):
        raise ValueError(
            f"a share of {share} needs {wanted} old pairs, and {old} has {len(known)}; expected a "
            "share that it can give; lower old_share"
        )
    kept = (replace(known[place], query_cot=None) for place in range(wanted))
    target = new.with_name(f"{new.stem}_{100 * share:g}_percent_old.jsonl")
    write_records(target, (*fresh, *kept))
    return target
