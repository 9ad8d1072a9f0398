"""Files that are whole or absent, and written by one run at a time.

They are written under another name first, and read as absent if damaged.
"""

import errno
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from tokenize import TokenError
from typing import Any, Literal

import numpy as np

from twn_rl.runtime.reading import regular_file

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
# Locks of this process. A fork, such as a loader's worker, would keep them when this one is killed.
_held: set[int] = set()
# What safetensors and torch say in place of such an error.
_SAID_FULL = re.compile(r"os error (27|28|122)\b|unexpected pos \d+ vs \d+|StreamWriter failed")


@contextmanager
def full_disk_told(path: Path, needed_bytes: int | None = None) -> Iterator[None]:
    """Say what the body could not write for want of room, and how much it needs.

    Raises:
        OSError: In place of what a full disk makes any library raise; everything else passes.
    """
    try:
        yield
    except Exception as error:
        is_full = isinstance(error, OSError) and error.errno in _FULL
        if not is_full and not _SAID_FULL.search(str(error)):
            raise
        there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
        free = shutil.disk_usage(there).free
        needed = "more" if needed_bytes is None else f"about {needed_bytes / 1e6:,.3f} MB"
        raise OSError(
            errno.ENOSPC,
            f"{path}: no room on the disk, or beyond its limits: {needed} needed, "
            f"{free / 1e6:,.3f} MB free; expected enough; free some or choose another output, then "
            "run again. What was there before stays",
        ) from error


@contextmanager
def written_aside(path: str | Path, needed_bytes: int | None = None) -> Iterator[Path]:
    """Give the body another name to write to, and put the result in the place of `path`.

    If the body raises or the process is killed, `path` is what it was. The folder around it is
    made; `path` may itself become a folder, if there is none yet. A full disk is told with
    `needed_bytes`, if they are known.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with full_disk_told(path, needed_bytes):
            yield aside
            aside.replace(path)
    finally:
        with suppress(OSError):  # on a read-only disk
            _remove(aside)


@contextmanager
def owned(path: Path, error: type[ValueError] = ValueError) -> Iterator[None]:
    """Let no other run write to `path`, a file or a folder, while the body runs.

    The lock is a file beside `path`, which goes with the body and says who has it. That of a killed
    run is free, and what it had only begun to write is removed.

    Raises:
        ValueError: As `error`, if another run has it: which, and since when.
        OSError: If nothing can be written there.
    """
    lock = path.with_name(f".{path.name}.lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(lock)
        if path.is_dir() and not os.access(path, os.W_OK):
            raise PermissionError(errno.EACCES, "no right to write", str(path))
    except OSError as problem:
        raise OSError(
            problem.errno,
            f"{path} cannot be written: {problem.strerror}; expected a folder that this user may "
            "write to; change its rights or choose another output. Nothing was changed",
        ) from problem
    if descriptor is None:
        raise error(
            f"{path} is being written by another run{_owner(lock)}; expected one at a time; wait "
            "for it or choose another output"
        )
    _held.add(descriptor)
    try:
        _sign(descriptor)
        begun = f".{glob.escape(path.name)}.*.tmp"
        for left in (*path.parent.glob(begun), *path.glob(".*.tmp")):
            _remove(left)
        yield
    finally:
        if descriptor in _held:  # and this is no fork
            lock.unlink(missing_ok=True)
            _held.discard(descriptor)
            os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing; it is on the disk when this returns."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        file.write(text)
        _sync(file)


def write_json(path: Path, content: Any, *, indent: int | None = None) -> None:
    """Write JSON, on one line without `indent`."""
    write_text(path, json.dumps(content, indent=indent))


def write_json_lines(path: Path, rows: Iterable[Any]) -> None:
    """Write one line of JSON a row, as the rows come."""
    with written_aside(path) as aside, aside.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_json(path: Path) -> Any:
    """Return the parsed file, or `None` if it is absent or cut short."""
    try:
        return json.loads(regular_file(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None


def write_array(path: Path, parts: np.ndarray | Iterable[np.ndarray], dtype: str = "<f4") -> None:
    """Write one (M, D) array of float32, or of another `dtype`, whole or in parts."""
    arrays = [parts] if isinstance(parts, np.ndarray) else list(parts)
    rows, width = sum(map(len, arrays)), arrays[0].shape[1]
    size = np.dtype(dtype).itemsize * rows * width
    with written_aside(path, size) as aside, aside.open("wb") as file:
        write_array_header(file, (rows, width), dtype)
        for part in arrays:
            file.write(np.ascontiguousarray(part, dtype=dtype).data)
        _sync(file)


def write_array_header(file: Any, shape: tuple[int, int], dtype: str = "<f4") -> None:
    """Begin a .npy file of (M, D) float32, or of another `dtype`."""
    header = {"descr": dtype, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def map_file(
    path: Path,
    shape: tuple[int | None, int | None],
    dtype: str = "<f4",
    *,
    mode: Literal["r", "c"] = "r",
) -> np.ndarray | None:
    """Return the memory-mapped array, or `None` if it is absent, truncated or of another kind.

    In mode "c" torch can share its memory; whatever is changed there does not reach the file.
    """
    try:
        vectors = np.load(regular_file(path), mmap_mode=mode)
    except (OSError, ValueError, EOFError, TokenError, SyntaxError, TypeError, OverflowError):
        return None  # a damaged header is parsed as Python literals
    fits = vectors.ndim == 2 and all(
        want in (None, size) for want, size in zip(shape, vectors.shape, strict=True)
    )
    return vectors if fits and vectors.dtype == np.dtype(dtype) else None


def digest(content: Any) -> str:
    """Return the sha256 of anything JSON can hold, in the order it is given."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """Return the sha256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_state(path: Path, known: Any = None) -> dict[str, Any]:
    """Return `bytes`, `mtime_ns` and `sha256` of a file.

    Args:
        path: The file.
        known: An earlier state, or what holds one; its sha256 is believed if size and time are the
            same, and the file is not read.
    """
    stat = path.stat()
    state = {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
    if isinstance(known, dict) and all(known.get(key) == value for key, value in state.items()):
        return {**state, "sha256": known["sha256"]}
    return {**state, "sha256": file_digest(path)}


def _remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path) -> int | None:
    """Return the lock file, opened and locked, or None if another run has it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                return descriptor
        except BlockingIOError:
            os.close(descriptor)
            return None
        except FileNotFoundError:
            pass
        os.close(descriptor)  # its last owner has just removed the file that was locked


def _leave_locks() -> None:
    """Close what a fork has of its parent's locks; they stay locked."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_leave_locks)


def _sign(descriptor: int) -> None:
    """Write into a lock who has it, for whom it keeps out."""
    now = datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    signed = {"pid": os.getpid(), "host": platform.node(), "since": now, "command": sys.argv[0]}
    with suppress(OSError):  # on a full disk the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(signed).encode(), 0)


def _owner(lock: Path) -> str:
    """Return who has a lock, and since when; nothing if it has just been taken."""
    signed = read_json(lock)
    if not isinstance(signed, dict) or not {"pid", "host", "since", "command"} <= set(signed):
        return ""
    name = ascii(Path(str(signed["command"])).name)[1:-1]
    return f" ({name}, process {signed['pid']} on {signed['host']}, since {signed['since']})"


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())
