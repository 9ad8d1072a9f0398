"""Queries as entries of the report's gallery, pictures included."""

import base64
import io
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from twn_rl.data.images import ImageError, open_image
from twn_rl.evaluation.results import Evaluation, query_values
from twn_rl.evaluation.routing import CHOICES, RoutedQuery, spread_over_tasks

logger = logging.getLogger(__name__)

PICTURE_PIXELS = 160
# What is shown of one query: a name, its row, and the evaluation it is from.
Answer = tuple[str, Mapping[str, Any], Evaluation]


@dataclass(frozen=True)
class Gallery:
    """Queries to show, and how many of all changed.

    Attributes:
        examples: Entries; those that changed first, one that became worse among the first six.
        queries: Of all splits.
        mended: How many are right now and were not, by the earlier model or else without thinking.
        broken: How many were right and are not.
    """

    examples: list[dict[str, Any]]
    queries: int
    mended: int
    broken: int


def gallery(
    after: Evaluation, before: Evaluation | None, num_examples: int, *, num_leading: int = 6
) -> Gallery:
    """Return queries whose outcome changed first, then the rest in order.

    Args:
        after: What to show.
        before: The same queries by an earlier model; without them thinking is held against none.
        num_examples: Entries at most.
        num_leading: Entries that lead the page: the last of them became worse, if any did.
    """
    runs = [("earlier model", before)] if before is not None else []
    runs.append(("this model" if before is not None else "own thoughts", after))
    # A query counts once per split and id.
    found: dict[tuple[str, str], list[Answer]] = {}
    for name, run in [("no thinking", after), *runs]:
        wanted = "never" if name == "no thinking" else "always"
        for row in run.queries:
            if row["mode"] == wanted:
                found.setdefault((row["split"], row["id"]), []).append((name, row, run))

    def change(answers: list[Answer]) -> tuple[float, float]:
        """Return what training changed, and what the thought did against none, in hit@1."""
        hits = [query_values(row)["hit@1"] for _, row, _ in answers]
        gain = hits[-1] - hits[0]
        return (hits[-1] - hits[1] if len(hits) > 2 else gain), gain

    ordered = sorted(found.values(), key=lambda a: (change(a)[0] == 0, -abs(change(a)[1])))
    changes = [change(answers)[0] for answers in ordered]
    mended = [answers for answers, by in zip(ordered, changes, strict=True) if by > 0]
    broken = [answers for answers, by in zip(ordered, changes, strict=True) if by < 0]
    same = [answers for answers, by in zip(ordered, changes, strict=True) if by == 0]
    leading = mended[: num_leading - len(broken[:1])] + broken[:1]
    rest = mended[num_leading - len(broken[:1]) :] + broken[1:] + same
    chosen = [*leading, *rest][:num_examples]
    return Gallery([_example(answers) for answers in chosen], len(found), len(mended), len(broken))


def routing_gallery(
    queries: Sequence[RoutedQuery], run: Evaluation, num_examples: int, decider: str
) -> list[dict[str, Any]]:
    """Return the four ways to choose, how often it did, and examples over all tasks.

    Args:
        queries: Of any splits.
        run: The evaluation they are from.
        num_examples: Examples of each way at most.
        decider: Who chose, for readers.
    """
    kinds = []
    for choice, name in CHOICES.items():
        members = [query for query in queries if query.choice == choice]
        entries = []
        for query in spread_over_tasks(members, num_examples):
            names = ["no thinking", "own thoughts"]
            names[query.is_thinking] += f", {decider}'s choice"
            answers = [(names[0], query.never, run), (names[1], query.always, run)]
            note = f"{decider}: {query.probability:.2f} for a thought"
            entries.append(_example(answers, note=note))
        kinds.append(
            {
                "name": name,
                "is_right": choice[0] == choice[1],
                "count": len(members),
                "share": f"{100 * len(members) / max(1, len(queries)):.0f} %",
                "examples": entries,
            }
        )
    return kinds


def _example(answers: list[Answer], *, note: str = "") -> dict[str, Any]:
    row = answers[0][1]
    query = row["query"]
    return {
        "id": row["id"],
        "note": note,
        "group": " · ".join(filter(None, [row["split"], row["task"], row["hop"]])),
        "question": "\n".join(filter(None, [query["instruction"], query["text"]])),
        "pictures": [_picture(path) for path in query["images"]],
        "positive": _target(row["positive"], row, answers[0][2]),
        "answers": [
            {
                "name": name,
                "cot": answer["cot"],
                "problem": answer["problems"][0],
                "rank": answer["ranks"][0],
                "nearest": [_target(key, answer, run) for key in answer["nearest"]],
            }
            for name, answer, run in answers
        ],
    }


def _target(key: str, row: Mapping[str, Any], run: Evaluation) -> dict[str, Any]:
    target = run.targets.get(key, {"text": key, "images": [], "instruction": None})
    name = target["text"] or next((Path(path).stem for path in target["images"]), key)
    return {
        "is_positive": key == row["positive"],
        "name": name,
        "picture": _picture(target["images"][0]) if target["images"] else None,
    }


@lru_cache(maxsize=512)
def _picture(path: str) -> str | None:
    """Return a picture as a data URI; None, and a warning, if it is gone."""
    try:
        picture = open_image(path)
    except ImageError as error:
        logger.warning("left out of the report: %s", error)
        return None
    picture.thumbnail((PICTURE_PIXELS, PICTURE_PIXELS))
    buffer = io.BytesIO()
    picture.save(buffer, format="WEBP", quality=85)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
