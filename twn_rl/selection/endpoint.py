"""Candidates from an OpenAI-compatible chat endpoint; knows no adapters and no evaluator.

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
from dataclasses import asdict, dataclass
from typing import Any

import httpx2

from twn_rl.images import ImageSource, open_image
from twn_rl.records import Record
from twn_rl.selection.candidates import Candidate, problem_of
from twn_rl.selection.shards import SelectionError
from twn_rl.templates import Renderer, parse_think

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


@dataclass(frozen=True)
class EndpointSettings:
    """Which endpoint, and how it is asked.

    Attributes:
        url: Base address, such as `http://localhost:8000/v1`; `/chat/completions` is added.
        model: Name of the model there.
        num_thoughts: CoTs a record, one request each.
        temperature: Of sampling.
        max_tokens: Longest answer.
        timeout_seconds: Longest wait for one answer.
        retries: Further tries after a time-out, a broken connection, junk or a busy server.
        backoff_seconds: Wait before the first further try; doubles each time.
        max_failures_in_a_row: So many records without an answer stop the pass.
        parallel: Requests at a time.
        prompt: What follows the query's own text and pictures.
        api_key_variable: Environment variable that holds the key; none is sent if it is unset.
    """

    url: str
    model: str
    num_thoughts: int = 1
    temperature: float = 1.0
    max_tokens: int = 512
    timeout_seconds: float = 60.0
    retries: int = 4
    backoff_seconds: float = 1.0
    max_failures_in_a_row: int = 16
    parallel: int = 8
    prompt: str = PROMPT
    api_key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = []
        if not self.url.startswith(("http://", "https://")):
            problems.append(f"url = {self.url!r}, expected http:// or https://")
        if not self.model:
            problems.append("model is empty, expected the endpoint's name of a model")
        for name in ("num_thoughts", "max_tokens", "max_failures_in_a_row", "parallel"):
            if getattr(self, name) < 1:
                problems.append(f"{name} = {getattr(self, name)}, expected >= 1")
        if self.retries < 0 or self.backoff_seconds < 0 or not self.timeout_seconds > 0:
            problems.append(
                f"retries = {self.retries}, backoff_seconds = {self.backoff_seconds}, "
                f"timeout_seconds = {self.timeout_seconds}, expected >= 0, >= 0 and > 0"
            )
        if problems:
            raise ValueError("EndpointSettings: " + "; ".join(problems) + "; change these fields")


class EndpointWriter:
    """CoTs of a model behind an endpoint; what fails for good is a candidate with a problem.

    Attributes:
        num_retries: Tries after the first one, so far.
    """

    name = "endpoint"
    shard_size = 16

    def __init__(self, settings: EndpointSettings, renderer: Renderer) -> None:
        self.settings, self.renderer = settings, renderer
        shapes_answers = ("url", "model", "num_thoughts", "temperature", "max_tokens", "prompt")
        described = asdict(settings)
        self.plan: dict[str, Any] = {name: described[name] for name in shapes_answers}
        self.num_retries = 0
        self._failures_in_a_row = 0
        self._lock = threading.Lock()

    def write(self, records: Sequence[Record]) -> list[list[Candidate]]:
        """Return the candidates of each record.

        Raises:
            SelectionError: If the endpoint refuses for reasons that concern every request, or does
                not answer many records in a row.
        """
        key = os.environ.get(self.settings.api_key_variable)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        jobs = [record for record in records for _ in range(self.settings.num_thoughts)]
        with (
            httpx2.Client(timeout=self.settings.timeout_seconds, headers=headers) as client,
            ThreadPoolExecutor(self.settings.parallel) as pool,
        ):
            try:
                answers = list(pool.map(lambda record: self._candidate(client, record), jobs))
            except SelectionError:
                pool.shutdown(cancel_futures=True)
                raise
        count = self.settings.num_thoughts
        return [answers[start : start + count] for start in range(0, len(answers), count)]

    def _candidate(self, client: httpx2.Client, record: Record) -> Candidate:
        source = f"{self.name}:{self.settings.model}"
        problem, detail = "junk", ""
        for attempt in range(1 + self.settings.retries):
            if attempt:
                with self._lock:
                    self.num_retries += 1
                pause = self.settings.backoff_seconds * 2 ** (attempt - 1)
                time.sleep(min(pause, _BACKOFF_CAP_SECONDS))
            try:
                response = client.post(self._address(), json=self._request(record))
            except httpx2.TimeoutException as error:
                problem, detail = "timeout", repr(error)
                continue
            except httpx2.TransportError as error:
                problem, detail = "refused", repr(error)
                continue
            detail = f"status {response.status_code}: {response.text[:200]!r}"
            if response.status_code in _ABOUT_THE_REQUEST:
                problem = "refused"
                break
            if response.status_code in _RETRIED:
                problem = "refused"
                continue
            if response.status_code != 200:
                raise SelectionError(
                    f"endpoint {self._address()} answered {detail}; expected status 200; check "
                    f"url, model and the key in {self.settings.api_key_variable}"
                )
            candidate = self._parse(response, source)
            if candidate is not None:
                with self._lock:
                    self._failures_in_a_row = 0
                return candidate
            problem = "junk"
        self._count_failure(record, problem, detail)
        return Candidate("", source, problem)

    def _count_failure(self, record: Record, problem: str, detail: str) -> None:
        with self._lock:
            self._failures_in_a_row += 1
            failures = self._failures_in_a_row
        logger.warning("record %s: no CoT from the endpoint (%s): %s", record.id, problem, detail)
        if failures >= self.settings.max_failures_in_a_row:
            raise SelectionError(
                f"endpoint {self._address()} failed {failures} records in a row, last {problem}: "
                f"{detail}; expected chat completions; check the server, then run the same command "
                "again: finished shards are kept"
            )

    def _address(self) -> str:
        return self.settings.url.rstrip("/") + "/chat/completions"

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
        messages[-1]["content"].append({"type": "text", "text": self.settings.prompt})
        return {
            "model": self.settings.model,
            "messages": messages,
            "temperature": self.settings.temperature,
            "max_tokens": self.settings.max_tokens,
        }

    def _parse(self, response: httpx2.Response, source: str) -> Candidate | None:
        """Return the candidate of an answer, or None for junk."""
        try:
            choice = response.json()["choices"][0]
            text = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError):
            return None
        if not isinstance(text, str):
            return None
        if choice.get("finish_reason") == "length":
            return Candidate(text.strip(), source, "truncated")
        if self.renderer.think_open in text:
            think = parse_think(text, self.renderer)
            return Candidate(think.text, source, think.problem)
        return Candidate(text.strip(), source, problem_of(text, self.renderer))


def data_url(image: ImageSource) -> str:
    """Return a picture, loaded as every other one, as a PNG data URL."""
    buffer = io.BytesIO()
    open_image(image).save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
