"""Command lines and their errors: switches of every program, and one line for people.

An error that this package raised about its input is told in one line and ends with status 2;
anything else keeps its traceback, because it is a fault to be found. Imports nothing heavy.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile, zip_longest
from pathlib import Path
from typing import Any, NoReturn

from twn_rl.launch.source_settings import PACKAGE
from twn_rl.runtime.nearest import hint, path_hint
from twn_rl.runtime.terminal import printable, show_uncaught

USAGE_STATUS = 2
INPUT_ERRORS = (ValueError, OSError, ModuleNotFoundError)
# Switches of every program -> the variable by which the processes it starts know of them.
SWITCHES = {"--verbose": "TWN_RL_VERBOSE", "--debug": "TWN_RL_DEBUG"}
_ROOTS = [PACKAGE.resolve(), *(path.resolve() for path in PACKAGE.iterdir() if path.is_symlink())]


def is_on(switch: str) -> bool:
    """Tell whether "--verbose" or "--debug" was given, here or to the program that started this."""
    return os.environ.get(SWITCHES[switch], "") not in ("", "0")


def take_switches(words: Sequence[str]) -> list[str]:
    """Return words of a command line without the switches, which are turned on.

    `--debug WORD` is a setting of the trainer's and stays.
    """
    rest = []
    for word, after in zip_longest(words, words[1:]):
        has_value = after is not None and not after.startswith("-")
        if word in SWITCHES and not (word == "--debug" and has_value):
            os.environ[SWITCHES[word]] = "1"
        else:
            rest.append(word)
    return rest


_typed: dict[str, str] = {}


def program_name(name: str | None = None) -> str:
    """Return what the user typed to start this program; `name` sets it for this process."""
    if name is not None:
        _typed["name"] = name
    return _typed.get("name", Path(sys.argv[0]).name)


@contextmanager
def errors_in_a_line(*, is_same_everywhere: bool = False) -> Iterator[None]:
    """Tell an error of people's input in one line and end with status 2; leave others alone.

    Args:
        is_same_everywhere: All processes of a launch meet the same errors: the first one tells.
    """
    try:
        yield
    except INPUT_ERRORS as error:
        if not is_for_people(error):
            raise
        rank = os.environ.get("RANK", "0")
        if rank == "0" or not is_same_everywhere:
            where = program_name() if rank == "0" else f"{program_name()}, process {rank}"
            sys.stderr.write(printable(f"{where}: error: {message_of(error)}\n"))
        raise SystemExit(USAGE_STATUS) from None


def is_for_people(error: BaseException) -> bool:
    """Tell whether this package raised an error, or it is about a file that has a name.

    With `--debug` nothing is: every error keeps its traceback.
    """
    if is_on("--debug"):
        return False
    if isinstance(error, OSError) and error.filename is not None:
        return True
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return False
    raised_in = Path(trace.tb_frame.f_code.co_filename).resolve()
    return any(raised_in.is_relative_to(root) for root in _ROOTS)


def message_of(error: BaseException) -> str:
    """Return what to tell people of an error; of an absent file the nearest names, too."""
    if isinstance(error, OSError) and error.filename is not None:
        told = f"{error.filename}: {error.strerror}"
        return told + (path_hint(error.filename) if isinstance(error, FileNotFoundError) else "")
    return str(error)


class LineFormatter(logging.Formatter):
    """Messages as they are; warnings and errors say so, and which program they are from."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        text = printable(super().format(record))
        if record.levelno < logging.WARNING:
            return text
        return f"{program_name()}: {record.levelname.lower()}: {text}"


class LineHandler(logging.StreamHandler):
    """Writes lines to what is standard error when they come."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self.setLevel(level)
        self.setFormatter(LineFormatter())

    @property
    def stream(self) -> Any:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Standard error; a test or a notebook may have replaced it since the start."""
        return sys.stderr

    @stream.setter
    def stream(self, value: Any) -> None:
        """Take nothing else."""


def show_logs(level: int) -> None:
    """Show log messages from a level on, once, as lines; handlers of others stay."""
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in [each for each in root.handlers if isinstance(each, LineHandler)]:
        root.removeHandler(handler)
    root.addHandler(LineHandler(level))
    sys.excepthook = show_uncaught


class LineParser(argparse.ArgumentParser):
    """A parser of whole names, whose errors are one line with the nearest names, and status 2."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **settings})

    def parse_known_args(  # pyright: ignore[reportIncompatibleMethodOverride]  (it is overloaded)
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> Any:
        """Refuse an unknown flag before a required one that is missing, which it may stand for."""
        words = sys.argv[1:] if args is None else list(args)
        flags = [word.split("=")[0] for word in takewhile("--".__ne__, words)]
        for flag in flags if self._subparsers is None else ():
            if flag.startswith("--") and flag not in self._option_string_actions:
                self.error(f"unrecognized arguments: {flag}")
        return super().parse_known_args(words, namespace)

    def error(self, message: str) -> NoReturn:
        """Write the line and end."""
        if found := re.match(r"unrecognized arguments: (--?[\w-]+)", message):
            message += hint(found[1], self._option_string_actions)
        elif found := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            message += hint(found[1], re.findall(r"'([^']+)'", found[2]))
        self.exit(USAGE_STATUS, printable(f"{self.prog}: error: {message} (see --help)\n"))
