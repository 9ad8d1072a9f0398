"""The page of `twn-rl ui`: itself, the questions it offers and what the gate's curve says.

The page asks `POST /search` as any client does. It loads nothing from elsewhere, and its policy
lets only its own script run.
"""

from __future__ import annotations

import asyncio
import csv
import secrets
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response

from twn_rl.data.record import Item
from twn_rl.inference.item_rows import ItemFile
from twn_rl.runtime.whole_files import read_json
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.routes import service_of
from twn_rl.serving.search_routes import collection_of, picture_reply

_HTML = (Path(__file__).parent / "page.html").read_text(encoding="utf-8")
_POLICY = (
    "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
    "img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_SAMPLES = 12
# Who decides -> what its probability is of.
_PROBABILITY = {
    "gate": "probability that a thought helps",
    "policy": "probability that the policy begins a thought",
}


@dataclass(frozen=True)
class Sample:
    """A question the page offers.

    Attributes:
        query: The question, pictures as absolute paths.
        target: Its answer.
        target_row: The answer's row in the collection; None if that was made of something else.
    """

    query: Item
    target: Item
    target_row: int | None


@dataclass(frozen=True)
class Curve:
    """Quality and tokens at each threshold, as they were measured when it was chosen.

    Attributes:
        points: Rows of curve.csv of the query side, the highest threshold first; may be empty.
        metric: What quality is.
        problem: Why there are no points; None if there are.
    """

    points: list[dict[str, float]]
    metric: str = ""
    problem: str | None = None


def read_samples(
    data: Path, *, data_root: str | None, limit: int | None, is_indexed: bool
) -> list[Sample]:
    """Return some questions of a file of records, evenly spread over it.

    Args:
        data: Records; bad rows are passed over, `build_collection` counts them.
        data_root: Folder no picture's path may leave; None is the file's.
        limit: Rows to read.
        is_indexed: Whether the collection is made of the answers of these rows, repeated ones once.

    Raises:
        ValueError: If no row can be asked.
    """
    queries, targets = (
        [row.item for row in ItemFile(data, side=side, data_root=data_root, limit=limit)]
        for side in ("query", "document")
    )
    first_row: dict[Item | None, int] = {}
    for row, target in enumerate(targets):
        first_row.setdefault(target, row)
    usable = [
        Sample(query, target, first_row[target] if is_indexed else None)
        for query, target in zip(queries, targets, strict=True)
        if query is not None and target is not None and not query.video
    ]
    if not usable:
        raise ValueError(
            f"no row of {data} holds a query of text or pictures; expected records; correct --data"
        )
    return usable[:: -(-len(usable) // _SAMPLES)]


def read_curve(folder: Path) -> Curve:
    """Return the curve that lies beside a gate's threshold, or why there is none."""
    try:
        with (folder / "curve.csv").open(encoding="utf-8", newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["side"] == "query"]
        names = ("threshold", "quality", "think_tokens", "think_rate", "random_quality")
        points = [
            {name: float(row[name]) for name in names} for row in rows if row["name"] == "curve"
        ]
    except FileNotFoundError:
        return Curve([], problem=f"the model has no {folder.name}/curve.csv; fit its threshold")
    except (OSError, KeyError, TypeError, ValueError):
        return Curve([], problem=f"{folder.name}/curve.csv cannot be read; fit the threshold again")
    if not points:
        return Curve([], problem=f"{folder.name}/curve.csv has no curve of queries")
    notes = read_json(folder / "metrics.json")
    metric = notes.get("metric") if isinstance(notes, dict) else None
    points.sort(key=lambda point: -point["threshold"])
    return Curve(points, str(metric or "quality"))


class Page:
    """The page's routes.

    Attributes:
        router: For `twn_rl.serving.app.create_app`.
    """

    def __init__(self, samples: list[Sample], curve: Curve) -> None:
        """Offer these questions, and show this curve."""
        self.samples, self.curve = samples, curve
        self.router = APIRouter()
        add = self.router.add_api_route
        add("/", self.html, methods=["GET"], response_model=None)
        add("/page/facts", self.facts, methods=["GET"], response_model=None)
        add("/page/samples/{number}/{picture}", self.picture, methods=["GET"], response_model=None)

    async def html(self) -> Response:
        """Return the page."""
        nonce = secrets.token_urlsafe(16)
        headers = {
            "Content-Security-Policy": _POLICY.format(nonce=nonce),
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cache-Control": "no-store",
        }
        return HTMLResponse(_HTML.replace("NONCE", nonce), headers=headers)

    async def facts(self, request: Request) -> dict[str, Any]:
        """Return what the page shows before anything is asked."""
        service, model = service_of(request), service_of(request).embedder.model
        threshold = (
            model.config.policy_threshold
            if model.is_policy_deciding
            else model.config.gate_threshold
        )
        return {
            "model": service.name,
            "rows": collection_of(request).rows,
            "can_decide": service.can_decide("query"),
            "threshold": threshold,
            "probability": _PROBABILITY["policy" if model.is_policy_deciding else "gate"],
            "curve": self.curve.points,
            "metric": self.curve.metric,
            "curve_problem": self.curve.problem,
            "samples": [_told(number, sample) for number, sample in enumerate(self.samples)],
        }

    async def picture(self, number: int, picture: int) -> Response:
        """Return a picture of a question that is offered."""
        pictures = self.samples[number].query.images if 0 <= number < len(self.samples) else ()
        if not 0 <= picture < len(pictures):
            raise ServiceError(
                404,
                f"sample {number} has no picture {picture}; expected one that /page/facts names; "
                "correct it",
                code="no_picture",
            )
        named = f"picture {picture} of sample {number}"
        return await asyncio.to_thread(picture_reply, Path(str(pictures[picture])), named)


def _told(number: int, sample: Sample) -> dict[str, Any]:
    query, target, row = sample.query, sample.target, sample.target_row
    found = [] if row is None else range(len(target.images))
    return {
        "text": query.text,
        "instruction": query.instruction,
        "pictures": [f"/page/samples/{number}/{each}" for each in range(len(query.images))],
        "target_row": row,
        "target_text": target.text,
        "target_pictures": [f"/collection/pictures/{row}/{each}" for each in found],
    }
