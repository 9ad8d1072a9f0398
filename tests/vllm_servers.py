"""A real vLLM server on loopback for tests, started by the command the trainer asks for."""

from __future__ import annotations

import os
import shlex
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.vllm_server import serve_command


@contextmanager
def running_server(model: DualLoraModel, log: Path, *, temperature: float = 1.0) -> Iterator[str]:
    """Serve a model's backbone in the body, and give the address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    backbone, rank = model.backbone, model.config.reasoning_lora.r
    words = shlex.split(serve_command(backbone.name, None, backbone.model.dtype, rank, temperature))
    at = words.index("vllm")
    environment = dict(word.split("=") for word in words[:at])
    # Packages of vLLM for CPUs are not called vllm, for which its command looks.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model"]
    command += [*words[at + 2 :], "--enforce-eager", "--max-model-len", "256"]
    command[command.index("--port") + 1] = str(port)
    with log.open("w") as out:
        server = subprocess.Popen(
            command, env={**os.environ, **environment}, stdout=out, stderr=subprocess.STDOUT
        )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", server, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait(60)


def wait_for(url: str, server: subprocess.Popen, log: Path, seconds: int = 300) -> None:
    """Return once the address answers."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            with urlopen(url, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])
