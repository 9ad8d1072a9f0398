"""MMEB-V2's video classification and video question answering: videos -> labels or answers."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import as_list, required
from twn_rl.data.record import Item, RecordError
from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder, located
from twn_rl.evaluation.mmeb_v2.frames import read_frames
from twn_rl.evaluation.mmeb_v2.task_data import (
    ItemTargets,
    TaskData,
    TaskQuery,
    local_query,
    refuse_mixed_media,
)
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

# MVBench keeps each of its kinds of question in a subset of its own; frames lie in folders of it.
MVBENCH_SUBSETS = (
    "episodic_reasoning",
    "action_sequence",
    "action_prediction",
    "action_antonym",
    "fine_grained_action",
    "unexpected_action",
    "object_existence",
    "object_interaction",
    "object_shuffle",
    "moving_direction",
    "action_localization",
    "scene_transition",
    "action_count",
    "moving_count",
    "moving_attribute",
    "state_change",
    "fine_grained_pose",
    "character_order",
    "egocentric_navigation",
    "counterfactual_inference",
)
_PICTURE_FIELDS = ("image", "images", "image_path")
_LETTERS = "ABCDEFGHIJ"

# Question, frames folder, (key, text) of each candidate, key of the answer.
Question = tuple[str, str, list[tuple[str, str]], str]


def load_video_classes(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task whose candidates are all labels of its data set.

    The labels are those of `labels.json` or `labels.txt` beside the annotations, or of
    `labels/TASK.txt` under the data root, and those of the rows.

    Raises:
        RecordError: If that gives fewer labels than the data set has, which would be too easy.
    """
    targets, queries = ItemTargets(), list[TaskQuery]()
    for label in _label_list(task, folder):
        targets.add(label, Item(text=label))
    for row in folder.rows(task):
        with located(row) as data:
            label = str(required(data, "pos_text"))
            item = _video_item(task, folder, data, str(required(data, "video_id")), None)
            place = targets.add(label, Item(text=label))
            queries.append(TaskQuery(str(row.position), item, {place: 1.0}))
    if task.num_candidates is not None and len(targets.keys) < task.num_candidates:
        raise RecordError(
            f"task {task.task}: {len(targets.keys)} labels found; expected {task.num_candidates}, "
            "as fewer make the task easier; write all labels, one a line, to "
            f"{folder.annotation_root / 'labels' / f'{task.task}.txt'}",
            reason="missing_labels",
            file=folder.annotation_root,
        )
    return TaskData(queries, targets)


def load_video_choices(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return SmthSmthV2: each video has its own list of labels (`neg_text` holds them all)."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        labels = [(str(text), str(text)) for text in as_list(required(data, "neg_text"))]
        return "", str(required(data, "video_id")), labels, str(required(data, "pos_text"))

    return _load_questions(task, folder, question)


def load_mvbench(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return MVBench: candidates carry their letters, "(A) ...", as in the question."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        options = [str(option) for option in as_list(required(data, "candidates"))]
        text, lettered = _with_options(str(required(data, "question")), options)
        answer = str(required(data, "answer"))
        if answer not in options:
            raise _no_answer(answer, options)
        video = f"{subset}/{required(data, 'video')}"
        right = lettered[options.index(answer)]
        return text, video, [(option, option) for option in lettered], right

    return _load_questions(task, folder, question, MVBENCH_SUBSETS)


def load_nextqa(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return NExTQA: five options a0 to a4, the question lists them, candidates are bare."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        options = [str(required(data, f"a{index}")) for index in range(5)]
        text, _ = _with_options(str(required(data, "question")), options)
        answer = options[_index(required(data, "answer"), options)]
        return text, str(required(data, "video")), [(o, o) for o in options], answer

    return _load_questions(task, folder, question)


def load_videomme(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return Video-MME: options "A. ...", the answer is a letter."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        options = [str(option) for option in as_list(required(data, "options"))]
        answer = str(required(data, "answer"))
        if answer not in _LETTERS[: len(options)]:
            raise _no_answer(answer, options)
        text = "\n".join([str(required(data, "question")), *options])
        right = options[_LETTERS.index(answer)]
        return text, str(required(data, "videoID")), [(o, _bare(o)) for o in options], right

    return _load_questions(task, folder, question)


def load_egoschema(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return EgoSchema: options "A. ...", the answer is a position."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        options = [str(option) for option in as_list(required(data, "option"))]
        # The official text has no space between question and options.
        text = str(required(data, "question")) + " ".join(options)
        right = options[_index(required(data, "answer"), options)]
        return text, str(required(data, "video_idx")), [(o, _bare(o)) for o in options], right

    return _load_questions(task, folder, question)


def load_activitynetqa(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return ActivityNetQA: yes or no."""

    def question(data: Mapping[str, Any], subset: str) -> Question:
        text = f"{required(data, 'question')}? (A) yes; (B) no."
        video = f"v_{required(data, 'video_name')}"
        return text, video, [("yes", "yes"), ("no", "no")], str(required(data, "answer"))

    return _load_questions(task, folder, question)


def _load_questions(
    task: MmebTask, folder: BenchmarkFolder, question: Any, subsets: Iterable[str | None] = (None,)
) -> TaskData:
    targets, queries = ItemTargets(), list[TaskQuery]()
    for subset in subsets:
        for row in folder.rows(task, subset):
            with located(row) as data:
                text, video, options, answer = question(data, subset)
                name = f"{subset}/{row.position}" if subset else str(row.position)
                item = _video_item(task, folder, data, video, text or None)
                candidates = [(key, Item(text=shown)) for key, shown in options]
                queries.append(local_query(name, item, candidates, [answer], targets))
    return TaskData(queries, targets)


def _video_item(
    task: MmebTask,
    folder: BenchmarkFolder,
    data: Mapping[str, Any],
    video: str,
    text: str | None,
) -> Item:
    pictures = [value for name in _PICTURE_FIELDS for value in as_list(data.get(name)) if value]
    return refuse_mixed_media(
        Item(
            task.query_instruction,
            text,
            images=tuple(str(value)[:80] for value in pictures),
            video=read_frames(folder.media_root(task), video),
        )
    )


def _with_options(question: str, options: list[str]) -> tuple[str, list[str]]:
    """Return the question with its lettered options below, and these.

    >>> _with_options("who?", ["a cat", "a dog"])[0].splitlines()
    ['who?', 'Options:', '(A) a cat', '(B) a dog']
    """
    lettered = [f"({_LETTERS[index]}) {option}" for index, option in enumerate(options)]
    return "\n".join([question, "Options:", *lettered]), lettered


def _bare(option: str) -> str:
    """Return an option without its letter.

    >>> _bare("A. It is a cat.")
    'It is a cat'
    """
    return option[option.find(". ") :].strip(". ")


def _index(value: Any, options: list[str]) -> int:
    text = str(value)
    if not text.isdigit() or int(text) >= len(options):
        raise _no_answer(text, options)
    return int(text)


def _no_answer(answer: str, options: list[str]) -> RecordError:
    return RecordError(
        f"answer = {answer!r:.80} names none of the {len(options)} candidates {options!r:.120}; "
        "expected one of them; correct the row",
        reason="missing_positive",
        field="answer",
    )


def _label_list(task: MmebTask, folder: BenchmarkFolder) -> list[str]:
    places = [
        place / name for place in folder.places(task) for name in ("labels.json", "labels.txt")
    ]
    places.append(folder.annotation_root / "labels" / f"{task.task}.txt")
    path = next((place for place in places if place.is_file()), None)
    return [] if path is None else _read_labels(path)


def _read_labels(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".txt":
        return [line.strip() for line in text.splitlines() if line.strip()]
    try:
        labels = json.loads(text)
    except ValueError as error:
        labels = error
    if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
        raise RecordError(
            f"labels = {labels!r:.80}; expected a JSON list of texts; correct the file",
            reason="bad_file",
            file=path,
        )
    return labels
