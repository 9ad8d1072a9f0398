"""What a server may be told: where it listens, what one request may hold, how much may wait."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from twn_rl.runtime.problems import Problems

_MIB = 1 << 20


@dataclass(frozen=True)
class ServeSettings:
    """Settings of a server.

    Attributes:
        host: Address to listen on; other machines reach it only if this is not a loopback one.
        port: Port to listen on; 0 takes a free one.
        name: Name of the model in requests and replies; None is the name of its folder.
        api_key: What clients must send as a bearer token; None asks for none.
        is_open: Allow an address that other machines reach without an API key.
        allowed_hosts: Names by which clients may call the server, against pages that rebind a
            name to this address; () is the loopback names, or any if it listens elsewhere.
        batch_size: Inputs read at a time.
        places: Thoughts written at a time.
        max_body_mib: Largest request body in MiB.
        max_pending_mib: Bodies of all requests in work or arriving, in MiB.
        max_inputs: Inputs of one request.
        max_text_characters: Text and instruction of one input, in characters.
        max_pictures: Pictures of one input.
        max_picture_pixels: Pixels of one picture, before it is scaled to the model's limit.
        max_pending_pixels: Pixels of all pictures in work, after they are scaled.
        max_think_tokens: Longest thought a request may ask for; None is the model's.
        max_queue: Inputs in work or waiting.
        max_connections: Open connections.
        timeout_seconds: Longest wait for an answer.
        body_seconds: Longest wait for a request to arrive whole.
        drain_seconds: Longest wait for what is in work when the server is to end.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    name: str | None = None
    api_key: str | None = None
    is_open: bool = False
    allowed_hosts: tuple[str, ...] = ()
    batch_size: int = 32
    places: int = 32
    max_body_mib: float = 32.0
    max_pending_mib: float = 256.0
    max_inputs: int = 256
    max_text_characters: int = 100_000
    max_pictures: int = 16
    max_picture_pixels: int = 50_000_000
    max_pending_pixels: int = 200_000_000
    max_think_tokens: int | None = None
    max_queue: int = 1024
    max_connections: int = 512
    timeout_seconds: float = 60.0
    body_seconds: float = 20.0
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        """Collect every problem of the settings into one error."""
        problems = Problems()
        problems.expect(self, "in [0, 65535]", "port")
        problems.expect(
            self, ">= 1", "batch_size", "places", "max_inputs", "max_text_characters",
            "max_picture_pixels", "max_pending_pixels", "max_queue", "max_connections",
        )  # fmt: skip
        problems.expect(self, ">= 0", "max_pictures")
        problems.expect(self, "None or >= 1", "max_think_tokens")
        problems.expect(
            self, "> 0", "max_body_mib", "max_pending_mib", "timeout_seconds", "body_seconds",
            "drain_seconds",
        )  # fmt: skip
        problems.unless(
            self.max_inputs <= self.max_queue,
            f"max_inputs = {self.max_inputs}, expected at most max_queue = {self.max_queue}",
        )
        problems.unless(
            self.max_body_mib <= self.max_pending_mib,
            f"max_body_mib = {self.max_body_mib}, expected at most max_pending_mib = "
            f"{self.max_pending_mib}",
        )
        problems.unless(self.api_key != "", "api_key is empty, expected a secret or none")
        problems.unless(
            self.is_loopback or self.api_key or self.is_open,
            f"host = {self.host!r} is reached by other machines, expected an api_key, or is_open "
            "to let anybody in",
        )
        problems.refuse("ServeSettings", "change these settings")

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def max_body_bytes(self) -> int:
        """Largest request body in bytes."""
        return int(self.max_body_mib * _MIB)

    @property
    def max_pending_bytes(self) -> int:
        """Bodies of all requests in bytes."""
        return int(self.max_pending_mib * _MIB)

    @property
    def host_names(self) -> tuple[str, ...]:
        """Names by which clients may call; ("*",) is any."""
        if self.allowed_hosts:
            return self.allowed_hosts
        return ("127.0.0.1", "localhost", "::1", self.host) if self.is_loopback else ("*",)
