"""Damages of files, disks that are full or read-only, and what a command's end amounts to.

Every fault is drawn from a seed, which its name holds. Knows no model and no run.
"""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from random import Random

from hostile.table import Verdict

Damage = Callable[[Path, Random], None]
# What a command may raise at people: told in one line, with the place.
TOLD = (ValueError, OSError, KeyError, FloatingPointError)


def delete(path: Path, rng: Random) -> None:
    """Remove the file."""
    path.unlink()


def cut(path: Path, rng: Random) -> None:
    """Lose the end of the file."""
    content = path.read_bytes()
    path.write_bytes(content[: rng.randrange(len(content))])


def flip(path: Path, rng: Random) -> None:
    """Turn over one bit."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def zero(path: Path, rng: Random) -> None:
    """Fill a stretch with zeros, as a lost block of a disk."""
    content = bytearray(path.read_bytes())
    start = rng.randrange(len(content))
    end = min(len(content), start + 512)
    content[start:end] = bytes(end - start)
    path.write_bytes(content)


def append(path: Path, rng: Random) -> None:
    """Let something follow the end."""
    path.write_bytes(path.read_bytes() + rng.randbytes(1 + rng.randrange(64)))


DAMAGES: dict[str, Damage] = {f.__name__: f for f in (delete, cut, flip, zero, append)}


def swapped_for(other: Path) -> Damage:
    """Return the damage of putting another file in the place of one."""

    def swap(path: Path, rng: Random) -> None:
        shutil.copyfile(other, path)

    return swap


def files_of(folder: Path) -> list[str]:
    """Return the files of a folder by their names in it, in order."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(folder)) for path in found)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder with their contents."""
    return {name: (folder / name).read_bytes() for name in files_of(folder)}


@contextmanager
def at_most(size: int) -> Iterator[None]:
    """Let no file become larger than `size` bytes, as on a disk that is full then.

    What is printed meanwhile is thrown away: pytest keeps it in a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def small_disk(folder: Path, size: int, *, read_only: bool = False) -> Iterator[bool]:
    """Make `folder` a disk of `size` bytes, if this user may mount one; tell whether it is one."""
    folder.mkdir(parents=True, exist_ok=True)
    options = f"size={size}{',ro' if read_only else ''}"
    mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
    is_mounted = os.geteuid() == 0 and not subprocess.run(mount, capture_output=True).returncode
    try:
        yield is_mounted
    finally:
        if is_mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)


@contextmanager
def read_only(folder: Path) -> Iterator[bool]:
    """Make `folder` one that nothing can be written to, if this user can be kept out of any."""
    if os.geteuid() == 0:
        with small_disk(folder, 1 << 20, read_only=True) as is_mounted:
            yield is_mounted
        return
    folder.mkdir(parents=True, exist_ok=True)
    folder.chmod(0o555)
    try:
        yield True
    finally:
        folder.chmod(0o755)


def told(error: BaseException, *places: object) -> tuple[Verdict, str]:
    """Judge an error: one that people can act on names one of the places, in one line."""
    said = str(error)
    if not isinstance(error, TOLD):
        return Verdict.ESCAPED, f"{type(error).__name__}: {said[:300]}"
    if not any(str(place) in said for place in places):
        return Verdict.ESCAPED, f"names no place: {said[:300]}"
    return Verdict.HANDLED, said
