"""What somebody meant who misspelt a name: one hint for every message."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path


def nearest(name: str, names: Iterable[str], *, count: int = 1) -> list[str]:
    """Return the known names most like `name`, the likest first; none if nothing is near.

    A name that begins with it is like it, however long.

    >>> nearest("margn", ["format", "margin"])
    ['margin']
    >>> nearest("--per", ["--seed", "--per_device_train_batch_size"])
    ['--per_device_train_batch_size']
    """
    known = list(names)
    longer = [each for each in known if name and each.startswith(name)]
    close = difflib.get_close_matches(name, known, n=count, cutoff=0.5)
    return list(dict.fromkeys([*longer, *close]))[:count]


def hint(name: str, names: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for a message, or "." if no name is near.

    >>> hint("alwys", ["never", "always"])
    "; did you mean 'always'?"
    >>> hint("ice", ["never", "always"])
    '.'
    """
    return _question(nearest(name, names, count=2))


def path_hint(path: str | Path) -> str:
    """Return the same for a path that is not there, from the names beside its first absent part."""
    path = Path(path)
    for part in reversed([path, *path.parents]):
        if not part.exists():
            folder = part.parent
            siblings = [each.name for each in folder.iterdir()] if folder.is_dir() else []
            return _question(str(folder / name) for name in nearest(part.name, siblings, count=2))
    return "."


def _question(names: Iterable[str]) -> str:
    quoted = " or ".join(map(repr, names))
    return f"; did you mean {quoted}?" if quoted else "."
