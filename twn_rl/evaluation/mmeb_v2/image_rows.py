"""Rows of MMEB-V2's 36 image tasks, which are those of `MMEB_Test_Instruct`.

A row is `qry_inst, qry_text, qry_img_path, tgt_inst, tgt_text[], tgt_img_path[]`; its first target
is the answer. Instructions stand in the rows. Whitespace between instruction and text is our
renderer's, as for every item; the words are the official ones.
"""

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from twn_rl.data.formats.input_files import as_list, required, text_of
from twn_rl.data.images import resolve_inside
from twn_rl.data.record import Item, RecordError, bad_type
from twn_rl.evaluation.mmeb_v2.task_data import TaskRow, query_item
from twn_rl.evaluation.mmeb_v2.tasks import MmebTask

_MARK = "<|image_1|>"
# No official row has a video; a row that does was made for something else.
_VIDEO_FIELDS = ("qry_video_path", "qry_video", "video")


def read_text_candidates(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row that ranks texts: classes, answers or captions."""
    texts = _listed(data, "tgt_text")
    if not all(text.strip() for text in texts):
        raise RecordError(
            "tgt_text has a blank candidate; expected text; correct the row",
            reason="blank_text",
            field="tgt_text",
        )
    return TaskRow(_picture_query(root, data), [(t, Item(text=t)) for t in texts], texts[:1])


def read_image_candidates(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row with a text query that ranks pictures, named by their paths."""
    candidates = [(path, item) for path, _, item in _pictures(root, data)]
    return TaskRow(_query(data, images=()), candidates, [candidates[0][0]])


def read_captioned_candidates(task: MmebTask, root: Path, data: Mapping[str, Any]) -> TaskRow:
    """Return a row that ranks pictures, named by path and text: an object's or a pair's."""
    candidates = [(f"{path}:{text.strip(chr(34))}", i) for path, text, i in _pictures(root, data)]
    return TaskRow(_picture_query(root, data), candidates, [candidates[0][0]])


def _picture_query(root: Path, data: Mapping[str, Any]) -> Item:
    path = text_of(data, "qry_img_path")
    if path is None:
        raise RecordError(
            "qry_img_path is empty; expected the query's picture; add it or leave the row out",
            reason="missing_image",
            field="qry_img_path",
        )
    return _query(data, images=(_resolved(path, root),))


def _query(data: Mapping[str, Any], *, images: tuple[str, ...]) -> Item:
    videos = [str(value) for name in _VIDEO_FIELDS for value in as_list(data.get(name)) if value]
    instruction, text = _bare(required(data, "qry_inst")), text_of(data, "qry_text")
    return query_item(instruction, _bare(text or ""), images, videos)


def _pictures(root: Path, data: Mapping[str, Any]) -> list[tuple[str, str, Item]]:
    """Return path, caption and item of every candidate; captions count if the first is no blank."""
    instruction = _bare(data.get("tgt_inst") or "")
    paths, captions = _listed(data, "tgt_img_path"), _listed(data, "tgt_text")
    if len(captions) != len(paths):
        raise RecordError(
            f"tgt_text has {len(captions)} entries, tgt_img_path {len(paths)}; expected as many; "
            "correct the row",
            reason="bad_type",
            field="tgt_text",
        )
    texts = captions if captions[0].strip() else [None] * len(captions)
    items = [
        Item(instruction, text, (_resolved(path, root),))
        for path, text in zip(paths, texts, strict=True)
    ]
    return list(zip(paths, captions, items, strict=True))


def _listed(data: Mapping[str, Any], name: str) -> list[str]:
    values = as_list(required(data, name))
    if not values or not all(isinstance(value, str) for value in values):
        raise bad_type(values, "a list of texts with the answer first", name)
    return values


@lru_cache(maxsize=65_536)  # many queries share a picture
def _resolved(path: str, root: Path) -> str:
    return str(resolve_inside(path, root))


def _bare(text: str) -> str | None:
    return text.replace(_MARK, "").strip() or None
