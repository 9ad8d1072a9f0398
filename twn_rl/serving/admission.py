"""How much may be in work at a time: inputs, bytes and pixels are counted before work starts."""

from __future__ import annotations

import threading

from twn_rl.serving.errors import ServiceError
from twn_rl.serving.settings import ServeSettings

_RETRY_SECONDS = 1


class Admission:
    """What is in work, against its limits; any thread may ask.

    Attributes:
        inputs: Inputs in work or waiting.
        pixels: Pixels of their pictures.
        body_bytes: Bodies of requests in work or arriving.
    """

    def __init__(self, settings: ServeSettings) -> None:
        """Start with nothing in work."""
        self.settings = settings
        self.inputs = self.pixels = self.body_bytes = 0
        self._lock = threading.Lock()

    def take_inputs(self, count: int) -> None:
        """Take places in the queue.

        Raises:
            ServiceError: 429 if there are too few.
        """
        with self._lock:
            self._check(self.inputs + count, self.settings.max_queue, "inputs", "queue_full")
            self.inputs += count

    def take_pixels(self, count: int) -> None:
        """Take memory for pictures.

        Raises:
            ServiceError: 429 if there is too little.
        """
        with self._lock:
            limit = self.settings.max_pending_pixels
            # One request by itself may always have its pictures: its limits are checked elsewhere.
            if self.pixels:
                self._check(self.pixels + count, limit, "pixels of pictures", "pictures_full")
            self.pixels += count

    def take_bytes(self, count: int) -> None:
        """Take memory for a part of a body.

        Raises:
            ServiceError: 429 if there is too little.
        """
        with self._lock:
            limit = self.settings.max_pending_bytes
            self._check(self.body_bytes + count, limit, "bytes of requests", "bodies_full")
            self.body_bytes += count

    def give_back(self, *, inputs: int = 0, pixels: int = 0, body_bytes: int = 0) -> None:
        """Give back what was taken."""
        with self._lock:
            self.inputs -= inputs
            self.pixels -= pixels
            self.body_bytes -= body_bytes

    def _check(self, wanted: int, limit: int, what: str, code: str) -> None:
        if wanted > limit:
            raise ServiceError(
                429,
                f"{wanted} {what} would be in work; expected at most {limit}; try again later, "
                "or send fewer at a time",
                code=code,
                retry_after=_RETRY_SECONDS,
            )
