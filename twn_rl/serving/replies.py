"""What a request is answered: vectors in the form asked for, tokens, thoughts and decisions."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from twn_rl.inference.job import Job
from twn_rl.inference.options import EncodeOptions, Precision
from twn_rl.inference.vector_forms import in_form
from twn_rl.serving.bodies import EmbeddingRequest
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.service import EmbeddingService, Event, Wish

_CPU = torch.device("cpu")


def check_dimensions(dimensions: int | None, width: int) -> None:
    """Refuse more numbers than a vector has.

    Raises:
        ServiceError: 400.
    """
    if dimensions is not None and dimensions > width:
        raise ServiceError(
            400,
            f"dimensions = {dimensions}; expected at most {width}; lower it",
            code="bad_request",
            param="dimensions",
        )


def vectors_of(
    states: Sequence[Any], *, dimensions: int | None = None, precision: Precision = "float32"
) -> NDArray[Any]:
    """Return states (N, D) as unit vectors (N, d), the same numbers `ThinkingEmbedder` returns."""
    options = EncodeOptions(truncate_dim=dimensions, precision=precision)
    return in_form(np.stack(states), options, device=_CPU)


def usage_of(jobs: Sequence[Job]) -> dict[str, int]:
    """Return tokens read and tokens thought."""
    prompt, think = sum(j.prompt_tokens for j in jobs), sum(j.think_tokens for j in jobs)
    return {"prompt_tokens": prompt, "think_tokens": think, "total_tokens": prompt + think}


def thought_of(job: Job, *, with_text: bool) -> dict[str, Any]:
    """Return what is told of an input's thought and of its text's cut."""
    told: dict[str, Any] = {"think_tokens": job.think_tokens}
    if job.probability is not None:
        told["gate_probability"] = job.probability
    if job.thought is not None:
        told["thought_problem"] = job.thought.problem
        if with_text:
            told["thought"] = job.thought.text
    if job.is_truncated:
        told["truncated"] = True
    return told


def encoded(vector: NDArray[Any], encoding_format: str) -> Any:
    """Return a vector as a list of numbers or as base64 of little-endian float32."""
    if encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return vector.tolist()


def embedding_reply(
    service: EmbeddingService, request: EmbeddingRequest, jobs: Sequence[Job]
) -> dict[str, Any]:
    """Return the body of `/v1/embeddings`."""
    vectors = vectors_of([job.state for job in jobs], dimensions=request.dimensions)
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": encoded(vector, request.encoding_format),
            **thought_of(job, with_text=request.return_thoughts),
        }
        for index, (job, vector) in enumerate(zip(jobs, vectors, strict=True))
    ]
    return {"object": "list", "model": service.name, "data": data, "usage": usage_of(jobs)}


def read_event(service: EmbeddingService, event: Event, wish: Wish) -> dict[str, Any]:
    """Return what is told once the no-think vector and the decision are known."""
    threshold = service.chooser(wish).threshold
    return {
        "gate_probability": event.job.probability,
        "threshold": threshold,
        "thinks": event.thinks,
        "milliseconds": round(1000 * event.seconds, 3),
    }


def token_event(event: Event) -> dict[str, Any]:
    """Return what is told after a token."""
    milliseconds = round(1000 * event.seconds, 3)
    return {
        "text": event.text,
        "think_tokens": event.think_tokens,
        "milliseconds": milliseconds,
    }


def server_sent(kind: str, data: dict[str, Any]) -> str:
    """Return a server-sent event; JSON holds no line breaks."""
    return f"event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"
