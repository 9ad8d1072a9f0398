"""Drafts from an OpenAI-compatible chat endpoint; knows no adapters and no evaluator.

The only room that talks to a network, to the one address it is given; redirects are not followed.
"""

from __future__ import annotations

import base64
import io
import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any

from twn_rl.data.chat import Renderer, parse_think
from twn_rl.data.images import ImageSource, open_image
from twn_rl.data.jsonl import parse_json
from twn_rl.data.markup import KNOWN_MARKUP, Markup, without_unusable
from twn_rl.data.record import Record, RecordError
from twn_rl.runtime.extras import extra
from twn_rl.runtime.problems import Problems
from twn_rl.training.thought_selection.answers import Answer, new_client, post
from twn_rl.training.thought_selection.drafts import Draft, SelectionError, problem_of

with extra("train"):
    import httpx2

logger = logging.getLogger(__name__)

PROMPT = (
    "Think about what the input above shows and what it asks for, step by step and in a few short "
    "sentences, so that the matching item can be found by your reasoning. Write the reasoning only."
)
FAILURES = ("timeout", "junk", "refused")
# Answers that another try may change; other refusals are about the request or the settings.
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_ABOUT_THE_REQUEST = (400, 413, 415, 422)
_BACKOFF_CAP_SECONDS = 60.0
_ASKED_PAUSE_CAP_SECONDS = 600.0


@dataclass(frozen=True)
class EndpointSettings:
    """Which endpoint, if any, and how it is asked; a recipe's flags have the same names."""

    endpoint_url: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible endpoint that writes drafts, such as "
            "http://localhost:8000/v1; /chat/completions is added."
        },
    )
    endpoint_model: str = field(default="", metadata={"help": "Name of the model there."})
    endpoint_thoughts: int = field(
        default=1, metadata={"help": "Drafts a record from there, one request each."}
    )
    endpoint_temperature: float = field(default=1.0, metadata={"help": "Of its sampling."})
    endpoint_max_tokens: int = field(default=512, metadata={"help": "Its longest answer."})
    endpoint_timeout_seconds: float = field(
        default=60.0, metadata={"help": "Longest time for one answer, from first to last byte."}
    )
    endpoint_retries: int = field(
        default=4,
        metadata={
            "help": "Further tries after a time-out, a broken connection, junk or a busy server."
        },
    )
    endpoint_backoff_seconds: float = field(
        default=1.0,
        metadata={
            "help": "Wait before the first further try; doubles, and is what the server asks."
        },
    )
    endpoint_max_failures: int = field(
        default=16, metadata={"help": "So many records without an answer in a row end the pass."}
    )
    endpoint_parallel: int = field(default=8, metadata={"help": "Requests at a time."})
    endpoint_prompt: str = field(
        default=PROMPT, metadata={"help": "What follows the query's own text and pictures."}
    )
    endpoint_key_variable: str = field(
        default="OPENAI_API_KEY",
        metadata={"help": "Environment variable of the key; none is sent if it is unset."},
    )

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        if self.endpoint_url is None:
            return
        problems = Problems()
        problems.unless(
            self.endpoint_url.startswith(("http://", "https://")),
            f"endpoint_url = {self.endpoint_url!r}, expected http:// or https://",
        )
        problems.unless(
            self.endpoint_model, "endpoint_model is empty, expected the endpoint's name of a model"
        )
        positive = ("thoughts", "max_tokens", "max_failures", "parallel")
        problems.expect(self, ">= 1", *(f"endpoint_{name}" for name in positive))
        problems.expect(self, ">= 0", "endpoint_retries", "endpoint_backoff_seconds")
        problems.expect(self, "> 0", "endpoint_timeout_seconds")
        problems.refuse("EndpointSettings")


@dataclass(frozen=True)
class _Failure:
    """Why a request brought no draft: one of `FAILURES`, in words, and whether to ask again."""

    problem: str
    detail: str
    is_final: bool = False
    asked_pause_seconds: float = 0.0


class EndpointWriter:
    """CoTs of a model behind an endpoint; what fails for good is a draft with a problem.

    Attributes:
        num_retries: Tries after the first one, so far.
    """

    name = "endpoint"
    shard_size = 16

    def __init__(
        self, settings: EndpointSettings, renderer: Renderer, markup: Markup = KNOWN_MARKUP
    ) -> None:
        self.settings, self.renderer, self.markup = settings, renderer, markup
        shapes_answers = ("url", "model", "thoughts", "temperature", "max_tokens", "prompt")
        described = asdict(settings)
        self.plan: dict[str, Any] = {n: described[f"endpoint_{n}"] for n in shapes_answers}
        self._source = f"{self.name}:{settings.endpoint_model}"
        self.num_retries = 0
        self._failures_in_a_row = 0
        self._lock = threading.Lock()

    def write(self, records: Sequence[Record]) -> list[list[Draft]]:
        """Return the drafts about each record.

        Raises:
            SelectionError: If the endpoint refuses for reasons that concern every request, or does
                not answer many records in a row.
        """
        asked = self.settings
        key = os.environ.get(asked.endpoint_key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        jobs = [record for record in records for _ in range(asked.endpoint_thoughts)]
        with (
            new_client(headers, asked.endpoint_timeout_seconds) as client,
            ThreadPoolExecutor(asked.endpoint_parallel) as pool,
        ):
            try:
                answers = list(pool.map(lambda record: self._draft(client, record), jobs))
            except SelectionError:
                pool.shutdown(cancel_futures=True)
                raise
        count = asked.endpoint_thoughts
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _draft(self, client: httpx2.Client, record: Record) -> Draft:
        """Ask until there is a draft, an answer that will not change, or no try left."""
        answer = self._ask(client, record)
        for attempt in range(self.settings.endpoint_retries):
            if isinstance(answer, Draft) or answer.is_final:
                break
            with self._lock:
                self.num_retries += 1
            pause = min(self.settings.endpoint_backoff_seconds * 2**attempt, _BACKOFF_CAP_SECONDS)
            asked = min(answer.asked_pause_seconds, _ASKED_PAUSE_CAP_SECONDS)
            time.sleep(max(pause, asked))
            answer = self._ask(client, record)
        if isinstance(answer, _Failure):
            self._count_failure(record, answer)
            return Draft("", self._source, answer.problem)
        with self._lock:
            self._failures_in_a_row = 0
        return answer

    def _ask(self, client: httpx2.Client, record: Record) -> Draft | _Failure:
        try:
            seconds = self.settings.endpoint_timeout_seconds
            answer = post(client, self._address(), self._request(record), seconds=seconds)
        except httpx2.TimeoutException as error:
            return _Failure("timeout", repr(error))
        except httpx2.TransportError as error:
            return _Failure("refused", repr(error))
        except (ValueError, httpx2.DecodingError) as error:
            return _Failure("junk", str(error))
        detail = f"status {answer.status}: {answer.content[:200].decode(errors='replace')!r}"
        if answer.status == 200:
            return self._parse(answer) or _Failure("junk", detail)
        if answer.status in _RETRIED:
            return _Failure("refused", detail, asked_pause_seconds=asked_pause(answer))
        if answer.status in _ABOUT_THE_REQUEST:
            return _Failure("refused", detail, is_final=True)
        raise SelectionError(
            f"endpoint {self._address()} answered {detail}; expected status 200; check "
            "endpoint_url, endpoint_model and the key in "
            f"{self.settings.endpoint_key_variable}"
        )

    def _count_failure(self, record: Record, failure: _Failure) -> None:
        with self._lock:
            self._failures_in_a_row += 1
            failures = self._failures_in_a_row
        found = f"{failure.problem}: {failure.detail}"
        logger.warning("record %s: no CoT from the endpoint: %s", record.id, found)
        if failures >= self.settings.endpoint_max_failures:
            raise SelectionError(
                f"endpoint {self._address()} failed {failures} records in a row, last {found}; "
                "expected chat completions; check the server, then run the same command again: "
                "finished shards are kept"
            )

    def _address(self) -> str:
        return str(self.settings.endpoint_url).rstrip("/") + "/chat/completions"

    def _request(self, record: Record) -> dict[str, Any]:
        pictures = iter(self.renderer.images(record.query))
        messages: list[dict[str, Any]] = self.renderer.messages(record.query)
        for message in messages:
            message["content"] = [
                {"type": "image_url", "image_url": {"url": data_url(next(pictures))}}
                if part["type"] == "image"
                else part
                for part in message["content"]
            ]
        messages[-1]["content"].append({"type": "text", "text": self.settings.endpoint_prompt})
        return {
            "model": self.settings.endpoint_model,
            "messages": messages,
            "temperature": self.settings.endpoint_temperature,
            "max_tokens": self.settings.endpoint_max_tokens,
        }

    def _parse(self, answer: Answer) -> Draft | None:
        """Return the draft of an answer, or None for junk."""
        body = parse_json(answer.content, field=None)
        try:
            if isinstance(body, RecordError):
                return None
            choice = body["choices"][0]
            text = choice["message"]["content"]
            is_cut = choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError, AttributeError):
            return None
        if not isinstance(text, str):
            return None
        problem = "truncated" if is_cut else None
        thought = text
        if self.renderer.think_open in text and not is_cut:
            think = parse_think(text, self.renderer)
            thought, problem = think.text, think.problem
        problem = problem or problem_of(thought, self.renderer, self.markup)
        return Draft(without_unusable(thought).strip(), self._source, problem)


def asked_pause(answer: Answer) -> float:
    """Return the seconds a server asks to wait (`Retry-After`, RFC 9110); 0 if it does not."""
    text = answer.headers.get("Retry-After", "").strip()
    if text.isdecimal() and text.isascii():
        return float(text)
    try:
        when = parsedate_to_datetime(text)
    except ValueError:
        return 0.0
    return (when - datetime.now(when.tzinfo)).total_seconds()


def data_url(image: ImageSource) -> str:
    """Return a picture, loaded as every other one, as a PNG data URL."""
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
