"""Files that are whole or absent: written under another name first, read as absent if damaged."""

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np


def write_text(path: Path, text: str) -> None:
    """Write a whole text file or nothing."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write one line of JSON."""
    write_text(path, json.dumps(content))


def read_json(path: Path) -> Any:
    """Return the parsed file, or `None` if it is absent or cut short."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_array(path: Path, parts: np.ndarray | Iterable[np.ndarray]) -> None:
    """Write one (M, D) float32 array, whole or in parts."""
    arrays = [parts] if isinstance(parts, np.ndarray) else list(parts)
    shape = (sum(len(part) for part in arrays), arrays[0].shape[1])
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for part in arrays:
            file.write(np.ascontiguousarray(part, dtype="<f4").data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def map_file(path: Path, shape: tuple[int | None, int | None]) -> np.ndarray | None:
    """Return the memory-mapped array, or `None` if it is absent, truncated or of another shape."""
    try:
        vectors = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError):
        return None
    fits = vectors.ndim == 2 and all(
        want in (None, size) for want, size in zip(shape, vectors.shape, strict=True)
    )
    return vectors if fits and vectors.dtype == np.float32 else None


def digest(content: Any) -> str:
    """Return the sha256 of anything JSON can hold, in the order it is given."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
