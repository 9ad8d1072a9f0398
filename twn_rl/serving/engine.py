"""One thread that works on everybody's jobs, as long as there are any. Knows no HTTP."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from twn_rl.inference.continuous import ContinuousPass
from twn_rl.inference.job import Job

logger = logging.getLogger(__name__)

Delivery = Callable[[Job], None]


class EngineStoppedError(RuntimeError):
    """Work for an engine that takes none any more."""


class Engine:
    """The thread that owns the model; jobs come from any thread, results go back by a call.

    Attributes:
        work: What the thread works on; others may look at its sizes.
    """

    def __init__(
        self, make_work: Callable[[], ContinuousPass], turn: AbstractContextManager[Any]
    ) -> None:
        """Prepare a thread that is not started yet.

        Args:
            make_work: Returns an empty pass.
            turn: Held while the model is used, see `ThinkingEmbedder`.
        """
        self.work, self.turn = make_work(), turn
        self._make_work = make_work
        # Jobs that came together, so that they are read together, and whom to tell; None wakes the
        # thread so that it looks around.
        self._incoming: queue.SimpleQueue[tuple[Sequence[Job], Delivery] | None]
        self._incoming = queue.SimpleQueue()
        self._deliveries: dict[int, tuple[Job, Delivery]] = {}
        self._is_stopping = threading.Event()
        self._gate = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="twn-rl engine", daemon=True)

    @property
    def is_alive(self) -> bool:
        """Whether jobs are worked on."""
        return self._thread.is_alive() and not self._is_stopping.is_set()

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, jobs: Sequence[Job], deliver: Delivery) -> None:
        """Take jobs in their order; `deliver` is called in the engine's thread, once for each.

        Raises:
            EngineStoppedError: If the engine has ended or is ending.
        """
        with self._gate:  # nothing comes in behind the last look of a thread that ends
            if not self.is_alive:
                raise EngineStoppedError("the engine has stopped")
            self._incoming.put((jobs, deliver))

    def cancel(self, jobs: Sequence[Job]) -> None:
        """Give up jobs: their places are free after the next token at the latest."""
        for job in jobs:
            job.is_cancelled = True
        self._incoming.put(None)

    def stop(self, seconds: float) -> bool:
        """Take no more jobs, finish what is there, and return whether that was done in time."""
        with self._gate:
            self._is_stopping.set()
        self._incoming.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        with self.work.model.session():
            self._work_on()

    def _work_on(self) -> None:
        while True:
            # Asked before it waits: what wakes it at the end may have been taken while it worked.
            if self.work.is_idle and self._incoming.empty() and self._is_stopping.is_set():
                return
            self._take_in()
            try:
                with self.turn:
                    done = self.work.step(self._take_what_came, give_out=self._give_out)
            except Exception as error:
                # A pass guards its jobs; what gets here is a fault of the pass itself.
                logger.exception("the engine lost %d jobs", len(self._deliveries))
                done = [job for job, _ in self._deliveries.values()]
                for job in done:
                    job.error = job.error or error
                self.work = self._make_work()
            self._give_out(done)

    def _give_out(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._deliver(job)

    def _take_in(self) -> None:
        """Take over what has come; wait for it if there is nothing else to do."""
        if self.work.is_idle:
            self._put(self._incoming.get())
        self._take_what_came()

    def _take_what_came(self) -> None:
        while not self._incoming.empty():
            self._put(self._incoming.get())

    def _put(self, entry: tuple[Sequence[Job], Delivery] | None) -> None:
        if entry is not None:
            jobs, deliver = entry
            self._deliveries.update((id(job), (job, deliver)) for job in jobs)
            self.work.inbox.extend(jobs)

    def _deliver(self, job: Job) -> None:
        _, deliver = self._deliveries.pop(id(job))
        try:
            deliver(job)
        except Exception:
            logger.exception("a result could not be delivered")
