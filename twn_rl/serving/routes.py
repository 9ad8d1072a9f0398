"""`/v1/embeddings`, `/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST

from twn_rl.serving.bodies import EmbeddingRequest
from twn_rl.serving.errors import ServiceError, internal_error
from twn_rl.serving.replies import (
    check_dimensions,
    embedding_reply,
    encoded,
    read_event,
    server_sent,
    token_event,
    vectors_of,
)
from twn_rl.serving.service import EmbeddingService, Event

router = APIRouter()

Told = Callable[[Event], Awaitable[dict[str, Any] | None]]


def service_of(request: Request) -> EmbeddingService:
    """Return the service of the app that a request came to."""
    return request.app.state.service


@router.post("/v1/embeddings", response_model=None)
async def embeddings(body: EmbeddingRequest, request: Request) -> Response:
    """Embed texts, or one conversation with pictures; with `stream`, tell events of one input."""
    service = service_of(request)
    body.check_model(service.name)
    check_dimensions(body.dimensions, service.embedder.get_embedding_dimension())
    received, wish = body.received(), body.wish()
    if not body.stream:
        jobs = await service.embed(received, wish)
        return JSONResponse(embedding_reply(service, body, jobs))
    if len(received) != 1:
        raise ServiceError(
            400,
            f"stream = true with {len(received)} inputs; expected one; send several requests",
            code="bad_request",
            param="stream",
        )

    async def told(event: Event) -> dict[str, Any]:
        if event.kind == "token":
            return token_event(event)
        if event.kind == "done":
            return embedding_reply(service, body, [event.job])
        (vector,) = vectors_of([event.job.no_think_state], dimensions=body.dimensions)
        no_think = encoded(vector, body.encoding_format)
        return {**read_event(service, event, wish), "embedding": no_think}

    return await event_stream(service.stream(received[0], wish), told)


async def event_stream(events: AsyncIterator[Event], told: Told) -> Response:
    """Return server-sent events, each as `told`; None leaves it out.

    What goes wrong before the first event is an answer of its own, later it is an event "error".
    """
    first = await anext(events)
    head = await told(first)

    async def lines() -> AsyncIterator[str]:
        try:
            if head is not None:
                yield server_sent(first.kind, head)
            async for event in events:
                data = await told(event)
                if data is not None:
                    yield server_sent(event.kind, data)
        except ServiceError as error:
            yield server_sent("error", error.body())
        except Exception:
            yield server_sent("error", internal_error().body())
            raise

    headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
    return StreamingResponse(lines(), media_type="text/event-stream", headers=headers)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """Name the one model, and say what it can do."""
    service = service_of(request)
    embedder = service.embedder
    card = {
        "id": service.name,
        "object": "model",
        "created": service.started_at,
        "owned_by": "twn_rl",
        "dimensions": embedder.get_embedding_dimension(),
        "max_model_len": embedder.max_seq_length,
        "modalities": embedder.modalities,
        "max_think_tokens": service.longest_thought,
        "think_auto": [side for side in ("query", "document") if service.can_decide(side)],
        "think_threshold": embedder.model.config.gate_threshold,
        "has_latent_thoughts": bool(embedder.model.reason_ids),
    }
    return {"object": "list", "data": [card]}


@router.get("/health", response_model=None)
async def health(request: Request) -> Response:
    """Tell whether requests are worked on."""
    service = service_of(request)
    if not service.engine.is_alive:
        raise ServiceError(503, "the engine does not run; start the server again", code="no_engine")
    return JSONResponse({"status": "ok", "model": service.name})


@router.get("/metrics", response_model=None)
async def metrics(request: Request) -> Response:
    """Return the counters for Prometheus."""
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
