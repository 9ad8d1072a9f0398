"""Scored drafts -> which one a record is taught, and why the others are not; knows no model.

MMEmb-R1 (2604.06156) keeps paths of positive marginal value; whether by arg-max or by sampling is
not known, so both are here, and so are the two baselines that ask no evaluator.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from twn_rl.data.record import Record, hop_of, task_of
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.text_tables import markdown_table

RULES = ("best", "sample", "random", "all")
JUDGED_RULES = ("best", "sample")

SELECTED, BEATEN, NOT_DRAWN, BELOW = "selected", "beaten", "not_drawn", "below_threshold"
TRUNCATED, MALFORMED, UNANSWERED = "truncated", "malformed", "unanswered"
UNJUDGED = "unjudged"
FATES = (SELECTED, BEATEN, NOT_DRAWN, BELOW, TRUNCATED, MALFORMED, UNANSWERED, UNJUDGED)
_FATE_OF_PROBLEM = {
    "truncated": TRUNCATED,
    "too_long": TRUNCATED,
    "timeout": UNANSWERED,
    "junk": UNANSWERED,
    "refused": UNANSWERED,
    "no_negatives": UNJUDGED,
}


@dataclass(frozen=True)
class SelectionRule:
    """How one of a record's drafts is chosen.

    Attributes:
        rule: "best" takes the highest worth, "sample" draws by softmax(worth / temperature), both
            among those above the threshold; "random" and "all" (copy c takes draft c) ask for
            no worth.
        threshold: Smallest worth, exclusive. A little below 0 keeps thoughts that change nothing.
        min_match: Smallest match with the thought, exclusive; None, as in the paper, is off. A hard
            query can match so badly without a thought that even a wrong one is worth something; at
            0, with the margin evaluator, a thought must bring its query nearer to the positive than
            to the negatives.
        temperature: Of "sample".
        copies: How often each record is written, each time with a choice of its own.
        seed: Of "sample" and "random"; a record's draw depends on its id, not on its neighbours.
    """

    rule: str = "best"
    threshold: float = 0.0
    min_match: float | None = None
    temperature: float = 0.05
    copies: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        problems.unless(self.rule in RULES, f"rule = {self.rule!r}, expected one of {RULES}")
        problems.unless(
            math.isfinite(self.threshold), f"threshold = {self.threshold}, expected a finite number"
        )
        problems.expect(self, "> 0", "temperature")
        problems.expect(self, ">= 1", "copies")
        problems.refuse("SelectionRule")

    @property
    def is_judged(self) -> bool:
        """Whether drafts need a worth."""
        return self.rule in JUDGED_RULES


@dataclass(frozen=True)
class Choice:
    """What became of one record's drafts.

    Attributes:
        chosen: For each copy the position of its draft, or None: the direct path only.
        fates: For each draft one of `FATES`.
        passes: For each draft whether the rule could have chosen it.
    """

    chosen: list[int | None]
    fates: list[str]
    passes: list[bool]


def choose(record_id: str, drafts: Sequence[Mapping[str, Any]], rule: SelectionRule) -> Choice:
    """Return the choice among one record's drafts (`cot`, `problem`, `worth`, `with_cot`).

    Drafts with the text of a chosen one share its fate. Of equal worths the first is best.

    >>> rows = [{"cot": c, "problem": None, "worth": w} for c, w in (("a", 0.1), ("b", 0.3))]
    >>> choose("r", rows, SelectionRule())
    Choice(chosen=[1], fates=['beaten', 'selected'], passes=[True, True])
    >>> choose("r", rows, SelectionRule(threshold=0.5)).chosen
    [None]
    """
    passes = [_passes(draft, rule) for draft in drafts]
    usable = [n for n, ok in enumerate(passes) if ok]
    chosen: list[int | None] = [None] * rule.copies
    if usable and rule.rule == "best":
        chosen = [max(usable, key=lambda n: drafts[n]["worth"])] * rule.copies
    elif usable:
        chosen = [_draw(record_id, copy, drafts, usable, rule) for copy in range(rule.copies)]
    texts = {drafts[n]["cot"] for n in chosen if n is not None}
    lost = NOT_DRAWN if rule.rule in ("random", "all") else BEATEN
    fates = []
    for draft, ok in zip(drafts, passes, strict=True):
        if draft["problem"] is not None:
            fates.append(_FATE_OF_PROBLEM.get(draft["problem"], MALFORMED))
        elif not ok:
            fates.append(BELOW)
        else:
            fates.append(SELECTED if draft["cot"] in texts else lost)
    return Choice(chosen, fates, passes)


def _passes(draft: Mapping[str, Any], rule: SelectionRule) -> bool:
    if draft["problem"] is not None or not rule.is_judged:
        return draft["problem"] is None
    is_worth_it = draft["worth"] > rule.threshold
    return is_worth_it and (rule.min_match is None or draft["with_cot"] > rule.min_match)


def _draw(
    record_id: str,
    copy: int,
    drafts: Sequence[Mapping[str, Any]],
    usable: list[int],
    rule: SelectionRule,
) -> int:
    if rule.rule == "all":
        return usable[copy % len(usable)]
    if rule.rule == "random":  # one draw a record, whatever the copies
        return random.Random(f"{rule.seed}/{record_id}").choice(usable)
    best = max(drafts[n]["worth"] for n in usable)
    weights = [math.exp((drafts[n]["worth"] - best) / rule.temperature) for n in usable]
    return random.Random(f"{rule.seed}/{record_id}/{copy}").choices(usable, weights)[0]


def taught_records(
    record: Record, drafts: Sequence[Mapping[str, Any]], choice: Choice
) -> Iterator[Record]:
    """Yield each copy of a record with its chosen CoT, or with none.

    `metadata["selection"]` says which: `is_direct_only`, and the `source` and `worth` of the CoT.
    Copies are told apart by "#" and their number.
    """
    for copy, number in enumerate(choice.chosen):
        taken = None if number is None else drafts[number]
        mark: dict[str, Any] = {"is_direct_only": taken is None}
        if taken is not None:
            mark |= {name: taken[name] for name in ("source", "worth") if name in taken}
        yield replace(
            record,
            id=record.id if len(choice.chosen) == 1 else f"{record.id}#{copy}",
            query_cot=None if taken is None else taken["cot"],
            metadata={**record.metadata, "selection": mark},
        )


def selection_report(
    records: Iterable[Record],
    rows: Iterable[Mapping[str, Any]],
    choices: Sequence[Choice],
) -> dict[str, Any]:
    """Return how many drafts met which fate and, where gold CoTs are known, were right.

    Args:
        records: The records; `metadata["gold_cot"]`, if there, is the right CoT.
        rows: One a record with its `drafts`.
        choices: One a record.

    Returns:
        `records`, `direct_only`, `drafts` (counts), `fates`, `problems`, `sources` (source ->
        fate -> count) and, with gold CoTs, `noise` (group -> see `_noise`).
    """
    fates: Counter[str] = Counter()
    problems: Counter[str] = Counter()
    sources: dict[str, Counter[str]] = {}
    noise: dict[str, list[tuple[bool, bool, bool]]] = {}
    for record, row, choice in zip(records, rows, choices, strict=True):
        gold = record.metadata.get("gold_cot")
        groups = ["all", task_of(record), *filter(None, [hop_of(record)])]
        for draft, fate, passes in zip(row["drafts"], choice.fates, choice.passes, strict=True):
            fates[fate] += 1
            sources.setdefault(draft["source"], Counter())[fate] += 1
            if draft["problem"] is not None:
                problems[draft["problem"]] += 1
            if isinstance(gold, str):
                is_right = draft["cot"].split() == gold.split()
                for group in groups:
                    noise.setdefault(group, []).append((is_right, fate == SELECTED, passes))
    report: dict[str, Any] = {
        "records": len(choices),
        "direct_only": sum(all(n is None for n in choice.chosen) for choice in choices),
        "drafts": sum(fates.values()),
        "fates": {fate: fates[fate] for fate in FATES if fates[fate]},
        "problems": dict(problems),
        "sources": {name: dict(found) for name, found in sorted(sources.items())},
    }
    if noise:
        report["noise"] = {name: _noise(found) for name, found in noise.items()}
    return report


def _noise(found: Sequence[tuple[bool, bool, bool]]) -> dict[str, float | int | None]:
    """Return how well wrong CoTs were told from right ones; None where there was nothing to tell.

    `recall` is the share of wrong CoTs that are not taught, `precision` the share of wrong ones
    among those not taught, `right_kept` the share of right ones that are. The same `_at_threshold`
    looks at threshold and match alone, before the best of the rest is taken.

    Args:
        found: Of each draft whether it is right, is taught, and passed threshold and match.
    """
    right = sum(is_right for is_right, _, _ in found)
    wrong = len(found) - right
    report: dict[str, float | int | None] = {"right": right, "wrong": wrong}
    for place, suffix in ((1, ""), (2, "_at_threshold")):
        rejected = [draft[0] for draft in found if not draft[place]]
        for name, part, whole in (
            ("recall", rejected.count(False), wrong),
            ("precision", rejected.count(False), len(rejected)),
            ("right_kept", right - rejected.count(True), right),
        ):
            report[name + suffix] = part / whole if whole else None
    return report


def report_text(report: Mapping[str, Any]) -> str:
    """Return a report as Markdown tables."""
    total = max(1, report["drafts"])
    fates, problems = report["fates"].items(), report["problems"].items()
    shares = [(name, f"{count}", f"{100 * count / total:.1f}") for name, count in fates]
    texts = [
        f"{report['records']} records, {report['direct_only']} of them without a CoT (direct path "
        f"only); {report['drafts']} drafts.\n",
        markdown_table(("fate", "drafts", "share in %"), shares),
    ]
    if problems:
        counts = [(name, f"{count}") for name, count in problems]
        texts.append(markdown_table(("problem", "drafts"), counts))
    if "noise" in report:
        names = ("right", "wrong", "recall", "precision", "right_kept")
        names += ("recall_at_threshold", "right_kept_at_threshold")
        rows = [
            (group, *(_cell(values[name]) for name in names))
            for group, values in report["noise"].items()
        ]
        texts.append(markdown_table(("wrong CoTs, in %", *names), rows))
    return "\n".join(texts)


def _cell(value: float | int | None) -> str:
    if value is None:
        return "-"
    return str(value) if isinstance(value, int) else f"{100 * value:.1f}"
