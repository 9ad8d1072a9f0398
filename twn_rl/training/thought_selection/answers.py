"""One HTTP answer within a total time and a size, whatever the server does; knows no chat."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from twn_rl.runtime.extras import extra

with extra("train"):
    import httpx2

MAX_ANSWER_BYTES = 8 * 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """A whole answer.

    Attributes:
        status: Of HTTP.
        headers: Names are looked up in any case.
        content: Body, decompressed.
    """

    status: int
    headers: Mapping[str, str]
    content: bytes


class _Watch:
    """Ends the connection of a request at its deadline: a read that waits for a byte returns."""

    def __init__(self, seconds: float) -> None:
        self._ends, self.is_over = time.monotonic() + seconds, False
        self._socket: socket.socket | None = None
        self._timer = threading.Timer(seconds, self._end)
        self._timer.daemon = True

    def note(self, event: str, info: Mapping[str, Any]) -> None:
        """Take over the socket of a connection when it is made; httpcore's `trace` extension."""
        if event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            self._socket = info["return_value"].get_extra_info("socket")
            if time.monotonic() >= self._ends:
                self._end()

    def _end(self) -> None:
        self.is_over = True
        if self._socket is not None:
            # Not the method of a TLS socket, which another thread may be reading from.
            with suppress(OSError):  # closed by now
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)

    def __enter__(self) -> _Watch:
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()


def new_client(headers: Mapping[str, str], timeout_seconds: float) -> httpx2.Client:
    """Return a client whose requests have connections of their own, so that each can be ended."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.Client(timeout=timeout_seconds, headers=dict(headers), limits=limits)


def post(client: httpx2.Client, url: str, payload: Any, *, seconds: float) -> Answer:
    """Return the answer to a JSON request; a server that sends byte after byte gains no time.

    Args:
        client: From `new_client`.
        url: Where to.
        payload: JSON-ready.
        seconds: Longest time from the first byte sent to the last byte read.

    Raises:
        httpx2.TimeoutException: If the time is over.
        httpx2.TransportError: For a connection that breaks.
        ValueError: For an answer of more than `MAX_ANSWER_BYTES`.
    """
    with _Watch(seconds) as watch:
        try:
            extensions = {"trace": watch.note}
            with client.stream("POST", url, json=payload, extensions=extensions) as response:
                content = bytearray()
                for block in response.iter_bytes():
                    content += block
                    if len(content) > MAX_ANSWER_BYTES:
                        raise ValueError(
                            f"answer has more than {MAX_ANSWER_BYTES} bytes; expected a thought; "
                            "ask for fewer tokens"
                        )
                return Answer(response.status_code, response.headers, bytes(content))
        except httpx2.TransportError as error:
            if watch.is_over:
                raise httpx2.ReadTimeout(f"no whole answer within {seconds:g} seconds") from error
            raise
