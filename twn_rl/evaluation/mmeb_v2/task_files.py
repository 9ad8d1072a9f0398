"""Where a task's annotations, pictures and frames lie on disk; their rows, without meaning.

Annotations are a clone of a hub repository (`ORG/NAME/CONFIG/SPLIT-*.parquet` and what else
`datasets` writes), or the same folder inside `image-tasks`, `video-tasks`, `visdoc-tasks`. A video
is a folder of numbered pictures.
"""

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from twn_rl.data.formats.input_files import DataFile, Row, find_files, read_rows
from twn_rl.data.images import ImageError, resolve_inside
from twn_rl.data.record import RecordError
from twn_rl.evaluation.mmeb_v2.tasks import FIXED_SUFFIX, LabelSet, MmebTask, annotation_names

NUM_FRAMES = 8
FRAME_SUFFIXES = (".jpg", ".jpeg", ".png")
_ARCHIVES = ("*.tar", "*.tar.gz", "*.tar.gz-*", "*.tgz", "*.zip")
_NO_SUBSETS = ("data", "default", "test", "train", "val")


@dataclass(frozen=True)
class BenchmarkFolder:
    """A download of MMEB-V2.

    Attributes:
        data_root: Folder with `image-tasks`, `video-tasks` and `visdoc-tasks`.
        annotation_root: Folder with the annotations; often the same.
        labels: Which labels the two tasks with repaired pages are read with.
    """

    data_root: Path
    annotation_root: Path
    labels: LabelSet = "page-fixed"

    def media_root(self, task: MmebTask) -> Path:
        """Return the folder of a task's pictures or frames, links resolved."""
        return (self.data_root / task.media_root).resolve()

    def places(self, task: MmebTask) -> list[Path]:
        """Return the folders that may hold a task's annotations, in order of preference."""
        inside = self.annotation_root / f"{task.group}-tasks"
        places = []
        for repository in annotation_names(task, self.labels):
            places += [self.annotation_root / repository, inside / repository.split("/")[-1]]
        if task.group == "image":
            places.append(inside)
        elif not task.has_page_labels:
            # Never for repaired pages: such a folder does not tell which labels it has.
            places.append(inside / task.task)
        return list(dict.fromkeys(places))

    def files(self, task: MmebTask, config: str | None = None) -> list[DataFile]:
        """Return the annotation files of a task.

        Args:
            task: The task.
            config: Subset; None is the task's own.

        Raises:
            RecordError: If there are none; the message names the folders looked at.
        """
        config = config or task.hf_config
        for place in self.places(task):
            if place.is_dir() and (files := _files(place, config, task.hf_split)):
                return files
        looked = ", ".join(map(str, self.places(task)))
        repaired = f" with {FIXED_SUFFIX} labels" if task.has_page_labels else ""
        raise RecordError(
            f"task {task.task}: no annotations ({config or 'no subset'}, split {task.hf_split}) "
            f"in any of {looked}; expected those of {annotation_names(task, self.labels)[0]}"
            f"{repaired if self.labels == 'page-fixed' else ''}; download them, leave the task out "
            "by --tasks, or pass --on_missing_data skip",
            reason="missing_data",
            file=self.annotation_root,
        )

    def rows(self, task: MmebTask, config: str | None = None) -> Iterator[Row]:
        """Yield the rows of a task's annotations in order, the first `max_queries` only."""
        for count, row in enumerate(read_rows(self.files(task, config))):
            if task.max_queries is not None and count >= task.max_queries:
                return
            yield row

    def check_media(self, task: MmebTask) -> None:
        """Refuse a task without pictures or frames; those of documents are in the corpus itself.

        Raises:
            FileNotFoundError: If their folder is missing or empty; names archives beside it.
        """
        above, media = self.data_root / task.media_root, self.media_root(task)
        if task.group == "visdoc" or (media.is_dir() and any(media.iterdir())):
            return
        places = [
            place for place in list(above.parents)[:3] if place.is_relative_to(self.data_root)
        ]
        archives = [p for place in places for kind in _ARCHIVES for p in sorted(place.glob(kind))]
        near = [str(path) for path in archives if path.parent == archives[0].parent][:3]
        raise FileNotFoundError(
            f"task {task.task}: {above} is missing or empty; expected its pictures or frames "
            f"there; {'unpack ' + ', '.join(near) if near else 'download them'}"
        )


def _files(place: Path, config: str | None, split: str) -> list[DataFile]:
    folder = place / config if config and (place / config).is_dir() else place
    try:
        files = find_files(folder, any_split=True)
    except RecordError:  # a folder without data files, such as one of pictures
        return []
    if config and folder == place:
        files = [file for file in files if file.subset.split("/")[-1] == config]
    elif folder == place:
        # Rows of a task without subsets lie at the top or in data, or in the one folder there is.
        parts = [file.path.relative_to(folder).parts[:-1] for file in files]
        top = [file for file, names in zip(files, parts, strict=True) if {*names} <= {*_NO_SUBSETS}]
        files = top or (files if len({file.subset for file in files}) == 1 else [])
    own = [file for file in files if file.split == split]
    return own or [file for file in files if file.split is None]


@contextmanager
def located(row: Row) -> Iterator[Mapping[str, Any]]:
    """Yield the data of a row, and name its file and number in whatever is wrong with it."""
    try:
        if isinstance(row.data, RecordError):
            raise row.data
        yield row.data
    except RecordError as error:
        raise error.at(file=row.file, row=row.number) from error
    except ImageError as error:
        problem = RecordError(str(error), reason=error.reason)
        raise problem.at(file=row.file, row=row.number) from error


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
    paths = folder.iterdir() if folder.is_dir() else ()
    names = sorted((p.name for p in paths if p.suffix.lower() in FRAME_SUFFIXES), key=_natural)
    if not names:
        raise RecordError(
            f"video = {name!r}: no frames in {folder}; expected {', '.join(FRAME_SUFFIXES)} files; "
            "unpack its archive again, it may have been cut short",
            reason="missing_frames",
        )
    return tuple(str(folder / names[index]) for index in sample_frames(len(names), num_frames))


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


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Return a key by which frame2 comes before frame10."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part)) if part.isdigit() else (1, part.lower()) for part in parts]
