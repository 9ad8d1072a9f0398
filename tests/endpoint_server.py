"""A local chat endpoint whose answers a test decides, and a writer that asks it."""

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item, Record
from twn_rl.training.thought_selection.endpoint import EndpointSettings, EndpointWriter

Answer = Callable[[dict[str, Any], int], tuple[int, str]]
RECORDS = [
    Record(id=f"r{n}", source="t", query=Item(text=f"question {n}"), positive=Item(text="camel"))
    for n in range(5)
]


class Server(ThreadingHTTPServer):
    """Answers by a function of (request, how often this question was asked before)."""

    answer: Answer
    headers: Callable[[], dict[str, str]]
    requests: list[tuple[str, dict[str, str], dict[str, Any]]]
    daemon_threads = True


class Handler(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        question = json.dumps(body["messages"])
        asked = sum(json.dumps(b["messages"]) == question for _, _, b in self.server.requests)
        self.server.requests.append((self.path, dict(self.headers), body))
        status, text = self.server.answer(body, asked)
        try:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            for name, value in (self.server.headers() if status != 200 else {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text.encode())
        except OSError:
            pass  # the client has gone

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(answer: Answer, headers: Callable[[], dict[str, str]] = dict) -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.answer, server.headers, server.requests = answer, headers, []
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def writer(server: Server, **settings: Any) -> EndpointWriter:
    settings = {
        "url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "m",
        "backoff_seconds": 0.01,
        "timeout_seconds": 10.0,
        "retries": 2,
        **settings,
    }
    named = {f"endpoint_{name}": value for name, value in settings.items()}
    return EndpointWriter(EndpointSettings(**named), Renderer())


def chat(text: str | None, finish_reason: str = "stop") -> tuple[int, str]:
    choice = {"message": {"content": text}, "finish_reason": finish_reason}
    return 200, json.dumps({"choices": [choice]})


def number(body: dict[str, Any]) -> int:
    return int(body["messages"][-1]["content"][0]["text"].split()[-1])
