"""Which loader reads which task, and whether its data is there before anything is embedded."""

from collections.abc import Callable, Iterable

from twn_rl.data.record import RecordError
from twn_rl.evaluation.mmeb_v2 import video_questions as questions
from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.document_tasks import load_documents
from twn_rl.evaluation.mmeb_v2.image_tasks import (
    load_captioned_candidates,
    load_image_candidates,
    load_text_candidates,
)
from twn_rl.evaluation.mmeb_v2.task_data import TaskData
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask
from twn_rl.evaluation.mmeb_v2.video_retrieval import (
    load_moment_retrieval,
    load_momentseeker,
    load_video_retrieval,
)

Loader = Callable[[MmebTask, BenchmarkFolder], TaskData]

LOADERS: dict[str, Loader] = {
    "image_cls": load_text_candidates,
    "image_qa": load_text_candidates,
    "image_i2t": load_text_candidates,
    "image_t2i": load_image_candidates,
    "image_i2i_vg": load_captioned_candidates,
    "video_classification": questions.load_video_classes,
    "ssv2": questions.load_video_choices,
    "mvbench": questions.load_mvbench,
    "nextqa": questions.load_nextqa,
    "videomme": questions.load_videomme,
    "egoschema": questions.load_egoschema,
    "activitynetqa": questions.load_activitynetqa,
    "didemo": load_video_retrieval,
    "msrvtt": load_video_retrieval,
    "msvd": load_video_retrieval,
    "vatex": load_video_retrieval,
    "youcook2": load_video_retrieval,
    "moment_retrieval": load_moment_retrieval,
    "momentseeker": load_momentseeker,
    "vidore": load_documents,
    "visrag": load_documents,
}
_ARCHIVES = ("*.tar", "*.tar.gz", "*.tar.gz-*", "*.tgz", "*.zip")


def load_task(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return the queries and targets of a task.

    Raises:
        RecordError: For a row that cannot be used, with its file and number: a score without it
            would be no MMEB-V2 score.
    """
    data = LOADERS[task.parser](task, folder)
    if not data.queries or not data.targets.keys:
        raise RecordError(
            f"task {task.task} has {len(data.queries)} queries and {len(data.targets.keys)} "
            "targets; expected some of both; download it again",
            reason="no_records",
            file=folder.files(task, "queries" if task.group == "visdoc" else None)[0].path,
        )
    if len(data.queries) != task.num_queries:
        data.warnings.append(
            f"{len(data.queries)} queries, the official run has {task.num_queries}"
        )
    return data


def missing_data(tasks: Iterable[MmebTask], folder: BenchmarkFolder) -> dict[str, str]:
    """Return why a task cannot be measured, for those whose files are not there.

    Raises:
        FileNotFoundError: If the data root is no folder or is empty.
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
            for config in _configs(task):
                folder.files(task, config)
        except (RecordError, OSError) as error:
            problems[task.task] = str(error)
            continue
        media = folder.media_root(task)
        # Pages of documents are in the corpus itself.
        if task.group != "visdoc" and not (media.is_dir() and any(media.iterdir())):
            problems[task.task] = (
                f"task {task.task}: {folder.data_root / task.media_root} is missing or empty; "
                f"expected its pictures or frames there; {_archive_hint(folder, task)}"
            )
    return problems


def _configs(task: MmebTask) -> tuple[str | None, ...]:
    if task.group == "visdoc":
        return ("corpus", "queries", "qrels")
    return questions.MVBENCH_SUBSETS if task.parser == "mvbench" else (None,)


def _archive_hint(folder: BenchmarkFolder, task: MmebTask) -> str:
    above = folder.data_root / task.media_root
    for place in list(above.parents)[:3]:
        found = [path for pattern in _ARCHIVES for path in sorted(place.glob(pattern))]
        if found and place.is_relative_to(folder.data_root):
            return f"unpack {', '.join(str(path) for path in found[:3])}"
    return "download them"
