"""A task's queries and targets from its files, and whether these are there before anything runs."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from twn_rl.data.record import Item, RecordError, bad_file
from twn_rl.evaluation.mmeb_v2 import image_rows, video_rows
from twn_rl.evaluation.mmeb_v2.documents import load_documents
from twn_rl.evaluation.mmeb_v2.task_data import ItemTargets, TaskData, TaskQuery, TaskRow
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder, located
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

# Task, folder of its pictures or frames, row -> what the row says.
RowReader = Callable[[MmebTask, Path, Mapping[str, Any]], TaskRow]

ROW_READERS: dict[str, RowReader] = {
    **dict.fromkeys(("image_cls", "image_qa", "image_i2t"), image_rows.read_text_candidates),
    "image_t2i": image_rows.read_image_candidates,
    "image_i2i_vg": image_rows.read_captioned_candidates,
    **dict.fromkeys(video_rows.QUESTIONS, video_rows.read_question),
    **dict.fromkeys(video_rows.CAPTION_FIELDS, video_rows.read_caption),
    "moment_retrieval": video_rows.read_moment,
    "momentseeker": video_rows.read_momentseeker,
}
DOCUMENT_PARSERS, DOCUMENT_CONFIGS = ("vidore", "visrag"), ("corpus", "queries", "qrels")


def load_task(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return the queries and targets of a task.

    Raises:
        RecordError: For a row that cannot be used, with its file and number: a score without it
            would be no MMEB-V2 score.
    """
    data = (load_documents if _is_documents(task) else _load_rows)(task, folder)
    if not data.queries or not data.targets.keys:
        raise RecordError(
            f"task {task.task} has {len(data.queries)} queries and {len(data.targets.keys)} "
            "targets; expected some of both; download it again",
            reason="no_records",
            file=folder.files(task, "queries" if _is_documents(task) else None)[0].path,
        )
    if len(data.queries) != task.num_queries:
        data.warnings.append(
            f"{len(data.queries)} queries, the official run has {task.num_queries}"
        )
    return data


def check_data(
    tasks: Sequence[MmebTask], folder: BenchmarkFolder, *, skip_missing: bool = False
) -> dict[str, str]:
    """Return why tasks cannot be measured, by task, before anything is loaded or embedded.

    Args:
        tasks: Those asked for.
        folder: Where the data is.
        skip_missing: Return what is missing; otherwise it is an error.

    Raises:
        FileNotFoundError: If the data root is no folder or is empty, or a folder of annotations,
            pictures or frames is missing.
    """
    if not folder.data_root.is_dir() or not any(folder.data_root.iterdir()):
        state = "empty" if folder.data_root.is_dir() else "no folder"
        raise FileNotFoundError(
            f"data_root = {str(folder.data_root)!r} is {state}; expected a download of "
            "TIGER-Lab/MMEB-V2 with image-tasks, video-tasks or visdoc-tasks; correct the path"
        )
    problems: dict[str, str] = {}
    for task in tasks:
        try:
            for config in DOCUMENT_CONFIGS if _is_documents(task) else _subsets(task):
                folder.files(task, config)
            folder.check_media(task)
        except (RecordError, OSError) as error:
            problems[task.task] = str(error)
    if problems and not skip_missing:
        listed = "\n".join(problems.values())
        raise FileNotFoundError(
            f"{len(problems)} of {len(tasks)} tasks have no data:\n{listed}\nexpected all of it; "
            "complete the download, choose --tasks, or pass --on_missing_data skip"
        )
    return problems


def _load_rows(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task whose rows stand alone, as those of all image and video tasks do."""
    targets, queries = ItemTargets(), list[TaskQuery]()
    for label in _read_labels(task, folder):
        targets.add(label, Item(text=label))
    for subset in _subsets(task):
        root = folder.media_root(task) / (subset or "")
        for row in folder.rows(task, subset):
            name = f"{subset}/{row.position}" if subset else str(row.position)
            with located(row) as data:
                read = ROW_READERS[task.parser](task, root, data)
                queries.append(targets.query(name, read, is_local=task.candidates == "local"))
    if task.num_candidates is not None and len(targets.keys) < task.num_candidates:
        raise RecordError(
            f"task {task.task}: {len(targets.keys)} labels found; expected {task.num_candidates}, "
            "as fewer make the task easier; write all labels, one a line, to "
            f"{_labels_path(task, folder)}",
            reason="missing_labels",
            file=folder.annotation_root,
        )
    return TaskData(queries, targets)


def _labels_path(task: MmebTask, folder: BenchmarkFolder) -> Path:
    return folder.annotation_root / "labels" / f"{task.task}.txt"


def _read_labels(task: MmebTask, folder: BenchmarkFolder) -> list[str]:
    """Return labels from beside the annotations, else from `labels/TASK.txt`; else none."""
    if task.num_candidates is None:
        return []
    names = ("labels.json", "labels.txt")
    places = [place / name for place in folder.places(task) for name in names]
    for path in (*places, _labels_path(task, folder)):
        if not path.is_file():
            continue
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".txt":
            return [line.strip() for line in text.splitlines() if line.strip()]
        try:
            labels = json.loads(text)
        except ValueError as error:
            labels = error
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            detail = f"labels = {labels!r:.80}; expected a JSON list of texts; correct the file"
            raise bad_file(path, detail)
        return labels
    return []


def _is_documents(task: MmebTask) -> bool:
    return task.parser in DOCUMENT_PARSERS


def _subsets(task: MmebTask) -> Sequence[str | None]:
    return video_rows.MVBENCH_SUBSETS if task.parser == "mvbench" else (None,)
