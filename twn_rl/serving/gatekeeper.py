"""What stands before every route: the key, the size and pace of a body, clients that leave."""

from __future__ import annotations

import asyncio
import contextlib
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from twn_rl.serving.admission import Admission
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.metrics import Metrics
from twn_rl.serving.settings import ServeSettings

OPEN_PATHS = ("/health",)  # so that whoever watches the server needs no key


class Gatekeeper:
    """ASGI middleware: a body is read whole, within limits, before anything else happens.

    The work on a request ends when its client leaves: the route is cancelled, whatever it does.
    """

    def __init__(
        self, app: ASGIApp, settings: ServeSettings, admission: Admission, metrics: Metrics
    ) -> None:
        """Stand before `app`."""
        self.app, self.settings = app, settings
        self.admission, self.metrics = admission, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status = 499  # the client left before an answer began

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        held = [0]
        try:
            self._check_key(scope)
            body = await self._body(scope, receive, held)
            if body is not None:
                await self._answer(scope, body, receive, counted)
        except ServiceError as error:
            response = error.response()
            # What is left of the body is not read, however long it goes on.
            response.headers["Connection"] = "close"
            await response(scope, receive, counted)
        finally:
            self.admission.give_back(body_bytes=held[0])
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()

    def _check_key(self, scope: Scope) -> None:
        if self.settings.api_key is None or scope["path"] in OPEN_PATHS:
            return
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self.settings.api_key}".encode()):
            raise ServiceError(
                401,
                "no valid API key; expected the header Authorization: Bearer KEY; send it",
                code="invalid_api_key",
            )

    async def _body(self, scope: Scope, receive: Receive, held: list[int]) -> bytes | None:
        """Return the whole body; None if the client leaves before. `held` counts its bytes."""
        limit = self.settings.max_body_bytes
        announced = dict(scope["headers"]).get(b"content-length", b"0")
        if announced.isdigit() and int(announced) > limit:
            raise self._too_large(int(announced))
        parts: list[bytes] = []
        try:
            async with asyncio.timeout(self.settings.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        return None
                    part = message.get("body", b"")
                    self.admission.take_bytes(len(part))
                    held[0] += len(part)
                    if held[0] > limit:
                        raise self._too_large(held[0])
                    parts.append(part)
                    if not message.get("more_body", False):
                        return b"".join(parts)
        except TimeoutError:
            raise ServiceError(
                408,
                f"the body did not arrive within body_seconds = {self.settings.body_seconds:g}; "
                "expected it at once; send it faster or smaller",
                code="slow_body",
            ) from None

    def _too_large(self, size: int) -> ServiceError:
        return ServiceError(
            413,
            f"body of {size} bytes or more; expected at most {self.settings.max_body_bytes}; send "
            "fewer or smaller inputs",
            code="body_too_large",
        )

    async def _answer(self, scope: Scope, body: bytes, receive: Receive, send: Send) -> None:
        """Let the app answer, unless the client leaves before it has."""
        is_told = False

        async def replay() -> Message:
            nonlocal is_told
            if not is_told:
                is_told = True
                return {"type": "http.request", "body": body, "more_body": False}
            await asyncio.Event().wait()  # whoever listens for the client's leaving is cancelled
            raise AssertionError("unreachable")

        answer = asyncio.ensure_future(self.app(scope, replay, send))
        leaving = asyncio.ensure_future(_left(receive))
        try:
            await asyncio.wait({answer, leaving}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answer.done():
                answer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await answer


async def _left(receive: Receive) -> None:
    """Return once the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
