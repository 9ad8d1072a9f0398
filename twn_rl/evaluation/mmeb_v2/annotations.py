"""Where the annotations of a task lie under a data root, and their rows. Knows no meaning of rows.

Layouts: a clone of a hub repository (`ORG/NAME/CONFIG/SPLIT-*.parquet` and what else `datasets`
writes), or the same folder inside `image-tasks`, `video-tasks`, `visdoc-tasks`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from twn_rl.data.formats.layout import DataFile, find_files
from twn_rl.data.formats.rows import Row, read_rows
from twn_rl.data.images import ImageError
from twn_rl.data.record import RecordError
from twn_rl.evaluation.mmeb_v2.tasks import FIXED_SUFFIX, LabelSet, MmebTask, annotation_names


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
        places = []
        for repository in annotation_names(task, self.labels):
            name = repository.split("/")[-1]
            places += [
                self.annotation_root / repository,
                self.annotation_root / f"{task.group}-tasks" / name,
            ]
        if task.group == "image":
            places.append(self.annotation_root / "image-tasks")
        elif not task.has_page_labels:
            # Never for repaired pages: such a folder does not tell which labels it has.
            places.append(self.annotation_root / f"{task.group}-tasks" / task.task)
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
        top = [file for file in files if _depth(file.path, folder) == 0]
        files = top or (files if len({file.subset for file in files}) == 1 else [])
    return [file for file in files if file.split == split] or [
        file for file in files if file.split is None
    ]


def _depth(path: Path, folder: Path) -> int:
    parts = path.relative_to(folder).parts[:-1]
    return len([part for part in parts if part not in ("data", "default", "test", "train", "val")])


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
