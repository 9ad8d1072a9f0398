"""From a picture in a foreign row to a path inside the data root. Never fetches anything.

A cell is a path, a `{"bytes", "path"}` pair as `datasets` writes it, bare bytes, or a data URI.
"""

import base64
import binascii
import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from twn_rl.data.images import image_of_bytes, resolve_inside
from twn_rl.data.record import RecordError, bad_type, named_in_errors
from twn_rl.runtime.whole_files import written_aside

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mkv", ".mov", ".webm", ".m4v", ".mpg", ".mpeg")
_DATA_URI = re.compile(r"^data:image/[\w.+-]+;base64,", re.IGNORECASE)


@dataclass(frozen=True)
class Pictures:
    """Finds and saves pictures.

    Attributes:
        data_root: Folder that no path may leave.
        image_dir: Folder in the data root where embedded pictures are saved.
        saved: Where saved pictures are counted, as "saved".
        folder: Folder in the data root that relative paths start from.
    """

    data_root: Path
    image_dir: str
    saved: Counter[str]
    folder: str = ""

    def path(self, cell: Any, *, field: str) -> str | None:
        """Return the path of one picture relative to the data root; None for an empty cell.

        Raises:
            RecordError: For URLs, missing files, paths outside the data root, bytes that are no
                picture, and cells of another type.
        """
        if isinstance(cell, Mapping) and set(cell) <= {"bytes", "path"}:
            cell = cell.get("path") if cell.get("bytes") is None else cell["bytes"]
        if cell is None or cell in ("", b""):
            return None
        if isinstance(cell, str) and _DATA_URI.match(cell):
            cell = _decode(cell, field)
        if isinstance(cell, bytes):
            return self._save(cell, field)
        if not isinstance(cell, str):
            raise bad_type(cell, "the path of a picture, embedded bytes or null", field)
        return self._inside(cell, field)

    def paths(self, cells: Any, *, field: str) -> tuple[str, ...]:
        """Return the paths of a list of pictures, or of a single one; empty cells are left out."""
        listed = cells if isinstance(cells, list | tuple) else [cells]
        found = (self.path(cell, field=field) for cell in listed)
        return tuple(path for path in found if path is not None)

    def frames(self, cell: Any, *, field: str, num_frames: int | None = None) -> tuple[str, ...]:
        """Return the frames of a video: a list of pictures, or a folder of them sorted by name.

        Args:
            cell: List of pictures, or the path of a folder.
            field: Dotted field name for errors.
            num_frames: Keep so many, evenly spread over the video; None keeps all.

        Raises:
            RecordError: For a video file, as frames are never extracted here; for an empty folder.
        """
        if isinstance(cell, str) and cell.lower().endswith(VIDEO_SUFFIXES):
            raise RecordError(
                f"video = {cell!r} is a video file; expected its frames as pictures, or a folder "
                "of them; extract the frames first",
                reason="video_file",
                field=field,
            )
        # os.path.isdir answers False where Path.is_dir raises: names too long, null bytes.
        if isinstance(cell, str) and cell and os.path.isdir(self._root / self.folder / cell):
            cell = self._listed(cell, field)
        frames = self.paths(cell, field=field)
        if num_frames is None or len(frames) <= num_frames:
            return frames
        # The middle of each of num_frames equal parts, so that no end of the video is preferred.
        return tuple(
            frames[(2 * i + 1) * len(frames) // (2 * num_frames)] for i in range(num_frames)
        )

    @cached_property
    def _root(self) -> Path:
        return self.data_root.resolve()

    def _listed(self, folder: str, field: str) -> list[str]:
        names = sorted(
            path.name
            for path in (self._root / self.folder / folder).iterdir()
            if path.suffix.lower() in IMAGE_SUFFIXES
        )
        if not names:
            raise RecordError(
                f"video = {folder!r} is a folder without pictures; expected frames; extract them",
                reason="missing_image",
                field=field,
            )
        return [f"{folder}/{name}" for name in names]

    def _inside(self, name: str, field: str) -> str:
        root = self._root
        if self.folder and "://" not in name and not Path(name).is_absolute():
            name = f"{self.folder}/{name}"
        if Path(name).is_absolute():
            real = os.path.realpath(name.replace("\0", "?"))
            if Path(real).is_relative_to(root):
                name = Path(real).relative_to(root).as_posix()
        with named_in_errors(field):
            resolve_inside(name, root)
        return name

    def _save(self, content: bytes, field: str) -> str:
        """Write an embedded picture under the name of its content, once."""
        with named_in_errors(field), image_of_bytes(content) as image:
            suffix = "jpg" if image.format == "JPEG" else str(image.format).lower()
        digest = hashlib.sha256(content).hexdigest()
        # Two levels, because file systems and people suffer from a million files in one folder.
        name = f"{self.image_dir}/{digest[:2]}/{digest}.{suffix}"
        path = self.data_root / name
        if not path.is_file():
            with written_aside(path) as aside:
                aside.write_bytes(content)
            self.saved["saved"] += 1
        return name


def _decode(uri: str, field: str) -> bytes:
    try:
        return base64.b64decode(uri.partition(",")[2], validate=True)
    except binascii.Error as error:
        raise RecordError(
            f"data URI = {uri[:40]!r} is no valid base64 ({error}); expected a whole picture; "
            "correct it or leave the row out",
            reason="unreadable_image",
            field=field,
        ) from error
