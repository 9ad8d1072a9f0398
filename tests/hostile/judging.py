"""One hostile case tried: what came of it, within a time, and whether an error says where."""

import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any

from hostile.table import Verdict

# What may reach whoever runs a command: `twn-rl` shows these in a line, argparse exits with 2.
TOLD = (ValueError, OSError, TypeError, SystemExit)
SECONDS = 30  # far above what any case takes, also on a busy machine


class HangError(Exception):
    """A case that did not end in time."""


@dataclass(frozen=True)
class Outcome:
    """What a call gave: its result, or the error it raised."""

    result: Any = None
    error: BaseException | None = None

    def refused(
        self, names: Sequence[str], told: tuple[type[BaseException], ...] = TOLD
    ) -> tuple[Verdict, str]:
        """Return the verdict on an error: handled if it is one people are told, and says where.

        Args:
            names: The message must hold one of them, such as a file's name or a field.
            told: Kinds of errors that are told.
        """
        assert self.error is not None
        shown = f"{type(self.error).__name__}: {self.error}"
        if isinstance(self.error, HangError) or not isinstance(self.error, told):
            return Verdict.ESCAPED, shown[:500]
        if not any(name in shown for name in names):
            return Verdict.ESCAPED, f"none of {list(names)} in: {shown[:500]}"
        return Verdict.HANDLED, ""


def attempt(call: Callable[[], Any]) -> Outcome:
    """Return what a call came to; everything is caught but what ends the test run itself."""
    try:
        with _limited(SECONDS):
            return Outcome(result=call())
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Outcome(error=error)


@contextmanager
def _limited(seconds: int) -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise HangError(f"no end after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def judge(
    outcome: Outcome,
    names: Sequence[str],
    complaint: Callable[[Any], str],
    told: tuple[type[BaseException], ...] = TOLD,
) -> tuple[Verdict, str]:
    """Return the verdict: an error must say where, a result must have nothing wrong with it.

    Args:
        outcome: Of `attempt`.
        names: As of `Outcome.refused`.
        complaint: Result -> what is wrong with it, "" if nothing; "lost: ..." and "mixed: ..." are
            verdicts of their own.
        told: Kinds of errors that are told.
    """
    if outcome.error is not None:
        return outcome.refused(names, told)
    wrong = complaint(outcome.result)
    if not wrong:
        return Verdict.HANDLED, ""
    kind = wrong.partition(":")[0]
    return Verdict(kind) if kind in ("lost", "mixed") else Verdict.SILENT, wrong
