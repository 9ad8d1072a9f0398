"""Rows of MMEB-V2's 18 video tasks: labels, questions, captions, moments.

The frames of moment retrieval lie in `VIDEO/query`, `VIDEO/positive*` and one folder a negative
clip; the official scorer takes the last positive folder it meets, here all of them are right.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from twn_rl.data.formats.input_files import as_list, required
from twn_rl.data.images import resolve_inside
from twn_rl.data.record import Item, RecordError, bad_type
from twn_rl.evaluation.mmeb_v2.task_data import TaskRow, query_item
from twn_rl.evaluation.mmeb_v2.task_files import read_frames
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
# Parser -> fields of the video's name and of its caption (of a list, the first).
CAPTION_FIELDS = {
    "didemo": ("video", "caption"),
    "msrvtt": ("video_id", "caption"),
    "msvd": ("video_id", "caption"),
    "vatex": ("videoID", "enCap"),
    "youcook2": ("id", "sentence"),
}
_QUERY, _POSITIVE = "query", "positive"


class _Question(NamedTuple):
    """What is asked of which video; candidates as texts, or by key where only a part is shown."""

    video: str
    text: str | None
    options: Sequence[str] | Mapping[str, str]
    answer: str


def read_question(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row that asks about a video and ranks texts."""
    video, text, options, answer = QUESTIONS[task.parser](data)
    pictures = [value for name in _PICTURE_FIELDS for value in as_list(data.get(name)) if value]
    images = [str(value)[:80] for value in pictures]
    query = query_item(task.query_instruction, text, images, read_frames(root, video))
    shown = options if isinstance(options, Mapping) else {option: option for option in options}
    return TaskRow(query, [(key, Item(text=text)) for key, text in shown.items()], [answer])


def read_caption(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row whose caption finds its video."""
    video_field, caption_field = CAPTION_FIELDS[task.parser]
    name = str(required(data, video_field))
    if task.parser == "didemo":  # the path of a file
        name = PurePosixPath(name).stem
    captions = as_list(required(data, caption_field))
    if not captions or not str(captions[0]).strip():
        raise RecordError(
            f"{caption_field} = {captions!r:.60}; expected a caption; correct the row",
            reason="blank_text",
            field=caption_field,
        )
    query = Item(task.query_instruction, str(captions[0]))
    return TaskRow(query, _clip_candidates(task, root, [name]), [name])


def read_moment(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row whose description finds its clip among those of one video."""
    video = PurePosixPath(str(required(data, "video_path"))).stem
    folder = resolve_inside(video, root, must_exist=False)
    names = sorted(p.name for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else []
    if _QUERY not in names:
        raise RecordError(
            f"video = {video!r}: {folder} has the folders {names[:5]}; expected {_QUERY!r}, "
            f"'{_POSITIVE}...' and those of negative clips; unpack its archive again",
            reason="missing_frames",
        )
    clips = [f"{video}/{name}" for name in names if name != _QUERY]
    frames = read_frames(root, f"{video}/{_QUERY}")
    query = Item(task.query_instruction, str(required(data, "query")), video=frames)
    positives = [f"{video}/{name}" for name in names if name.startswith(_POSITIVE)]
    return TaskRow(query, _clip_candidates(task, root, clips), positives)


def read_momentseeker(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row of MomentSeeker: a text, alone or with a picture or a video, finds a clip."""
    positives = [_clip_name(clip) for clip in as_list(required(data, "positive_frames"))]
    negatives = [_clip_name(clip) for clip in as_list(data.get("negative_frames"))]
    text, source = str(required(data, "query")), str(data.get("input_frames") or "")
    query = Item(task.query_instruction, text)
    if source.endswith(".mp4"):
        frames = read_frames(root, _frames_folder(source))
        query = Item(task.query_instruction_video, text, video=frames)
    elif source.endswith(".jpg"):
        picture = str(resolve_inside(f"query_{source}", root))
        query = Item(task.query_instruction_image, text, images=(picture,))
    return TaskRow(query, _clip_candidates(task, root, positives + negatives), positives)


def _clip_candidates(task: MmebTask, root: Path, names: Sequence[str]) -> list[tuple[str, Item]]:
    return [(name, Item(task.target_instruction, video=read_frames(root, name))) for name in names]


def _clip_name(clip: Any) -> str:
    path = clip.get("output_path") if isinstance(clip, dict) else None
    if not isinstance(path, str) or not path:
        raise bad_type(clip, "a clip with output_path")
    return _frames_folder(path)


def _frames_folder(path: str) -> str:
    """Return where the frames of a clip lie.

    >>> _frames_folder("movie/101.mp4")
    'video_frames/movie_101'
    """
    return f"video_frames/{path.replace('/', '_').split('.mp4')[0]}"


def _labelled(data: Mapping[str, Any]) -> _Question:
    label = str(required(data, "pos_text"))
    return _Question(str(required(data, "video_id")), None, [label], label)


def _smthsmth(data: Mapping[str, Any]) -> _Question:
    # Each video has its own list of labels; `neg_text` holds them all.
    labels = [str(text) for text in as_list(required(data, "neg_text"))]
    return _Question(str(required(data, "video_id")), None, labels, str(required(data, "pos_text")))


def _mvbench(data: Mapping[str, Any]) -> _Question:
    # Candidates carry their letters, "(A) ...", as in the question.
    options = [str(option) for option in as_list(required(data, "candidates"))]
    text, lettered = _with_options(str(required(data, "question")), options)
    answer = str(required(data, "answer"))
    place = _place(options.index(answer) if answer in options else None, answer, options)
    return _Question(str(required(data, "video")), text, lettered, lettered[place])


def _nextqa(data: Mapping[str, Any]) -> _Question:
    # The question lists the five options, candidates are bare.
    options = [str(required(data, f"a{index}")) for index in range(5)]
    text, _ = _with_options(str(required(data, "question")), options)
    answer = options[_numbered(required(data, "answer"), options)]
    return _Question(str(required(data, "video")), text, options, answer)


def _videomme(data: Mapping[str, Any]) -> _Question:
    # Options "A. ...", the answer is a letter.
    options = [str(option) for option in as_list(required(data, "options"))]
    text = "\n".join([str(required(data, "question")), *options])
    answer = str(required(data, "answer"))
    place = _place(_LETTERS.index(answer) if answer in set(_LETTERS) else None, answer, options)
    return _Question(str(required(data, "videoID")), text, _bare(options), options[place])


def _egoschema(data: Mapping[str, Any]) -> _Question:
    # Options "A. ...", the answer is a position; officially nothing parts question and options.
    options = [str(option) for option in as_list(required(data, "option"))]
    text = str(required(data, "question")) + " ".join(options)
    answer = options[_numbered(required(data, "answer"), options)]
    return _Question(str(required(data, "video_idx")), text, _bare(options), answer)


def _activitynetqa(data: Mapping[str, Any]) -> _Question:
    text = f"{required(data, 'question')}? (A) yes; (B) no."
    video = f"v_{required(data, 'video_name')}"
    return _Question(video, text, ["yes", "no"], str(required(data, "answer")))


QUESTIONS: dict[str, Callable[[Mapping[str, Any]], _Question]] = {
    "video_classification": _labelled,
    "ssv2": _smthsmth,
    "mvbench": _mvbench,
    "nextqa": _nextqa,
    "videomme": _videomme,
    "egoschema": _egoschema,
    "activitynetqa": _activitynetqa,
}


def _with_options(question: str, options: list[str]) -> tuple[str, list[str]]:
    """Return the question with its lettered options below, and these.

    >>> _with_options("who?", ["a cat", "a dog"])[0].splitlines()
    ['who?', 'Options:', '(A) a cat', '(B) a dog']
    """
    lettered = [f"({_LETTERS[index]}) {option}" for index, option in enumerate(options)]
    return "\n".join([question, "Options:", *lettered]), lettered


def _bare(options: Sequence[str]) -> dict[str, str]:
    """Return options by themselves without their letters.

    >>> _bare(["A. It is a cat."])
    {'A. It is a cat.': 'It is a cat'}
    """
    return {option: option[option.find(". ") :].strip(". ") for option in options}


def _numbered(value: Any, options: list[str]) -> int:
    text = str(value)
    return _place(int(text) if text.isdigit() else None, text, options)


def _place(place: int | None, answer: str, options: list[str]) -> int:
    """Return the place of the answer among the options."""
    if place is None or place >= len(options):
        raise RecordError(
            f"answer = {answer!r:.80} names none of the {len(options)} candidates "
            f"{options!r:.120}; expected one of them; correct the row",
            reason="missing_positive",
            field="answer",
        )
    return place
