"""Requests in, results out: what every route of the server is made of. Knows no HTTP.

A page or another route embeds through `EmbeddingService.embed`, or `stream` to watch a thought as
it is written; both check, count and give back what a request holds.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from twn_rl.data.record import Item
from twn_rl.inference.chooser import Chooser, make_chooser
from twn_rl.inference.continuous import ContinuousPass
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError, InputRules
from twn_rl.inference.job import Job
from twn_rl.inference.options import EncodeOptions, Keep, Side, ThinkMode
from twn_rl.inference.served_model import DOCUMENT_PROMPTS, QUERY_PROMPTS
from twn_rl.modeling.limits import PromptLimits
from twn_rl.serving.admission import Admission
from twn_rl.serving.engine import Engine, EngineStoppedError
from twn_rl.serving.errors import ServiceError, internal_error
from twn_rl.serving.metrics import Metrics
from twn_rl.serving.received import Received, to_item
from twn_rl.serving.settings import ServeSettings

_PARSERS = 4
_AT_ONCE_BYTES = 1 << 15  # of pictures; handing so little to another thread takes longer


@dataclass(frozen=True, kw_only=True)
class Wish:
    """How the inputs of a request are embedded.

    Attributes:
        input_type: Whose gate is asked, and with whose prompt; None is a query without a prompt.
        think: When to think; None is "auto" for queries where the model can decide, else "never".
        think_threshold: With auto, think above this probability; None is the model's.
        keep: "better" leaves out thoughts that the gate's judge finds implausible.
        max_think_tokens: Longest thought; None is the model's.
    """

    input_type: Side | None = None
    think: ThinkMode | None = None
    think_threshold: float | None = None
    keep: Keep = "thought"
    max_think_tokens: int | None = None

    @property
    def side(self) -> Side:
        """Whose gate is asked."""
        return self.input_type or "query"


@dataclass(frozen=True)
class Event:
    """What happens to one input on its way.

    Attributes:
        kind: "read" (the no-think vector and the decision are known), "token" or "done".
        job: The input, which is worked on: of "token" only what is given here is settled.
        thinks: At "read", whether it thinks.
        text: At "token", what the thought has grown by.
        think_tokens: At "token", tokens written so far.
        seconds: Since its arrival.
    """

    kind: str
    job: Job
    thinks: bool = False
    text: str = ""
    think_tokens: int = 0
    seconds: float = 0.0


class EmbeddingService:
    """One model that embeds for everybody.

    Attributes:
        embedder: The model, whose vectors and limits these are.
        settings: Limits.
        name: Name of the model.
        admission: What is in work.
        metrics: What was done.
        engine: Who does it.
    """

    def __init__(self, embedder: ThinkingEmbedder, settings: ServeSettings, *, name: str) -> None:
        """Prepare; `start` begins to work."""
        self.embedder, self.settings, self.name = embedder, settings, settings.name or name
        self.admission, self.metrics = Admission(settings), Metrics()
        self.engine = Engine(self._make_work, embedder.turn)
        self.started_at = int(time.time())
        workers = min(_PARSERS, os.cpu_count() or 1)
        self._parsers = ThreadPoolExecutor(workers, thread_name_prefix="twn-rl parser")
        for name, text, value in (
            ("twn_rl_queue_inputs", "Inputs in work", lambda: self.admission.inputs),
            ("twn_rl_queue_bytes", "Bytes of requests", lambda: self.admission.body_bytes),
            ("twn_rl_queue_pixels", "Pixels of pictures in work", lambda: self.admission.pixels),
            ("twn_rl_places_taken", "Thoughts in writing", lambda: self.engine.work.num_writing),
            ("twn_rl_places", "Thoughts written at a time", lambda: settings.places),
        ):
            self.metrics.watch(name, text, value)

    def _limits(self, max_think_tokens: int | None) -> PromptLimits:
        # Clients' texts are not for the server's log.
        return replace(self.embedder.prompt_limits(max_think_tokens), shows_texts=False)

    def _make_work(self) -> ContinuousPass:
        return ContinuousPass(
            self.embedder.model,
            self._limits,
            batch_size=self.settings.batch_size,
            places=self.settings.places,
            note_batch=self.metrics.note_batch,
        )

    def start(self) -> None:
        """Begin to work."""
        self.engine.start()

    async def stop(self) -> bool:
        """Finish what is in work and end; return whether that was done in time."""
        is_done = await asyncio.to_thread(self.engine.stop, self.settings.drain_seconds)
        self._parsers.shutdown(wait=False, cancel_futures=True)
        return is_done

    @property
    def longest_thought(self) -> int:
        """The most tokens a request may ask for."""
        return self.settings.max_think_tokens or self.embedder.model.config.max_think_tokens

    def can_decide(self, side: Side) -> bool:
        """Return whether think="auto" is known to this model."""
        try:
            make_chooser(self.embedder.model, side, EncodeOptions(think="auto"), 1)
        except ValueError:
            return False
        return True

    def mode(self, wish: Wish) -> ThinkMode:
        """Return when the inputs of a wish think."""
        default = "auto" if wish.side == "query" and self.can_decide("query") else "never"
        return wish.think or default

    def chooser(self, wish: Wish) -> Chooser:
        """Return who decides about an input.

        Raises:
            ServiceError: If the model lacks what is asked for.
        """
        longest = self.longest_thought
        if wish.max_think_tokens is not None and wish.max_think_tokens > longest:
            raise ServiceError(
                400,
                f"max_think_tokens = {wish.max_think_tokens}; expected at most {longest}; lower it",
                code="bad_request",
                param="max_think_tokens",
            )
        try:
            options = EncodeOptions(
                think=self.mode(wish), think_threshold=wish.think_threshold, keep=wish.keep
            )
            chooser = make_chooser(self.embedder.model, wish.side, options, 1)
            self.embedder.prompt_limits(wish.max_think_tokens)  # some room must be left
        except ValueError as error:
            raise ServiceError(400, str(error), code="bad_request", param="think") from error
        return chooser

    async def embed(self, inputs: Sequence[Received], wish: Wish) -> list[Job]:
        """Return the finished jobs of some inputs, in their order.

        Raises:
            ServiceError: If one of them cannot be embedded, if there is too much in work, or if
                it takes too long.
        """
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[None] = loop.create_future()
        left = len(inputs)

        def finished(job: Job) -> None:
            nonlocal left
            left -= 1
            if not left and not answer.done():
                answer.set_result(None)

        def done(job: Job) -> None:
            _call(loop, finished, job)

        jobs = await self._submit(inputs, wish, done)
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                await answer
        except TimeoutError:
            raise self._timed_out() from None
        finally:
            self._abandon(jobs)
        for received, job in zip(inputs, jobs, strict=True):
            _check(received, job)
        return jobs

    async def stream(self, received: Received, wish: Wish) -> AsyncIterator[Event]:
        """Yield what happens to one input, "done" last.

        Raises:
            ServiceError: As `embed`.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()
        tell = partial(_call, loop, events.put_nowait)
        text = _TextOf(self.embedder)
        jobs = await self._submit(
            [received],
            wish,
            lambda job: tell(Event("done", job, seconds=_seconds(job, job.done_at))),
            on_read=lambda job, thinks: tell(
                Event("read", job, thinks, seconds=_seconds(job, job.read_at))
            ),
            on_token=lambda job, ids: tell(
                Event("token", job, True, text.grown(ids), len(ids), _seconds(job, None))
            ),
        )
        deadline = loop.time() + self.settings.timeout_seconds
        try:
            while True:
                try:
                    async with asyncio.timeout_at(deadline):
                        event = await events.get()
                except TimeoutError:
                    raise self._timed_out() from None
                if event.kind == "done":
                    _check(received, event.job)
                yield event
                if event.kind == "done":
                    return
        finally:
            self._abandon(jobs)

    async def _submit(
        self,
        inputs: Sequence[Received],
        wish: Wish,
        deliver: Callable[[Job], None],
        **listeners: Any,
    ) -> list[Job]:
        """Check and count some inputs, and put them to work; what they hold is given back there."""
        if len(inputs) > self.settings.max_inputs or not inputs:
            raise ServiceError(
                413 if inputs else 400,
                f"{len(inputs)} inputs; expected 1 to {self.settings.max_inputs}; "
                + ("send several requests" if inputs else "send at least one"),
                code="too_many_inputs" if inputs else "no_input",
                param="input",
            )
        chooser, rules = self.chooser(wish), self._rules(wish)
        self.admission.take_inputs(len(inputs))
        held = [0] * len(inputs)  # pixels of each
        jobs: list[Job] = []
        try:
            loop = asyncio.get_running_loop()
            for number, received in enumerate(inputs):
                if sum(map(len, received.pictures)) <= _AT_ONCE_BYTES:
                    item = self._item(received, rules)
                else:
                    item = await loop.run_in_executor(self._parsers, self._item, received, rules)
                job = Job(item, chooser, wish.max_think_tokens, **listeners)
                self.admission.take_pixels(job.pixels)
                held[number] = job.pixels
                jobs.append(job)
            pixels = {id(job): job.pixels for job in jobs}

            def delivered(job: Job) -> None:
                self.admission.give_back(inputs=1, pixels=pixels[id(job)])
                self.metrics.note_job(job, wish.side)
                deliver(job)

            self.engine.submit(jobs, delivered)
        except BaseException as error:
            self.admission.give_back(inputs=len(inputs), pixels=sum(held))
            if isinstance(error, EngineStoppedError):
                raise ServiceError(
                    503, "the server is ending; try another one", code="ending", retry_after=5
                ) from error
            raise
        return jobs

    def _rules(self, wish: Wish) -> InputRules:
        names = {"query": QUERY_PROMPTS, "document": DOCUMENT_PROMPTS, None: ()}[wish.input_type]
        return self.embedder.input_rules(self.embedder.completed(EncodeOptions(), names).prompt)

    def _item(self, received: Received, rules: InputRules) -> Item:
        largest = self.embedder.model.config.max_image_pixels
        return to_item(received, rules, self.settings, largest)

    def _abandon(self, jobs: Sequence[Job]) -> None:
        """Free the places of jobs whose results nobody waits for any more."""
        if unfinished := [job for job in jobs if job.done_at is None]:
            self.engine.cancel(unfinished)

    def _timed_out(self) -> ServiceError:
        return ServiceError(
            503,
            f"no answer within timeout_seconds = {self.settings.timeout_seconds:g}; the server is "
            "busy; try again, or send fewer inputs or a smaller max_think_tokens",
            code="timeout",
            retry_after=1,
        )


class _TextOf:
    """The text a thought grows by at each token, its markers left out."""

    def __init__(self, embedder: ThinkingEmbedder) -> None:
        self.model = embedder.model
        self.told = ""

    def grown(self, ids: Sequence[int]) -> str:
        """Return what is new; a character that is not whole yet comes with its last token."""
        text = self.model.think(ids).text
        if text.endswith("\N{REPLACEMENT CHARACTER}") or not text.startswith(self.told):
            return ""
        new, self.told = text[len(self.told) :], text
        return new


def _seconds(job: Job, moment: float | None) -> float:
    return (moment or time.perf_counter()) - job.created_at


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *values: Any) -> None:
    """Call a function in the loop's thread; a loop that has ended has nobody who waits."""
    if not loop.is_closed():
        loop.call_soon_threadsafe(function, *values)


def _check(received: Received, job: Job) -> None:
    """Raise what a client is told of an input without a vector."""
    if job.error is None and job.state is not None:
        return
    if isinstance(job.error, InputError):
        problem = f"{received.where}: {job.error.problem}"
        raise ServiceError(400, problem, code="bad_input", param=received.where)
    raise internal_error() from job.error
