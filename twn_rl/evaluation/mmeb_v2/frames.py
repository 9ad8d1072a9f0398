"""The frames of a video as MMEB-V2 stores and samples them: a folder of numbered pictures."""

import re
from pathlib import Path

import numpy as np

from twn_rl.data.images import resolve_inside
from twn_rl.data.record import RecordError
from twn_rl.evaluation.mmeb_v2.tasks import NUM_FRAMES

FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")


def sample_frames(count: int, num_frames: int = NUM_FRAMES) -> list[int]:
    """Return which of `count` frames stand for a video, first and last included; few: all.

    >>> sample_frames(64)
    [0, 9, 18, 27, 36, 45, 54, 63]
    >>> sample_frames(3)
    [0, 1, 2]
    """
    if count <= num_frames:
        return list(range(count))
    return np.linspace(0, count - 1, num_frames, dtype=int).tolist()


def read_frames(root: Path, name: str, *, num_frames: int = NUM_FRAMES) -> tuple[str, ...]:
    """Return the absolute paths of the sampled frames of a video.

    Args:
        root: Folder of the videos of a task, resolved.
        name: Folder of the video in it.
        num_frames: How many; a video with fewer has all of its own.

    Raises:
        RecordError: If the folder is missing or has no frames.
        ImageError: If it leaves the root.
    """
    folder = resolve_inside(name, root, must_exist=False)
    names = sorted(list_frames(folder), key=_natural)
    if not names:
        raise RecordError(
            f"video = {name!r}: no frames in {folder}; expected {', '.join(FRAME_SUFFIXES)} files; "
            "unpack its archive again, it may have been cut short",
            reason="missing_frames",
        )
    return tuple(str(folder / names[index]) for index in sample_frames(len(names), num_frames))


def list_frames(folder: Path) -> list[str]:
    """Return the names of the pictures of a folder, none if there is no such folder."""
    if not folder.is_dir():
        return []
    return [path.name for path in folder.iterdir() if path.suffix.lower() in FRAME_SUFFIXES]


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part.lower()) for part in parts]
