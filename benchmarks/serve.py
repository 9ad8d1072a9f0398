"""The server side by side with a loop of single calls, and who waits for whom.

    python benchmarks/serve.py --model outputs/demo/refit --clients 1 8 64 --seconds 10
    python benchmarks/serve.py --model outputs/demo/refit --think never

The server runs in a process of its own, with one thread for its model; clients are threads of this
one, and each sends its next request once it has an answer. The loop embeds the same inputs one
after the other, with one thread, too. Arms take turns in every round. Queries a second are of the
wall clock, and of the processor time of the process that embeds, HTTP included, which is steadier
beside other programs. Then: how long requests that never think take alone, and while others think
all the time. Queries are those of the test split, pictures included, and vectors are compared with
the loop's.
"""

from __future__ import annotations

import base64
import contextlib
import http.client
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from twn_rl.data.record import Item
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments

_START_SECONDS = 120


@dataclass
class BenchmarkArguments:
    """What to measure."""

    model: str = field(default="outputs/demo/refit", metadata={"help": "Checkpoint folder."})
    think: Literal["auto", "always", "never"] = field(
        default="auto", metadata={"help": "When the queries of the throughput think."}
    )
    clients: list[int] = field(
        default_factory=lambda: [1, 8, 64], metadata={"help": "Clients at a time."}
    )
    queries: int = field(default=256, metadata={"help": "Queries of the test split."})
    seconds: float = field(default=10.0, metadata={"help": "Length of an arm in a round."})
    rounds: int = field(default=3, metadata={"help": "Rounds after one that warms up."})
    thinkers: int = field(default=4, metadata={"help": "Clients that think while others do not."})


@dataclass
class Answers:
    """What clients got: seconds of each request, and the first vector of each query."""

    seconds: list[float] = field(default_factory=list)
    vectors: dict[int, np.ndarray] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Measure the arms in turns, then waiting, and print both."""
    script, data = parse_arguments((BenchmarkArguments, DataArguments), description=__doc__)
    torch.set_num_threads(1)
    embedder = ThinkingEmbedder.from_pretrained(script.model, device="cpu")
    items = [record.query for record in list(data.load("test"))[: script.queries]]
    bodies = [body_of(item, script.think) for item in items]
    with tempfile.TemporaryDirectory() as folder:
        process, url = start_server(script.model, Path(folder) / "log")
        try:
            throughput(script, embedder, items, process.pid, url, bodies)
            waiting(script, url, [body_of(item, "never") for item in items], bodies)
        finally:
            process.terminate()
            process.wait()


def body_of(item: Item, think: str) -> bytes:
    """Return the request of an item, its pictures as data URIs."""
    parts: list[dict[str, Any]] = []
    for source in item.images:
        encoded = base64.b64encode(Path(str(source)).read_bytes()).decode()
        url = f"data:image/png;base64,{encoded}"
        parts.append({"type": "image_url", "image_url": {"url": url}})
    if item.text:
        parts.append({"type": "text", "text": item.text})
    body = {"messages": [{"role": "user", "content": parts}], "input_type": "query"}
    body |= {"think": think, "encoding_format": "base64", "instruction": item.instruction}
    return json.dumps(body).encode()


def start_server(model: str, log: Path) -> tuple[subprocess.Popen[bytes], str]:
    """Return the process of a server with one thread, and where it answers."""
    command = [sys.executable, "-c", "import sys; from twn_rl.cli import main; sys.exit(main())"]
    command += ["serve", "--model", model, "--device", "cpu", "--port", "0"]
    command += ["--timeout_seconds", "600"]
    with log.open("w") as output:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(command, stdout=output, stderr=output, env=env)
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        text = log.read_text()
        if (found := re.search(r"serving at (\S+)", text)) and "startup complete" in text:
            return process, found[1]
        time.sleep(0.1)
    process.kill()
    raise RuntimeError(f"the server does not answer: {log.read_text()[-1000:]}")


def throughput(
    script: BenchmarkArguments,
    embedder: ThinkingEmbedder,
    items: Sequence[Item],
    pid: int,
    url: str,
    bodies: Sequence[bytes],
) -> None:
    """Print queries a second of the loop and of the server by number of clients."""
    names = ["loop of single calls", *(f"{count} clients" for count in script.clients)]
    rates: dict[str, list[float]] = {name: [] for name in names}
    of_processor: dict[str, list[float]] = {name: [] for name in names}
    vectors: dict[str, dict[int, np.ndarray]] = {name: {} for name in names}
    for number in range(script.rounds + 1):
        for name, count in zip(names, [0, *script.clients], strict=True):
            started, worked = time.perf_counter(), processor_seconds(pid if count else os.getpid())
            if count:
                answers = ask(url, bodies, count, script.seconds)
            else:
                answers = loop(embedder, items, script)
            if answers.failures:
                raise RuntimeError(f"{name}: {answers.failures[0]}")
            vectors[name] |= answers.vectors
            if number:  # the first round warms up
                rates[name].append(len(answers.seconds) / (time.perf_counter() - started))
                used = processor_seconds(pid if count else os.getpid()) - worked
                of_processor[name].append(len(answers.seconds) / used)
    print(f"{len(items)} queries, think={script.think}, {script.rounds} rounds of each arm\n")
    for name in names:
        told = []
        for kind in (rates, of_processor):
            ratios = [a / b for a, b in zip(kind[name], kind[names[0]], strict=True)]
            spread = f"{min(kind[name]):.1f} to {max(kind[name]):.1f}"
            rate, ratio = statistics.median(kind[name]), statistics.median(ratios)
            told.append(f"{rate:6.1f} ({spread}), {ratio:.2f} times the loop")
        print(f"{name:22s} a second: {told[0]}   a processor second: {told[1]}")
    both = [
        (vectors[names[0]][q], v) for q, v in vectors[names[-1]].items() if q in vectors[names[0]]
    ]
    apart = [float(np.abs(a - b).max()) for a, b in both]
    far = sum(distance > 1e-4 for distance in apart)
    print(f"{len(both)} vectors compared with the loop's: {far} differ by more than 1e-4")


def processor_seconds(pid: int) -> float:
    """Return the processor time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def loop(embedder: ThinkingEmbedder, items: Sequence[Item], script: BenchmarkArguments) -> Answers:
    """Embed one query after the other."""
    answers, end = Answers(), time.perf_counter() + script.seconds
    while (started := time.perf_counter()) < end:
        query = len(answers.seconds) % len(items)
        vector = embedder.encode_query(items[query], think=script.think)
        answers.seconds.append(time.perf_counter() - started)
        answers.vectors.setdefault(query, vector)
    return answers


def ask(
    url: str,
    bodies: Sequence[bytes],
    clients: int,
    seconds: float,
    stop: threading.Event | None = None,
) -> Answers:
    """Return the answers of some clients that ask for so many seconds, or until `stop`."""
    answers, lock = Answers(), threading.Lock()
    end = time.perf_counter() + seconds
    order = iter(range(10**9))
    host, headers = url.removeprefix("http://"), {"Content-Type": "application/json"}

    def client() -> None:
        # The standard library's client takes little of the processor that the server needs.
        with contextlib.closing(http.client.HTTPConnection(host, timeout=600)) as line:
            while time.perf_counter() < end and not (stop and stop.is_set()):
                with lock:
                    query = next(order) % len(bodies)
                started = time.perf_counter()
                line.request("POST", "/v1/embeddings", bodies[query], headers)
                reply = line.getresponse()
                content = reply.read()
                taken = time.perf_counter() - started
                if reply.status != 200:
                    answers.failures.append(content.decode())
                    return
                encoded = base64.b64decode(json.loads(content)["data"][0]["embedding"])
                with lock:
                    answers.seconds.append(taken)
                    answers.vectors.setdefault(query, np.frombuffer(encoded, "<f4"))

    threads = [threading.Thread(target=client) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def waiting(
    script: BenchmarkArguments, url: str, plain: Sequence[bytes], bodies: Sequence[bytes]
) -> None:
    """Print how long one client that never thinks waits, alone and while others think."""
    always = [body.replace(b'"think": "auto"', b'"think": "always"') for body in bodies]
    seconds: dict[str, list[float]] = {"alone": [], "while others think": []}
    others = 0
    for number in range(script.rounds + 1):
        for name, found in seconds.items():
            stop, thinking = threading.Event(), Answers()

            def think(stop: threading.Event = stop, thinking: Answers = thinking) -> None:
                told = ask(url, always, script.thinkers, 10**6, stop)
                thinking.seconds += told.seconds

            thread = threading.Thread(target=think)
            if name != "alone":
                thread.start()
                time.sleep(0.5)
            answers = ask(url, plain, 1, script.seconds)
            stop.set()
            if name != "alone":
                thread.join()
                others += len(thinking.seconds)
            if number:
                found += answers.seconds
    print(f"\none client that never thinks, beside {script.thinkers} that always think:")
    for name, found in seconds.items():
        p50, p99 = (1000 * float(np.percentile(found, share)) for share in (50, 99))
        print(f"{name:22s} p50 {p50:6.1f} ms   p99 {p99:6.1f} ms   ({len(found)} requests)")
    ratio = np.percentile(seconds["while others think"], 99) / np.percentile(seconds["alone"], 99)
    print(f"p99 while others think / alone: {ratio:.2f}   ({others} thoughts meanwhile)")


if __name__ == "__main__":
    main()
