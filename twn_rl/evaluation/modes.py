"""Which thought a query is embedded with.

A mode gives each query a thought or leaves the query out. `never` and `always` are the two ways
of serving, `latent` a third for models with reason tokens; `oracle` takes the better of the first
two per query and is the ceiling of any gate; `auto` is what a gate chooses and `random` what chance
would at the same rate, `auto_better` what becomes of `auto` when its judge leaves implausible
thoughts out, `policy` what a policy that learned to decide chooses by its first token;
`sampled` averages over sampled thoughts, `averaged` embeds a query as the mean vector of its first
1, 2, ... sampled thoughts. Targets never think, but for `never_to_thinking` and
`always_to_thinking`, in which they always do.
The ablations swap the thought and keep everything else, which tells whether its content matters or
only its presence.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from twn_rl.data.record import Record, hop_of, task_of
from twn_rl.inference.details import EncodeDetails
from twn_rl.inference.options import GivenThought

THINKING_TARGETS = {"never_to_thinking": "never", "always_to_thinking": "always"}
MODES = (
    "never",
    "latent",
    "always",
    "oracle",
    "auto",
    "auto_better",
    "random",
    "policy",
    "sampled",
    "averaged",
    *THINKING_TARGETS,
)
# Modes in which nothing is written: no thoughts, no think tokens.
WORDLESS_MODES = ("never", "latent")
# Modes that choose between the two ways of serving, query by query.
CHOOSING_MODES = ("oracle", "auto", "auto_better", "random", "policy")
ABLATIONS = ("gold", "shuffled", "foreign", "empty", "truncated")
# Ablations made of the model's own thoughts.
BORROWING_MODES = ("shuffled", "foreign", "truncated")
# Mode -> how a reader would call it.
MODE_NAMES = {
    "never": "no thinking",
    "latent": "latent thoughts",
    "always": "own thoughts",
    "auto": "gate decides",
    "auto_better": "gate decides, judge checks",
    "random": "chance decides",
    "policy": "policy decides",
    "oracle": "oracle",
    "sampled": "sampled thoughts",
    "never_to_thinking": "no thinking, but targets think",
    "always_to_thinking": "own thoughts, targets think too",
    "gold": "gold thoughts",
    "shuffled": "another query's",
    "foreign": "another task's",
    "empty": "empty thought",
    "truncated": "first half of the own thought",
}


def mode_name(mode: str) -> str:
    """Return what a reader would call a mode of a result row.

    >>> mode_name("averaged3")
    'mean vector of 3 sampled thoughts'
    """
    count = mode.removeprefix("averaged")
    return f"mean vector of {count} sampled thoughts" if count != mode else MODE_NAMES[mode]


@dataclass(frozen=True)
class Thought:
    """What one query is embedded with.

    Attributes:
        content: What `ThinkingEmbedder` is given to embed with; None embeds without thinking.
        text: The chain of thought to show.
        think_tokens: Tokens the model wrote for it, end of turn not counted.
        problem: Why the thought was not used ("truncated", "no_open", ...); None if it was.
        plausibility: What the judge says of it; None without one, or if it was not used.
    """

    content: GivenThought | None = None
    text: str = ""
    think_tokens: int = 0
    problem: str | None = None
    plausibility: float | None = None


NO_THOUGHT = Thought()


def written_thoughts(details: EncodeDetails) -> list[list[Thought]]:
    """Return the thoughts a model wrote about each query; those left out have no content."""
    columns = details.thought_ids, details.thoughts, details.problems, details.plausibilities
    rows = zip(*columns, strict=True)
    return [
        [
            Thought(tuple(ids) if problem is None else None, text, len(ids), problem, plausibility)
            for ids, text, problem, plausibility in zip(*row, strict=True)
        ]
        for row in rows
    ]


def gold_thoughts(records: Sequence[Record]) -> list[Thought | None]:
    """Return the right thought of each record, `metadata["gold_cot"]` or else `query_cot`."""
    cots = [record.metadata.get("gold_cot") or record.query_cot for record in records]
    return [Thought(cot, cot) if cot else None for cot in cots]


def choose(
    mode: str,
    never: Mapping[str, Any],
    always: Mapping[str, Any],
    think: bool | float,
    *,
    probability: float | None = None,
    gate_seconds: float = 0.0,
    policy_seconds: float = 0.0,
) -> dict[str, Any]:
    """Return the result row of a query that thinks, does not, or thinks with a chance.

    A chance gives a row of both outcomes, weighted: its metrics are exact expectations.

    Args:
        mode: Mode of the new row.
        never: Row without thinking.
        always: Row with thinking.
        think: Whether to think, or the chance of it.
        probability: What the gate or the policy said, kept in the row.
        gate_seconds: What the gate adds to a query that thinks.
        policy_seconds: What it adds to one that does not: the prompt as the policy reads it.
    """
    chance = float(think)
    row = {**(always if chance >= 0.5 else never), "mode": mode, "think_rate": chance}
    thinking_seconds = always["seconds"] + gate_seconds
    direct_seconds = never["seconds"] + policy_seconds
    row["seconds"] = (1.0 - chance) * direct_seconds + chance * thinking_seconds
    if probability is not None:
        row["policy_probability" if mode == "policy" else "gate_probability"] = probability
    if 0.0 < chance < 1.0:
        for key in ("ranks", "think_tokens", "problems"):
            row[key] = [never[key][0], always[key][0]]
        row["weights"] = [1.0 - chance, chance]
    return row


def judge(auto: Mapping[str, Any], never: Mapping[str, Any], *, is_refused: bool) -> dict[str, Any]:
    """Return the row of a query whose thought, if it has one, was judged.

    A thought that is refused has been paid for all the same.

    Args:
        auto: Row with the gate's decision.
        never: Row without thinking.
        is_refused: Whether the thought is left out.
    """
    row = {**auto, "mode": "auto_better", "refused_rate": 0.0}
    if is_refused and auto["think_rate"]:
        row |= {"ranks": never["ranks"], "nearest": never["nearest"], "refused_rate": 1.0}
    return row


def truncated_thoughts(own: Sequence[Thought]) -> list[Thought | None]:
    """Return the first half of the words of each usable own thought, properly closed.

    A thought of one word has no first half and is left out.
    """
    halves: list[Thought | None] = []
    for thought in own:
        words = thought.text.split()
        half = " ".join(words[: len(words) // 2])
        halves.append(Thought(half, half) if thought.content is not None and half else None)
    return halves


def borrowed_thoughts(
    records: Sequence[Record], own: Sequence[Thought], *, is_same_group: bool, seed: int = 0
) -> list[Thought | None]:
    """Return for each record another record's own thought, of the same task and hop or of others.

    Only usable thoughts are handed on, and none to the record it came from. A record for which
    there is none is left out.
    """
    rng = random.Random(seed)
    groups = [(task_of(record), hop_of(record)) for record in records]
    usable = [index for index, thought in enumerate(own) if thought.content is not None]
    lenders = {
        group: [index for index in usable if (groups[index] == group) == is_same_group]
        for group in dict.fromkeys(groups)
    }
    borrowed: list[Thought | None] = []
    for index, group in enumerate(groups):
        others = [lender for lender in lenders[group] if lender != index]
        borrowed.append(own[rng.choice(others)] if others else None)
    return borrowed
