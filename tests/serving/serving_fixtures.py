"""Fixtures to import: a small model that thinks, taught once, and a server of it."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from serving_process import Server, save_collection, save_thinking_model

from twn_rl.inference.embedder import ThinkingEmbedder


@pytest.fixture(scope="session")
def thinking_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model whose gate lets half of the texts think."""
    return save_thinking_model(tmp_path_factory.mktemp("serving") / "model")


@pytest.fixture(scope="session")
def embedder(thinking_model: Path) -> ThinkingEmbedder:
    """The same model in this process."""
    return ThinkingEmbedder.from_pretrained(thinking_model, device="cpu")


@pytest.fixture(scope="session")
def server(thinking_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the limits it has by default, but for clients that are slow."""
    folder = tmp_path_factory.mktemp("server")
    flags = ["--device", "cpu", "--body_seconds", "1"]
    flags += ["--collection", str(save_collection(thinking_model, folder))]
    started = Server(thinking_model, *flags, log=folder / "log")
    yield started
    assert started.end() == 0, started.log.read_text()[-2000:]
