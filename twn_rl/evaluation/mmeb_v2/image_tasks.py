"""MMEB-V2's 36 image tasks: rows of `MMEB_Test_Instruct` -> queries and targets.

A row is `qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text[], tgt_img_path[]`; its first target
is the answer. Instructions stand in the rows. Whitespace between instruction and text is our
renderer's, as for every item; the words are the official ones.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from twn_rl.data.formats.conversion import as_list, required, text_of
from twn_rl.data.images import resolve_inside
from twn_rl.data.record import Item, RecordError
from twn_rl.evaluation.mmeb_v2.annotations import BenchmarkFolder, located
from twn_rl.evaluation.mmeb_v2.task_data import (
    ItemTargets,
    TaskData,
    TaskQuery,
    local_query,
    refuse_mixed_media,
)
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

_MARK = "<|image_1|>"
# No official row has a video; a row that does was made for something else.
_VIDEO_FIELDS = ("qry_video_path", "qry_video", "video")


def load_text_candidates(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task that ranks texts: classes, answers or captions."""
    return _load(task, folder, _texts)


def load_image_candidates(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task with text queries that ranks pictures, named by their paths."""
    return _load(task, folder, _images, has_query_image=False)


def load_captioned_candidates(task: MmebTask, folder: BenchmarkFolder) -> TaskData:
    """Return a task that ranks pictures, named by path and text: an object's or a pair's."""
    return _load(task, folder, _captioned_images)


def _load(
    task: MmebTask, folder: BenchmarkFolder, candidates: Any, *, has_query_image: bool = True
) -> TaskData:
    root = folder.media_root(task)
    targets, queries = ItemTargets(), list[TaskQuery]()
    images: dict[str, str] = {}  # a picture that many queries share is looked for once
    for row in folder.rows(task):
        with located(row) as data:
            item = _query(data, root, images, has_image=has_query_image)
            listed = list(candidates(data, root, images))
            queries.append(local_query(str(row.position), item, listed, [listed[0][0]], targets))
    return TaskData(queries, targets)


def _query(data: Mapping[str, Any], root: Path, images: dict[str, str], *, has_image: bool) -> Item:
    path = text_of(data, "qry_img_path")
    if has_image and path is None:
        raise RecordError(
            "qry_img_path is empty; expected the query's picture; add it or leave the row out",
            reason="missing_image",
            field="qry_img_path",
        )
    videos = [value for name in _VIDEO_FIELDS for value in as_list(data.get(name)) if value]
    return refuse_mixed_media(
        Item(
            instruction=_bare(required(data, "qry_inst")),
            text=_bare(text_of(data, "qry_text") or ""),
            images=(_resolved(path, root, images),) if has_image and path else (),
            video=tuple(map(str, videos)),
        )
    )


def _texts(data: Mapping[str, Any], root: Path, images: dict[str, str]) -> Iterator[Any]:
    for text in _listed(data, "tgt_text"):
        if not text.strip():
            raise RecordError(
                "tgt_text has a blank candidate; expected text; correct the row",
                reason="blank_text",
                field="tgt_text",
            )
        yield text, Item(text=text)


def _images(data: Mapping[str, Any], root: Path, images: dict[str, str]) -> Iterator[Any]:
    for path, item, _ in _pictures(data, root, images):
        yield path, item


def _captioned_images(data: Mapping[str, Any], root: Path, images: dict[str, str]) -> Iterator[Any]:
    for path, item, caption in _pictures(data, root, images):
        yield f"{path}:{caption.strip(chr(34))}", item


def _pictures(
    data: Mapping[str, Any], root: Path, images: dict[str, str]
) -> Iterator[tuple[str, Item, str]]:
    """Yield path, item and caption of every candidate; captions count if the first is not blank."""
    instruction = _bare(data.get("tgt_inst") or "")
    paths, captions = _listed(data, "tgt_img_path"), _listed(data, "tgt_text")
    if len(captions) != len(paths):
        raise RecordError(
            f"tgt_text has {len(captions)} entries, tgt_img_path {len(paths)}; expected as many; "
            "correct the row",
            reason="bad_type",
            field="tgt_text",
        )
    has_captions = bool(captions[0].strip())
    for path, caption in zip(paths, captions, strict=True):
        text = caption if has_captions else None
        yield path, Item(instruction, text, (_resolved(path, root, images),)), caption


def _listed(data: Mapping[str, Any], name: str) -> list[str]:
    values = as_list(required(data, name))
    if not values or not all(isinstance(value, str) for value in values):
        raise RecordError(
            f"{name} = {values!r:.80}; expected a list of texts with the answer first; correct it",
            reason="bad_type",
            field=name,
        )
    return values


def _resolved(path: str, root: Path, images: dict[str, str]) -> str:
    if path not in images:
        images[path] = str(resolve_inside(path, root))
    return images[path]


def _bare(text: str) -> str | None:
    return text.replace(_MARK, "").strip() or None
