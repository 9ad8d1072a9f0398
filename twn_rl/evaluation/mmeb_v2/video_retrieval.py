"""MMEB-V2's video and moment retrieval: captions, with or without a video -> videos or clips.

The frames of moment retrieval lie in `VIDEO/query`, `VIDEO/positive*` and one folder a negative
clip; the official scorer takes the last positive folder it meets, here all of them are right.
"""

from pathlib import Path, PurePosixPath
from typing import Any

from twn_rl.data.formats.conversion import as_list, required
from twn_rl.data.images import resolve_inside
from twn_rl.data.record import Item, RecordError
from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder, located
from twn_rl.evaluation.mmeb_v2.frames import read_frames
from twn_rl.evaluation.mmeb_v2.task_data import ItemTargets, TaskData, TaskQuery, local_query
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

# Parser -> fields of the video's name and of its caption (of a list, the first).
_FIELDS = {
    "didemo": ("video", "caption"),
    "msrvtt": ("video_id", "caption"),
    "msvd": ("video_id", "caption"),
    "vatex": ("videoID", "enCap"),
    "youcook2": ("id", "sentence"),
}
_QUERY, _POSITIVE = "query", "positive"


def load_video_retrieval(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task that finds the video of a caption among all videos."""
    video_field, caption_field = _FIELDS[task.parser]
    targets, queries = ItemTargets(), list[TaskQuery]()
    for row in folder.rows(task):
        with located(row) as data:
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
            place = targets.number(name)
            if place is None:
                frames = read_frames(folder.media_root(task), name)
                place = targets.add(name, Item(task.target_instruction, video=frames))
            query = Item(task.query_instruction, str(captions[0]))
            queries.append(TaskQuery(str(row.position), query, {place: 1.0}))
    return TaskData(queries, targets)


def load_moment_retrieval(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task that finds the clip of a description among those of one video."""
    root = folder.media_root(task)
    targets, queries = ItemTargets(), list[TaskQuery]()
    for row in folder.rows(task):
        with located(row) as data:
            video = PurePosixPath(str(required(data, "video_path"))).stem
            clips = _clips(root, video)
            candidates = [
                (name, Item(task.target_instruction, video=read_frames(root, name)))
                for name in clips
            ]
            positives = [n for n in clips if n.split("/")[-1].startswith(_POSITIVE)]
            query = Item(
                task.query_instruction,
                str(required(data, "query")),
                video=read_frames(root, f"{video}/{_QUERY}"),
            )
            queries.append(local_query(str(row.position), query, candidates, positives, targets))
    return TaskData(queries, targets)


def load_momentseeker(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return MomentSeeker: a text, alone or with a picture or a video, finds a clip."""
    root = folder.media_root(task)
    targets, queries = ItemTargets(), list[TaskQuery]()
    for row in folder.rows(task):
        with located(row) as data:
            positives = [_clip_name(clip) for clip in as_list(required(data, "positive_frames"))]
            negatives = [_clip_name(clip) for clip in as_list(data.get("negative_frames"))]
            candidates = [
                (name, Item(task.target_instruction, video=read_frames(root, name)))
                for name in positives + negatives
            ]
            query = _seeker_query(task, root, str(required(data, "query")), data)
            queries.append(local_query(str(row.position), query, candidates, positives, targets))
    return TaskData(queries, targets)


def _clips(root: Path, video: str) -> list[str]:
    """Return the names of a video's clips: every folder but the query's."""
    folder = resolve_inside(video, root, must_exist=False)
    names = (
        sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    )
    if _QUERY not in names:
        raise RecordError(
            f"video = {video!r}: {folder} has the folders {names[:5]}; expected {_QUERY!r}, "
            f"'{_POSITIVE}...' and those of negative clips; unpack its archive again",
            reason="missing_frames",
        )
    return [f"{video}/{name}" for name in names if name != _QUERY]


def _seeker_query(task: MmebTask, root: Path, text: str, data: Any) -> Item:
    source = str(data.get("input_frames") or "")
    if source.endswith(".mp4"):
        frames = read_frames(root, _frames_folder(source))
        return Item(task.query_instruction_video, text, video=frames)
    if source.endswith(".jpg"):
        picture = str(resolve_inside(f"query_{source}", root))
        return Item(task.query_instruction_image, text, images=(picture,))
    return Item(task.query_instruction, text)


def _clip_name(clip: Any) -> str:
    path = clip.get("output_path") if isinstance(clip, dict) else None
    if not isinstance(path, str) or not path:
        raise RecordError(
            f"clip = {clip!r:.80}; expected an object with output_path; correct the row",
            reason="bad_type",
        )
    return _frames_folder(path)


def _frames_folder(path: str) -> str:
    """Return where the frames of a clip lie.

    >>> _frames_folder("movie/101.mp4")
    'video_frames/movie_101'
    """
    return f"video_frames/{path.replace('/', '_').split('.mp4')[0]}"
