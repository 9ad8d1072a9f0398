"""What embedding the inputs of a benchmark cost, kept on disk beside its scores.

Costs are booked by task, split, subset and side, so that a resumed run adds what it embeds itself
to what earlier runs embedded, and never counts an input twice.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from twn_rl.inference.details import EncodeDetails
from twn_rl.runtime.whole_files import write_text

# Of the signs of collapse the worse one counts.
_WORST = {"mean_pairwise_cosine": max, "effective_rank": min}


@dataclass
class Usage:
    """Sums over embedded inputs.

    Attributes:
        inputs: Inputs embedded, each time they were.
        thinking: Of these, how many were embedded with a thought.
        think_tokens: Tokens of all thoughts, also of those left out.
        fallbacks: Inputs that were to think but have their no-think vector.
        cut: Inputs whose text was cut to the backbone's context.
        blank: Inputs without any content, embedded as a full stop.
        characters_removed: Inputs whose text held NUL or half a surrogate pair, taken out.
        seconds: Time in `encode`, summed over processes.
        mean_pairwise_cosine: Largest of all calls; 1 when all vectors are one. None if unknown.
        effective_rank: Smallest of all calls; 1 when all vectors are one. None if unknown.
    """

    inputs: int = 0
    thinking: int = 0
    think_tokens: int = 0
    fallbacks: int = 0
    cut: int = 0
    blank: int = 0
    characters_removed: int = 0
    seconds: float = 0.0
    mean_pairwise_cosine: float | None = None
    effective_rank: float | None = None

    def count(self, details: EncodeDetails) -> None:
        """Add the inputs of one call of `encode`."""
        self.inputs += len(details.thoughts)
        self.thinking += sum(details.has_thought)
        self.think_tokens += sum(details.think_tokens)
        self.fallbacks += len(details.fallbacks)
        self.cut += len(details.truncated)
        self.seconds += details.timings["total"]

    def add(self, other: Usage) -> None:
        """Add what other calls cost; of the signs of collapse the worse ones stay."""
        for field in fields(self):
            both = (getattr(self, field.name), getattr(other, field.name))
            known = [value for value in both if value is not None]
            join = _WORST.get(field.name, sum)
            setattr(self, field.name, join(known) if known else None)

    def rates(self) -> dict[str, float | int | None]:
        """Return the sums as figures per input; {} if nothing was embedded.

        >>> Usage(inputs=4, thinking=1, think_tokens=20, seconds=2.0).rates()["think_rate"]
        0.25
        """
        if not self.inputs:
            return {}
        sums = asdict(self)
        means = {"think_rate": sums.pop("thinking")}
        means |= {name: sums.pop(name) for name in ("think_tokens", "seconds")}
        shares = {name: value / self.inputs for name, value in means.items()}
        return {"inputs": sums.pop("inputs"), **shares, **sums}


class Account(NamedTuple):
    """Where a cost belongs."""

    split: str
    subset: str
    side: str


class UsageBook:
    """Costs by task and account; one file a task."""

    def __init__(self, folder: Path | None) -> None:
        """Keep the books in `folder`; in memory only if None (processes that do not write)."""
        self.folder = folder
        self._tasks: dict[str, dict[Account, Usage]] = {}

    def resume(self, task: str, done: Collection[tuple[str, str]]) -> None:
        """Read what earlier runs booked for the splits and subsets that have scores; drop the rest.

        Vectors of an unfinished subset are lost and will be paid for again.
        """
        accounts: dict[Account, Usage] = {}
        path = self._path(task)
        if path is not None and path.is_file():
            for row in json.loads(path.read_text(encoding="utf-8")):
                account = Account(row.pop("split"), row.pop("subset"), row.pop("side"))
                if (account.split, account.subset) in done:
                    accounts[account] = Usage(**row)
        self._tasks[task] = accounts

    def note(self, task: str, account: Account, usage: Usage) -> None:
        """Book a cost and write the task's file."""
        accounts = self._tasks.setdefault(task, {})
        accounts.setdefault(account, Usage()).add(usage)
        path = self._path(task)
        if path is not None:
            rows: list[dict[str, Any]] = [
                {**account._asdict(), **asdict(usage)} for account, usage in accounts.items()
            ]
            write_text(path, json.dumps(rows, indent=1, allow_nan=False) + "\n")

    def total(self, tasks: Iterable[str], side: str) -> Usage:
        """Return the cost of one side of some tasks, over all splits and subsets."""
        total = Usage()
        for task in tasks:
            for account, usage in self._tasks.get(task, {}).items():
                if account.side == side:
                    total.add(usage)
        return total

    def _path(self, task: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{task}.json"
