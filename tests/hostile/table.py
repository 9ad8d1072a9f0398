"""What became of each hostile case, and the table of a campaign. Knows no case itself."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

import pytest

PROPERTY = "hostile"  # a test's user properties travel from xdist's workers to the one that prints


class Verdict(StrEnum):
    """What became of one case; everything but `HANDLED` is a fault of the project."""

    HANDLED = "handled"  # done right, or refused in words that say what is wrong and where
    SILENT = "silent"  # went on with something wrong, and nobody was told
    ESCAPED = "escaped"  # a traceback that names no place, a crash, a hang
    LOST = "lost"  # what was there before is gone, or can no longer be used
    MIXED = "mixed"  # parts of different runs or inputs came out as one


@dataclass
class Tally:
    """The verdicts of one test; `check` fails it if there is one besides `HANDLED`."""

    node: pytest.Item
    failed: list[str] = field(default_factory=list)

    def add(self, group: str, case: str, verdict: Verdict, why: str = "") -> None:
        """Count one case of a group; `case` must be enough to run it again."""
        self.node.user_properties.append((PROPERTY, [group, str(verdict)]))
        if verdict is not Verdict.HANDLED:
            self.failed.append(f"{group}: {case}: {verdict}: {why}")

    def check(self, *, at_least: int) -> None:
        """Fail unless so many cases were tried and all of them handled."""
        tried = sum(name == PROPERTY for name, _ in self.node.user_properties)
        assert tried >= at_least, f"{tried} cases were tried; expected at least {at_least}"
        assert not self.failed, "\n".join([f"{len(self.failed)} of {tried} cases", *self.failed])


def table_lines(verdicts: Iterable[tuple[str, str]]) -> list[str]:
    """Return the lines of a Markdown table from the (group, verdict) of every case."""
    counts = Counter(verdicts)
    groups = sorted({group for group, _ in counts})
    rows = [[group, *(counts[group, str(verdict)] for verdict in Verdict)] for group in groups]
    sums = [sum(row[i] for row in rows) for i in range(1, len(Verdict) + 1)]
    lines = [
        f"| {' | '.join(['group', 'tried', *Verdict])} |",
        f"| --- |{' ---: |' * (len(Verdict) + 1)}",
    ]
    for name, *numbers in [*rows, ["all", *sums]]:
        lines.append(f"| {' | '.join([name, str(sum(numbers)), *map(str, numbers)])} |")
    return lines
