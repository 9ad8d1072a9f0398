"""The app on a socket: uvicorn, with a time limit for clients that say nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from twn_rl.serving.settings import ServeSettings

logger = logging.getLogger(__name__)

_KEEP_ALIVE_SECONDS = 5
_SWITCH_SECONDS = 0.0005


def quiet_protocol(seconds: float) -> type[H11Protocol]:
    """Return uvicorn's protocol, which closes a connection whose first request does not begin."""

    class QuietProtocol(H11Protocol):
        """HTTP that waits for the headers of a first request for so many seconds only."""

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._first = self.loop.call_later(seconds, self._close_if_silent)

        def connection_lost(self, exc: Exception | None) -> None:
            self._first.cancel()
            super().connection_lost(exc)

        def _close_if_silent(self) -> None:
            if self.cycle is None:
                self.transport.close()

    return QuietProtocol


class Server(uvicorn.Server):
    """uvicorn's server, which ends by returning: its own kills the process with the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Let SIGINT and SIGTERM end the server in the body."""
        is_main = threading.current_thread() is threading.main_thread()
        kinds = (signal.SIGINT, signal.SIGTERM) if is_main else ()
        before = {kind: signal.signal(kind, self.handle_exit) for kind in kinds}
        try:
            yield
        finally:
            for kind, handler in before.items():
                signal.signal(kind, handler)


def bind(settings: ServeSettings) -> socket.socket:
    """Return a socket that listens where the settings say.

    Raises:
        OSError: If the address is taken or is not this machine's.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # With the protocol named asyncio turns Nagle's algorithm off; else each answer's body would
    # wait about 40 ms for the client to acknowledge its headers.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise OSError(
            error.errno,
            f"{settings.host}:{settings.port} cannot be listened on ({error.strerror}); expected a "
            "free port of an address of this machine; choose another --port or --host",
        ) from error
    return listener


def make_server(app: FastAPI, settings: ServeSettings) -> Server:
    """Return the server of an app, for `run_server`; `should_exit = True` ends it."""
    config = uvicorn.Config(
        app,
        http=quiet_protocol(settings.body_seconds),
        ws="none",
        loop="asyncio",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_keep_alive=_KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=int(settings.drain_seconds) or 1,
    )
    return Server(config)


def run_server(server: Server, listener: socket.socket) -> None:
    """Answer requests until SIGINT or SIGTERM, then finish what is in work and return."""
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    logger.info("serving at http://%s:%d", shown, port)
    # The engine's thread is busy in Python; by default it hands over to the network's every 5 ms.
    sys.setswitchinterval(_SWITCH_SECONDS)
    asyncio.run(server.serve(sockets=[listener]))
