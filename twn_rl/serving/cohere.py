"""`POST /v2/embed`, as Cohere has it: texts, pictures or both, vectors in several types at once."""

from __future__ import annotations

import uuid
from typing import Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator

from twn_rl.inference.job import Job
from twn_rl.inference.options import Precision, Side
from twn_rl.serving.bodies import ThinkFields
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.received import Received, received_parts
from twn_rl.serving.replies import check_dimensions, encoded, thought_of, usage_of, vectors_of
from twn_rl.serving.routes import service_of
from twn_rl.serving.service import Wish

router = APIRouter()

Purpose = Literal["search_query", "search_document", "classification", "clustering", "image"]
EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
# What is read as a query, and what as a document; the others do not think unless asked.
_SIDES: dict[Purpose, Side | None] = {
    "search_query": "query",
    "search_document": "document",
    "classification": None,
    "clustering": None,
    "image": "document",
}


class MixedInput(BaseModel):
    """One input of several parts.

    Attributes:
        content: Parts of type "text" and "image_url".
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    content: list[dict[str, Any]]


class CohereRequest(ThinkFields):
    """The body of `POST /v2/embed`.

    Attributes:
        input_type: What the inputs are for.
        texts: Texts.
        images: Data URIs.
        inputs: Inputs of several parts.
        embedding_types: Forms of the vectors.
        output_dimension: Keep the first numbers only.
        truncate: "END" cuts texts that are too long, "NONE" refuses them.
    """

    input_type: Purpose
    texts: list[str] | None = None
    images: list[str] | None = None
    inputs: list[MixedInput] | None = None
    embedding_types: list[EmbeddingType] = Field(default=["float"], min_length=1)
    output_dimension: int | None = Field(default=None, ge=1)
    truncate: Literal["END", "NONE"] = "END"

    @model_validator(mode="after")
    def _one_source(self) -> CohereRequest:
        given = [values for values in (self.texts, self.images, self.inputs) if values is not None]
        if len(given) != 1:
            raise ValueError("expected one of texts, images and inputs; send one of them")
        return self

    def wish(self) -> Wish:
        """Return how to embed."""
        return self.wish_as(_SIDES[self.input_type])

    def received(self) -> list[Received]:
        """Return the inputs.

        Raises:
            ServiceError: For other parts.
        """
        if self.texts is not None:
            return [Received(f"texts.{n}", text) for n, text in enumerate(self.texts)]
        if self.images is not None:
            return [Received(f"images.{n}", None, (uri,)) for n, uri in enumerate(self.images)]
        return [
            received_parts(each.content, f"inputs.{n}") for n, each in enumerate(self.inputs or [])
        ]


@router.post("/v2/embed", response_model=None)
async def embed(body: CohereRequest, request: Request) -> Response:
    """Embed texts, pictures or both."""
    service = service_of(request)
    body.check_model(service.name)
    check_dimensions(body.output_dimension, service.embedder.model.hidden_size)
    received = body.received()
    jobs = await service.embed(received, body.wish())
    if body.truncate == "NONE" and any(job.is_truncated for job in jobs):
        where = next(r.where for r, job in zip(received, jobs, strict=True) if job.is_truncated)
        raise ServiceError(
            400,
            f"{where}: its text is longer than the model reads; expected a shorter one; cut it, "
            "or send truncate = END",
            code="text_too_long",
            param=where,
        )
    usage = usage_of(jobs)
    billed = {"input_tokens": usage["prompt_tokens"], "output_tokens": usage["think_tokens"]}
    reply = {
        "id": str(uuid.uuid4()),
        "response_type": "embeddings_by_type",
        "embeddings": {kind: _in_type(jobs, kind, body) for kind in body.embedding_types},
        "texts": body.texts or [],
        "thoughts": [thought_of(job, with_text=body.return_thoughts) for job in jobs],
        "meta": {"api_version": {"version": "2"}, "billed_units": billed},
    }
    return JSONResponse(reply)


def _in_type(jobs: list[Job], kind: EmbeddingType, body: CohereRequest) -> list[Any]:
    """Return the vectors in one form."""
    precision: Precision = "float32" if kind in ("float", "base64") else kind  # type: ignore[assignment]
    states = [job.state for job in jobs]
    rows = vectors_of(states, dimensions=body.output_dimension, precision=precision)
    return [encoded(row, "base64" if kind == "base64" else "float") for row in rows]
