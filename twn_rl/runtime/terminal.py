"""What is shown on a terminal: words that people wrote must not move its cursor or colour it.

Every line that may hold a user's text goes through `printable`: results by `say`, log lines and
errors by `launch.command_line`.
"""

import sys
import traceback
import unicodedata
from typing import Any

_KEPT = "\n\t"
# Cc: control characters; Cf: invisible ones, which turn the direction of text; Cs: half surrogates.
_SHOWN_AS_CODES = ("Cc", "Cf", "Cs")


def printable(text: str) -> str:
    r"""Return a text with codes in place of characters that a terminal would obey.

    >>> print(printable("red \x1b[31mcamel"))
    red \x1b[31mcamel
    """
    if text.isprintable():
        return text
    return "".join(
        ascii(letter)[1:-1]
        if letter not in _KEPT and unicodedata.category(letter) in _SHOWN_AS_CODES
        else letter
        for letter in text
    )


def say(line: str) -> None:
    """Write a line of a result to standard output."""
    sys.stdout.write(f"{printable(line)}\n")


def show_uncaught(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Write a traceback as Python does, but printable; for `sys.excepthook`."""
    sys.stderr.write(printable("".join(traceback.format_exception(kind, error, trace))))
