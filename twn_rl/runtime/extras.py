"""What a missing package means: which optional part of this one to install."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say that the imports in this block need an extra of the package.

    >>> with extra("eval"):
    ...     import absent
    Traceback (most recent call last):
    ModuleNotFoundError: module absent is missing; expected what twn-rl[eval] brings; install it:
    pip install "twn-rl[eval]"

    Raises:
        ModuleNotFoundError: If one of them fails.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if "twn-rl[" in str(error):  # said already, by what was imported
            raise
        raise ModuleNotFoundError(
            f"module {error.name} is missing; expected what twn-rl[{name}] brings; install it: "
            f'pip install "twn-rl[{name}]"',
            name=error.name,
        ) from error
