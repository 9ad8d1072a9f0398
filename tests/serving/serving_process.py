"""A small model that thinks, in a folder, and `twn-rl serve` as a process; no expected values."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from made_records import picture
from tiny_backbones import awaken

from twn_rl.data.record import Item
from twn_rl.inference.collection_writing import build_collection
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.item_rows import ItemFile
from twn_rl.launch.arguments import ModelArguments
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.model import DualLoraModel

THOUGHTS = ("camel east ; bicycle", "owl north ; camel above", "pizza")
TEXTS = [
    "camel",
    "owl",
    "which object is at the north",
    "which object is above the one above the camel",
    "pizza above the tree",
    "bicycle",
    "strawberry east",
    "which object is at the east",
]
_START_SECONDS = 180


def save_thinking_model(folder: Path) -> Path:
    """Write a model of the embedded default that thinks one of `THOUGHTS`, gate included."""
    settings = ModelArguments(reasoning_rank=8, embedding_rank=2, max_think_tokens=12)
    model = settings.build(seed=0)
    reasoning = adapter_parameters(model.peft_model, REASONING_ADAPTER)
    untaught = {name: tensor.detach().clone() for name, tensor in reasoning.items()}
    awaken(model)
    with torch.no_grad():  # a random reasoning adapter would be slow to teach
        for name, tensor in reasoning.items():
            tensor.copy_(untaught[name])
    _teach(model)
    gate = Gate(model.hidden_size)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates["query"] = gate
    model.config.gate_threshold = 0.5
    embedder = ThinkingEmbedder(model.requires_grad_(False))
    found = embedder.encode_query(TEXTS, think_threshold=1.0, return_details=True)
    middle = sorted(found.gate_probabilities)[len(TEXTS) // 2 - 1 : len(TEXTS) // 2 + 1]
    model.config.gate_threshold = sum(middle) / 2
    model.save_pretrained(folder)
    return folder


def _teach(model: DualLoraModel, steps: int = 200) -> None:
    """Train the reasoning adapter until it ends its thoughts."""
    texts = [TEXTS[row % len(TEXTS)] for row in range(len(TEXTS))]
    spans = [f"<think> {THOUGHTS[row % len(THOUGHTS)]} </think>" for row in range(len(texts))]
    completions = [model.completion_ids(span, add_eos=True) for span in spans]
    batch = model.collate([Item(text=text) for text in texts], completions)
    plain = model.collate([Item(text=text) for text in texts])
    parameters = list(adapter_parameters(model.peft_model, REASONING_ADAPTER).values())
    optimizer = torch.optim.Adam(parameters, lr=0.01)
    for step in range(steps):
        if step % 20 == 0 and model.reason(plain) == completions:
            return
        optimizer.zero_grad()
        model.token_nll(batch)[0].sum().backward()
        optimizer.step()
    raise AssertionError("the small model did not learn its thoughts")


def save_collection(model: Path, folder: Path) -> Path:
    """Write a collection of `TEXTS` and one picture."""
    rows: list[dict[str, Any]] = [
        {"text": text, "metadata": {"words": len(text.split())}} for text in TEXTS
    ]
    (folder / "photo.png").write_bytes(picture_bytes())
    rows.append({"images": ["photo.png"]})
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "rows.jsonl").write_text(lines, encoding="utf-8")
    source = ItemFile(folder / "rows.jsonl", side="document")
    embedder = ThinkingEmbedder.from_pretrained(model, device="cpu")
    return build_collection(embedder, source, folder / "out", show_progress_bar=False).path


def picture_bytes(seed: int = 1, side: int = 96, form: str = "PNG") -> bytes:
    """Return the file of a picture."""
    file = io.BytesIO()
    picture(seed, side, side).save(file, form)
    return file.getvalue()


def data_uri(content: bytes, kind: str = "image/png") -> str:
    """Return bytes as a client sends them."""
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


class Server:
    """`twn-rl serve`, or another command with its flags, in a process of its own.

    Attributes:
        url: Where it answers.
    """

    def __init__(
        self,
        model: Path,
        *flags: str,
        log: Path,
        env: dict[str, str] | None = None,
        name: str = "serve",
    ):
        """Start it, and wait until it answers."""
        command = [
            sys.executable,
            "-c",
            "import sys; from twn_rl.cli import main; sys.exit(main())",
        ]
        command += [name, "--model", str(model), "--port", "0", "--name", "small", *flags]
        self.log = log
        with log.open("w") as output:
            self.process = subprocess.Popen(
                command, stdout=output, stderr=output, env={**os.environ, **(env or {})}
            )
        self.url = self._wait()

    def _wait(self) -> str:
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self.process.poll() is None:
            text = self.log.read_text()
            found = re.search(r"serving at (http://\S+)", text)
            if found and "startup complete" in text:
                return found[1]
            time.sleep(0.05)
        self.process.kill()
        self.process.wait()
        raise AssertionError(f"the server does not answer: {self.log.read_text()[-2000:]}")

    def memory_mib(self) -> float:
        """Return the resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"VmRSS:\s+(\d+)", status)[0]) / 1024

    def metrics(self, key: str | None = None) -> dict[str, float]:
        """Return the server's counters by name and labels."""
        import httpx2

        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        text = httpx2.get(f"{self.url}/metrics", headers=headers).text
        lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, _, value in lines}

    def end(self, how: int = signal.SIGTERM, seconds: float = 30) -> int:
        """End the process and return its exit status."""
        if self.process.poll() is None:
            self.process.send_signal(how)
        return self.process.wait(seconds)
