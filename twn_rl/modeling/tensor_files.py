"""Safetensors on disk: read whole, and named when they are damaged. Knows no model."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return all tensors of a file, on the CPU, and its metadata.

    Raises:
        ValueError: If the file is damaged.
    """
    with damage_named(path), safe_open(path, framework="pt") as stored:
        tensors = {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
        return tensors, stored.metadata() or {}


@contextmanager
def damage_named(path: str | Path) -> Iterator[None]:
    """Name the damaged file of safetensors that the body reads, one or one of a folder.

    Raises:
        ValueError: With file and damage, in place of what safetensors raises.
    """
    try:
        yield
    except SafetensorError as error:
        path = Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        damaged = [f"{file} ({problem})" for file in files if (problem := _damage(file))]
        raise ValueError(
            f"{', '.join(damaged) or path} cannot be read as safetensors: {error}; expected whole "
            "files; copy or download them again, or make them anew"
        ) from error


def _damage(file: Path) -> str | None:
    try:
        with safe_open(file, framework="pt"):
            return None
    except (SafetensorError, OSError) as error:
        return f"{file.stat().st_size} bytes, {error}" if file.exists() else "missing"
