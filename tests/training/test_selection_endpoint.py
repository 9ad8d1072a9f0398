"""The endpoint writer against a real local server: slow, broken, busy, refusing and good."""

import base64
import io
import json
import socket
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import pytest
from endpoint_server import RECORDS, chat, number, serving, writer
from made_records import picture
from PIL import Image

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item, Record
from twn_rl.training.thought_selection.answers import MAX_ANSWER_BYTES
from twn_rl.training.thought_selection.drafts import RecordRows, SelectionError, collect_drafts
from twn_rl.training.thought_selection.endpoint import EndpointSettings, EndpointWriter


def test_thoughts_come_back_in_the_order_of_records_with_and_without_markers() -> None:
    def answer(body: dict[str, Any], asked: int) -> tuple[int, str]:
        time.sleep(0.02 * (5 - number(body)))  # the last question is answered first
        text = f"thought {number(body)}"
        return chat(f"<think> {text} </think> ok" if number(body) % 2 else f" {text}\n")

    with serving(answer) as server:
        asked = writer(server, thoughts=2)
        written = asked.write(RECORDS)
    assert [[c.cot for c in row] for row in written] == [[f"thought {n}"] * 2 for n in range(5)]
    assert {c.source for row in written for c in row} == {"endpoint:m"}
    assert all(c.problem is None for row in written for c in row)
    assert asked.num_retries == 0
    path, _, body = server.requests[0]
    assert path == "/v1/chat/completions"
    assert (body["model"], body["temperature"], body["max_tokens"]) == ("m", 1.0, 512)


def test_pictures_travel_as_data_urls_and_the_key_as_a_header(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    shown = picture(3)
    item = Item(instruction="find it", images=(shown,), video=(picture(4), picture(5)))
    record = Record(id="r", source="t", query=item, positive=Item(text="camel"))
    with serving(lambda body, asked: chat("a thought")) as server:
        writer(server, key_variable="MY_KEY").write([record])
    _, headers, body = server.requests[0]
    assert headers["Authorization"] == "Bearer secret"
    parts = body["messages"][0]["content"]
    assert [part["type"] for part in parts] == ["image_url"] * 3 + ["text"] * 2
    head, _, encoded = parts[0]["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    with Image.open(io.BytesIO(base64.b64decode(encoded))) as sent:
        assert sent.convert("RGB").tobytes() == shown.tobytes()


@pytest.mark.parametrize(
    "bad",
    [
        (200, "no json"),
        (200, "[]"),
        (200, '{"choices": []}'),
        (200, '{"choices": [{"message": {"content": null}}]}'),
        (503, "busy"),
        (429, "slow down"),
    ],
)
def test_junk_and_a_busy_server_are_asked_again(bad: tuple[int, str]) -> None:
    with serving(lambda body, asked: bad if asked < 2 else chat("at last")) as server:
        asked = writer(server)
        [[draft]] = asked.write(RECORDS[:1])
    assert (draft.cot, draft.problem) == ("at last", None)
    assert asked.num_retries == 2
    assert len(server.requests) == 3


def test_a_time_out_is_retried_and_counted_in_the_end() -> None:
    stop = threading.Event()

    def answer(body: dict[str, Any], asked: int) -> tuple[int, str]:
        if number(body) == 1:
            stop.wait(5)
        return chat("quick")

    with serving(answer) as server:
        asked = writer(server, timeout_seconds=0.5, retries=1)
        written = asked.write(RECORDS[:3])
        stop.set()
    assert [row[0].problem for row in written] == [None, "timeout", None]
    assert asked.num_retries == 1


@pytest.mark.parametrize(
    ("text", "finish_reason", "problem"),
    [
        ("cut sho", "length", "truncated"),
        ("  ", "stop", "empty"),
        ("a </think> b", "stop", "marker"),
        ("<think> open", "stop", "truncated"),
    ],
)
def test_unusable_thoughts_are_kept_with_their_problem(
    text: str, finish_reason: str, problem: str
) -> None:
    with serving(lambda body, asked: chat(text, finish_reason)) as server:
        [[draft]] = writer(server).write(RECORDS[:1])
    assert draft.problem == problem
    assert len(server.requests) == 1, "an answer is an answer"


def test_a_request_that_is_refused_is_not_asked_again() -> None:
    def answer(body: dict[str, Any], asked: int) -> tuple[int, str]:
        return (400, "picture too large") if number(body) == 0 else chat("fine")

    with serving(answer) as server:
        written = writer(server).write(RECORDS[:2])
    assert [row[0].problem for row in written] == ["refused", None]
    assert len(server.requests) == 2


def test_a_wrong_key_stops_the_pass_at_once() -> None:
    with (
        serving(lambda body, asked: (401, "who are you")) as server,
        pytest.raises(SelectionError, match=r"401.*who are you.*OPENAI_API_KEY"),
    ):
        writer(server, parallel=1).write(RECORDS)
    assert len(server.requests) < len(RECORDS)


def test_a_dead_endpoint_stops_the_pass_and_finished_shards_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_up = threading.Event()

    def answer(body: dict[str, Any], asked: int) -> tuple[int, str]:
        known = is_up.is_set() or number(body) < 2
        return chat(f"thought {number(body)}") if known else (503, "down")

    monkeypatch.setattr(EndpointWriter, "shard_size", 2)
    ids = [record.id for record in RECORDS]
    with serving(answer) as server:

        def collect() -> RecordRows:
            asked = writer(server, retries=0, max_failures=2, parallel=1)
            return collect_drafts(asked, RECORDS, ids, tmp_path, show_progress_bar=False)

        with pytest.raises(SelectionError, match=r"2 records in a row.*finished shards are kept"):
            collect()
        seen = len(server.requests)
        is_up.set()
        rows = collect()
        assert len(server.requests) - seen == 3, "the first two records were not asked again"
    cots = [row["drafts"][0]["cot"] for row in rows]
    assert cots == [f"thought {n}" for n in range(5)]


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_busy_server_says_how_long_to_wait(form: str) -> None:
    def headers() -> dict[str, str]:
        when = datetime.now(UTC) + timedelta(seconds=3)
        return {"Retry-After": "1" if form == "seconds" else format_datetime(when, usegmt=True)}

    def answer(body: dict[str, Any], asked: int) -> tuple[int, str]:
        return (429, "slow down") if asked == 0 else chat("at last")

    with serving(answer, headers) as server:
        began = time.monotonic()
        [[draft]] = writer(server).write(RECORDS[:1])
    assert draft.cot == "at last"
    assert 1 <= time.monotonic() - began < 4


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_server_that_sends_byte_after_byte_gains_no_time(part: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def drip() -> None:
        connection, _ = listener.accept()
        with connection:
            connection.recv(1 << 16)
            head = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n"
            connection.sendall(head + (b"\r\n" if part == "body" else b"X: "))
            try:
                while True:
                    connection.sendall(b" ")
                    time.sleep(0.02)
            except OSError:
                pass  # the client has gone

    thread = threading.Thread(target=drip)
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    settings = EndpointSettings(
        endpoint_url=address,
        endpoint_model="m",
        endpoint_timeout_seconds=0.3,
        endpoint_retries=0,
    )
    began = time.monotonic()
    with listener:
        [[draft]] = EndpointWriter(settings, Renderer()).write(RECORDS[:1])
    thread.join()
    assert draft.problem == "timeout"
    assert time.monotonic() - began < 3


def test_what_a_thought_must_not_hold_is_found_in_answers() -> None:
    texts = ["a <image> b", "a\x00b", "<think> a <|im_end|> </think>", "the </think> camel", "fine"]
    bodies = [json.loads(chat(text)[1]) for text in texts]
    answers = [json.dumps(body) for body in bodies]
    answers[1] = answers[1].replace("\\u0000", "\\ud800")
    with serving(lambda body, asked: (200, answers[number(body)])) as server:
        written = writer(server, retries=0).write(RECORDS)
    assert [row[0].problem for row in written] == ["marker", "junk", "marker", "marker", None]
    with serving(lambda body, asked: chat(texts[1])) as server:
        [[draft]] = writer(server, retries=0).write(RECORDS[:1])
    assert (draft.cot, draft.problem) == ("a b", "character")


def test_an_answer_without_end_is_junk() -> None:
    with serving(lambda body, asked: (200, " " * (MAX_ANSWER_BYTES + 1))) as server:
        [[draft]] = writer(server, retries=0).write(RECORDS[:1])
    assert draft.problem == "junk"


def test_settings_that_cannot_work_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"url = 'ftp://x'.*model is empty.*parallel = 0") as error:
        EndpointSettings(endpoint_url="ftp://x", endpoint_parallel=0, endpoint_timeout_seconds=0)
    assert "timeout_seconds = 0" in str(error.value)
    assert EndpointSettings(endpoint_parallel=0).endpoint_url is None, "nothing is asked"
