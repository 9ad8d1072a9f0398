"""What a request that fails is told, in the form of OpenAI's API."""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

logger = logging.getLogger(__name__)

_KINDS = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_SHOWN_PROBLEMS = 3


class ServiceError(Exception):
    """A request that cannot be answered, and what its client is told.

    Attributes:
        status: HTTP status.
        message: What is wrong, what was expected, what to change.
        code: A short key for programs.
        param: The field it is about.
        retry_after: Seconds after which trying again may help.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        """Keep what the client is told."""
        super().__init__(message)
        self.status, self.message, self.code = status, message, code
        self.param, self.retry_after = param, retry_after

    def body(self) -> dict[str, Any]:
        """Return the body of the answer."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, kind)
        told = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": told}

    def response(self) -> JSONResponse:
        """Return the answer."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.body(), status_code=self.status, headers=headers)


def internal_error() -> ServiceError:
    """Return what a client is told of a fault that is not its own; the log has the rest."""
    message = "the server failed on this request; the request may be fine; see the server's log"
    return ServiceError(500, message, code="internal_error")


def add_handlers(app: FastAPI) -> None:
    """Let every error of an app be told in one form."""

    @app.exception_handler(ServiceError)
    async def service_error(_: Request, error: ServiceError) -> JSONResponse:
        return error.response()

    @app.exception_handler(RequestValidationError)
    async def bad_fields(_: Request, error: RequestValidationError) -> JSONResponse:
        return _of_fields(error).response()

    @app.exception_handler(HTTPException)
    async def http_error(_: Request, error: HTTPException) -> JSONResponse:
        code = {404: "unknown_path", 405: "wrong_method"}.get(error.status_code, "bad_request")
        message = f"{error.detail}; expected a request that the documentation names; correct it"
        return ServiceError(error.status_code, message, code=code).response()

    @app.exception_handler(Exception)
    async def fault(_: Request, error: Exception) -> JSONResponse:
        return internal_error().response()  # Starlette logs the traceback


def _of_fields(error: RequestValidationError) -> ServiceError:
    """Return the first problems of a body; its values are not repeated, they may be huge."""
    problems = []
    for problem in error.errors()[:_SHOWN_PROBLEMS]:
        place = ".".join(str(part) for part in problem["loc"][1:][:4]) or "body"
        text = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "json_invalid":
            place, text = "body", f"no JSON ({text} at character {place}); correct it"
        if problem["type"] == "model_attributes_type":
            text = "no JSON object; expected one, and the header Content-Type: application/json"
        if problem["type"] == "extra_forbidden":
            text = "unknown field; expected only those of the documentation; remove it"
        problems.append((place, f"{place}: {text}"))
    rest = len(error.errors()) - len(problems)
    message = "; ".join(text for _, text in problems) + (f"; and {rest} more" if rest else "")
    return ServiceError(400, message, code="bad_request", param=problems[0][0])
