"""`POST /search` over a collection, and the pictures of what is found."""

from __future__ import annotations

import asyncio
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from PIL import Image
from pydantic import Field, model_validator

from twn_rl.data.images import IMAGE_FORMATS, ImageError
from twn_rl.inference.collection import Collection, Hit
from twn_rl.inference.job import Job
from twn_rl.inference.metadata_filter import check_filter
from twn_rl.serving.bodies import ThinkFields, with_instruction
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.received import Received, received_messages
from twn_rl.serving.replies import read_event, thought_of, token_event, usage_of, vectors_of
from twn_rl.serving.routes import event_stream, service_of
from twn_rl.serving.service import EmbeddingService, Event, Wish

_MOST_HITS = 100

router = APIRouter()


class SearchRequest(ThinkFields):
    """The body of `POST /search`.

    Attributes:
        query: A text.
        messages: Instead of it, one conversation with pictures as data URIs.
        instruction: For a query that brings none of its own.
        top_k: How many hits.
        filter: What their metadata must hold: name -> a value, or several of which one is enough.
        without_thought: Return what is found without the thought, too.
        stream: Send events while the query is worked on.
    """

    query: str | None = None
    messages: list[dict[str, Any]] | None = None
    instruction: str | None = None
    top_k: int = Field(default=10, ge=1, le=_MOST_HITS)
    filter: dict[str, Any] | None = None
    without_thought: bool = False
    stream: bool = False

    @model_validator(mode="after")
    def _one_source(self) -> SearchRequest:
        if (self.query is None) == (self.messages is None):
            raise ValueError("expected either query or messages; send one of them")
        check_filter(self.filter or {})
        return self

    def received(self) -> Received:
        """Return the query.

        Raises:
            ServiceError: For messages of other roles or parts.
        """
        if self.messages is None:
            return Received("query", self.query, (), self.instruction)
        return with_instruction(received_messages(self.messages, "messages"), self.instruction)

    def wish(self) -> Wish:
        """Return how to embed: what searches is a query."""
        return self.wish_as("query")


def collection_of(request: Request) -> Collection:
    """Return the collection of the app that a request came to.

    Raises:
        ServiceError: 404 without one.
    """
    collection = request.app.state.collection
    if collection is None:
        raise ServiceError(
            404,
            "no collection is served; expected one; start the server with --collection",
            code="no_collection",
        )
    return collection


@router.post("/search", response_model=None)
async def search(body: SearchRequest, request: Request) -> Response:
    """Find the rows nearest to a query; with `stream`, tell events while it is worked on."""
    service, collection = service_of(request), collection_of(request)
    body.check_model(service.name)
    received, wish = body.received(), body.wish()
    if not body.stream:
        (job,) = await service.embed([received], wish)
        return JSONResponse(await _reply(service, collection, body, job))

    async def told(event: Event) -> dict[str, Any]:
        if event.kind == "token":
            return token_event(event)
        if event.kind == "done":
            return await _reply(service, collection, body, event.job)
        hits = await _hits(collection, event.job.no_think_state, body)
        return {**read_event(service, event, wish), "hits": hits}

    return await event_stream(service.stream(received, wish), told)


@router.get("/collection")
async def collection_card(request: Request) -> dict[str, Any]:
    """Say what can be found."""
    collection = collection_of(request)
    return {
        "object": "collection",
        "name": collection.path.resolve().name,
        "rows": collection.rows,
        "dimensions": collection.width,
        "is_approximate": collection.is_approximate,
    }


@router.get("/collection/pictures/{row}/{number}", response_model=None)
async def picture(row: int, number: int, request: Request) -> Response:
    """Return a picture of a row; rows name their pictures, clients never name a file."""
    collection = collection_of(request)
    try:
        found = await asyncio.to_thread(_picture, collection, row, number)
    except ImageError as error:
        raise ServiceError(404, str(error), code=error.reason) from error
    if found is None:
        raise ServiceError(
            404,
            f"row {row} has no picture {number}; expected one of the hits' pictures; correct it",
            code="no_picture",
        )
    return found


def _picture(collection: Collection, row: int, number: int) -> Response | None:
    path = collection.picture(row, number)
    return None if path is None else picture_reply(path, f"picture {number} of row {row}")


def picture_reply(path: Path, named: str) -> Response:
    """Return the answer that holds a picture's file, which must be one.

    Raises:
        ServiceError: 404 if it is not.
    """
    try:
        with Image.open(path, formats=IMAGE_FORMATS) as image:
            kind = Image.MIME.get(image.format or "", "application/octet-stream")
    except (OSError, ValueError) as error:
        raise ServiceError(
            404,
            f"{named} cannot be read; expected an image file; replace it",
            code="unreadable_image",
        ) from error
    return FileResponse(path, media_type=kind, headers={"X-Content-Type-Options": "nosniff"})


async def _hits(collection: Collection, state: Any, body: SearchRequest) -> list[dict[str, Any]]:
    (vector,) = vectors_of([state])
    found = await asyncio.to_thread(collection.search, vector, body.top_k, body.filter)
    return [_told(hit) for hit in found]


def _told(hit: Hit) -> dict[str, Any]:
    paths = [f"/collection/pictures/{hit.row}/{number}" for number in range(len(hit.pictures))]
    return {**asdict(hit), "score": round(hit.score, 6), "pictures": paths}


async def _reply(
    service: EmbeddingService, collection: Collection, body: SearchRequest, job: Job
) -> dict[str, Any]:
    reply: dict[str, Any] = {
        "object": "list",
        "model": service.name,
        "hits": await _hits(collection, job.state, body),
        **thought_of(job, with_text=body.return_thoughts),
        "usage": usage_of([job]),
    }
    if body.without_thought:
        reply["hits_without_thought"] = await _hits(collection, job.no_think_state, body)
    return reply
