"""Hostile clients: nobody gets a wrong vector, nobody leaves with a place, memory stays bounded."""

import base64
import contextlib
import http.client
import io
import json
import socket
import struct
import threading
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from PIL import Image
from serving_fixtures import embedder, server, thinking_model  # noqa: F401 -- fixtures
from serving_process import TEXTS, Server, data_uri, picture_bytes

from twn_rl.inference.embedder import ThinkingEmbedder

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
NEAR = {"rtol": 0, "atol": 1e-5}
HELD = ("twn_rl_queue_inputs", "twn_rl_queue_pixels", "twn_rl_places_taken")


def post(url: str, body: Any, **settings: Any) -> httpx2.Response:
    return httpx2.post(f"{url}/v1/embeddings", json=body, **{"timeout": 60, **settings})


def plain_post(url: str, body: bytes) -> tuple[int, bytes]:
    """Return status and body of an answer; a client of httpx2 takes longer than its request."""
    line = http.client.HTTPConnection(url.removeprefix("http://"), timeout=120)
    with contextlib.closing(line):
        line.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
        reply = line.getresponse()
        return reply.status, reply.read()


def code_of(reply: httpx2.Response) -> tuple[int, str]:
    return reply.status_code, reply.json()["error"]["code"]


def connect(server: Server) -> socket.socket:
    host, port = server.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def assert_nothing_held(server: Server) -> None:
    until(lambda: not any(server.metrics()[name] for name in HELD))
    # The one body in work is that of the request for the metrics, which is empty.
    assert server.metrics()["twn_rl_queue_bytes"] == 0


def bomb(width: int, height: int) -> bytes:
    """Return a PNG of a few bytes that says it is of this size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 20))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )


def picture_request(content: bytes, kind: str = "image/png") -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": data_uri(content, kind)}}
    return {"messages": [{"role": "user", "content": [part]}]}


BODIES = {
    "empty": b"",
    "cut off": b'{"input": "a',
    "no object": b'["a"]',
    "deep": b'{"input": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "not UTF-8": b'{"input": "\xff\xfe"}',
    "half a pair": b'{"input": "\\ud800"}',
    "huge number": b'{"input": "a", "dimensions": 1' + b"0" * 5000 + b"}",
    "not a number": b'{"input": "a", "think_threshold": NaN}',
    "repeated field": b'{"input": "a", "input": 3}',
}


@pytest.mark.parametrize("name", BODIES)
def test_malformed_bodies_are_the_clients_fault(server: Server, name):
    headers = {"Content-Type": "application/json"}
    url = f"{server.url}/v1/embeddings"
    reply = httpx2.post(url, content=BODIES[name], headers=headers, timeout=60)
    assert reply.status_code == 400, reply.text
    assert len(reply.content) < 1000


def test_bombs_are_refused_before_they_are_decoded(server: Server):
    before = server.memory_mib()
    for width, height in ((30_000, 30_000), (2**31 - 1, 2**31 - 1)):
        status, _ = code_of(post(server.url, picture_request(bomb(width, height))))
        assert status in (400, 413)
    cut = picture_bytes(side=200)[:3000]
    svg = b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'
    for content, kind in ((cut, "image/png"), (svg, "image/svg+xml"), (b"", "image/png")):
        assert code_of(post(server.url, picture_request(content, kind)))[0] == 400
    many = [{"type": "image_url", "image_url": {"url": data_uri(picture_bytes(side=8))}}] * 17
    body = {"messages": [{"role": "user", "content": many}]}
    assert code_of(post(server.url, body)) == (413, "too_many_pictures")
    assert code_of(post(server.url, {"input": ["a"] * 100_000})) == (413, "too_many_inputs")
    assert server.memory_mib() < before + 200
    assert_nothing_held(server)


def test_bodies_that_are_too_large_are_not_read(server: Server):
    with connect(server) as line:
        line.sendall(b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\n")
        line.sendall(b"Content-Length: 999999999\r\n\r\n{")
        assert line.recv(100).startswith(b"HTTP/1.1 413")

    def endless():
        while True:
            yield b" " * (1 << 20)

    with contextlib.suppress(httpx2.TransportError):  # it hangs up in the middle of the body
        reply = httpx2.post(f"{server.url}/v1/embeddings", content=endless(), timeout=60)
        assert code_of(reply) == (413, "body_too_large")
    assert_nothing_held(server)


def test_slow_clients_are_hung_up_on(server: Server):
    head = b"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n"
    with connect(server) as silent, connect(server) as dripping:
        dripping.sendall(head)
        for _ in range(2):
            dripping.sendall(b" ")
            time.sleep(0.2)
        assert dripping.recv(100).startswith(b"HTTP/1.1 408")
        assert silent.recv(100) == b""
    assert_nothing_held(server)


def test_clients_that_leave_free_their_places(server: Server):
    body = json.dumps({"input": TEXTS * 8, "think": "always"}).encode()
    head = f"POST /v1/embeddings HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
    before = server.metrics()["twn_rl_cancelled_inputs_total"]
    lines = [connect(server) for _ in range(6)]
    for line in lines:
        line.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
    until(lambda: server.metrics()["twn_rl_places_taken"] > 0)
    for line in lines:
        line.close()
    assert_nothing_held(server)
    assert server.metrics()["twn_rl_cancelled_inputs_total"] > before
    stream = {"input": TEXTS[0], "think": "always", "stream": True}
    with httpx2.stream("POST", f"{server.url}/v1/embeddings", json=stream) as reply:
        next(reply.iter_lines())
    assert_nothing_held(server)


def test_pages_of_other_hosts_cannot_call(server: Server):
    headers = {"Host": "evil.example"}
    assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 400
    form = httpx2.post(f"{server.url}/v1/embeddings", content=b'{"input": "a"}')
    assert form.status_code == 400  # what a page may send without asking first


def test_a_full_server_says_when_to_come_again(thinking_model: Path, tmp_path: Path):
    limits = ["--max_queue", "8", "--max_inputs", "8", "--places", "1", "--max_body_mib", "1"]
    env = {"TWN_RL_API_KEY": "secret"}
    server = Server(thinking_model, "--device", "cpu", *limits, log=tmp_path / "log", env=env)
    key = {"Authorization": "Bearer secret"}
    try:
        assert code_of(post(server.url, {"input": "a"})) == (401, "invalid_api_key")
        wrong = {"Authorization": "Bearer secre"}
        assert code_of(post(server.url, {"input": "a"}, headers=wrong)) == (401, "invalid_api_key")
        assert httpx2.get(f"{server.url}/health").status_code == 200
        assert httpx2.get(f"{server.url}/metrics").status_code == 401
        body = {"input": TEXTS[:4], "think": "always"}
        with ThreadPoolExecutor(12) as pool:
            replies = list(pool.map(lambda _: post(server.url, body, headers=key), range(12)))
        statuses = [reply.status_code for reply in replies]
        assert set(statuses) == {200, 429}
        assert all(r.headers["retry-after"] == "1" for r in replies if r.status_code == 429)
        assert post(server.url, body, headers=key).status_code == 200
        # SIGTERM comes while thoughts are written: the answer is given, then the process ends.
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(post, server.url, {**body, "input": TEXTS}, headers=key)
            until(lambda: server.metrics("secret")["twn_rl_places_taken"] > 0)
            assert server.end() == 0
            assert len(answer.result().json()["data"]) == len(TEXTS)
    finally:
        server.end()


def test_many_requests_and_a_kill_in_between_give_no_wrong_vector(
    thinking_model: Path, embedder: ThinkingEmbedder, tmp_path: Path
):
    modes = ("always", "never", "auto")
    expected = {mode: embedder.encode_query(TEXTS, think=mode) for mode in modes}
    picture = Image.open(io.BytesIO(picture_bytes()))
    seen = embedder.encode_query({"image": picture}, think="always")
    servers = [Server(thinking_model, "--device", "cpu", log=tmp_path / "first")]
    answered, lost, lock = 0, 0, threading.Lock()

    def ask(number: int) -> None:
        nonlocal answered, lost
        mode, text = modes[number % 3], number // 3 % len(TEXTS)
        body: dict[str, Any] = {"input": TEXTS[text], "encoding_format": "base64"}
        want = expected[mode][text]
        if number % 10 == 0:
            mode, want = "always", seen
            body = {"encoding_format": "base64", **picture_request(picture_bytes())}
        body |= {"think": mode, "input_type": "query"}
        while True:
            server = servers[-1]
            try:
                status, content = plain_post(server.url, json.dumps(body).encode())
                break
            except (OSError, http.client.HTTPException):
                with lock:
                    lost += 1
                until(lambda server=server: servers[-1] is not server, 60)
        assert status == 200, content
        encoded = base64.b64decode(json.loads(content)["data"][0]["embedding"])
        np.testing.assert_allclose(np.frombuffer(encoded, "<f4"), want, **NEAR)
        with lock:
            answered += 1

    try:
        with ThreadPoolExecutor(64) as pool:
            answers = [pool.submit(ask, number) for number in range(1000)]
            until(lambda: answered >= 300, 120)
            servers[0].process.kill()
            servers.append(Server(thinking_model, "--device", "cpu", log=tmp_path / "second"))
            for answer in answers:
                answer.result()
        assert answered == 1000
        assert lost > 0
        assert_nothing_held(servers[-1])
        used = servers[-1].metrics()
        assert (
            used['twn_rl_batch_inputs_sum{work="read"}']
            >= 2 * (used['twn_rl_batch_inputs_count{work="read"}'])
        )  # they shared their passes
    finally:
        for server in servers:
            server.process.kill()
            server.process.wait()
