"""What a missing package means: which optional part of the installation to add."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say that imports in this block need an extra of the package.

    Raises:
        ModuleNotFoundError: If one of them fails, with what to install.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"module {error.name} is missing; expected it to be installed; run: "
            f'pip install "twn-rl[{name}]"',
            name=error.name,
        ) from error
