"""The service without HTTP: time-outs, faults, endings; and what settings are refused."""

import asyncio
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from serving_fixtures import embedder, thinking_model  # noqa: F401 -- fixtures
from serving_process import TEXTS

from twn_rl.cli import main
from twn_rl.inference.collection import CollectionError
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.serving.app import create_app
from twn_rl.serving.errors import ServiceError
from twn_rl.serving.received import Received
from twn_rl.serving.run import bind
from twn_rl.serving.service import EmbeddingService, Wish
from twn_rl.serving.settings import ServeSettings

INPUT = Received("input", TEXTS[0])
ALWAYS = Wish(think="always")


def run(
    embedder: ThinkingEmbedder,
    work: Callable[[EmbeddingService], Coroutine[Any, Any, Any]],
    **settings: Any,
) -> EmbeddingService:
    """Run a coroutine with a service of its own, which then finishes what it has."""
    service = EmbeddingService(embedder, ServeSettings(**settings), name="small")

    async def course() -> None:
        service.start()
        try:
            await work(service)
        finally:
            assert await service.stop()

    asyncio.run(course())
    assert (service.admission.inputs, service.admission.pixels) == (0, 0)
    assert service.engine.work.is_idle
    return service


def test_an_answer_that_takes_too_long_is_given_up(embedder: ThinkingEmbedder):
    async def work(service: EmbeddingService) -> None:
        with pytest.raises(ServiceError, match=r"timeout_seconds = 0\.001") as error:
            await service.embed([INPUT] * 8, ALWAYS)
        assert (error.value.status, error.value.retry_after) == (503, 1)

    run(embedder, work, timeout_seconds=0.001)


def test_a_fault_of_the_model_ends_its_requests_and_no_others(embedder, monkeypatch):
    async def work(service: EmbeddingService) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(embedder.model, "embed", lambda *args, **kwargs: 1 / 0)
            with pytest.raises(ServiceError, match="server's log") as error:
                await service.embed([INPUT], Wish(think="never"))
            assert error.value.status == 500
        assert (await service.embed([INPUT], ALWAYS))[0].state is not None
        # A fault of the pass itself loses what is in work, and the next request is answered.
        with monkeypatch.context() as patch:
            patch.setattr(service.engine.work, "_drop_cancelled", lambda: 1 / 0)
            with pytest.raises(ServiceError, match="server's log"):
                await service.embed([INPUT], ALWAYS)
        assert (await service.embed([INPUT], ALWAYS))[0].has_thought

    run(embedder, work)


def test_a_service_that_ends_finishes_what_it_has_and_takes_nothing_new(embedder):
    async def work(service: EmbeddingService) -> None:
        answer = asyncio.ensure_future(service.embed([INPUT] * 4, ALWAYS))
        await asyncio.sleep(0)
        while not service.admission.inputs:
            await asyncio.sleep(0.001)
        assert await service.stop()
        with pytest.raises(ServiceError, match="ending") as error:
            await service.embed([INPUT], ALWAYS)
        assert error.value.status == 503
        assert len(await answer) == 4

    run(embedder, work)


def test_a_collection_of_another_model_is_refused(embedder):
    class Other:
        def check_space(self, space: str) -> None:
            raise CollectionError(f"another model than {space}")

    other: Any = Other()
    with pytest.raises(CollectionError):
        create_app(EmbeddingService(embedder, ServeSettings(), name="small"), collection=other)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"host": "0.0.0.0"}, "expected an api_key"),
        ({"api_key": ""}, "api_key is empty"),
        ({"port": 70_000}, "port = 70000"),
        ({"max_inputs": 9, "max_queue": 8}, "at most max_queue = 8"),
        ({"places": 0, "timeout_seconds": 0}, "places = 0.*timeout_seconds = 0"),
    ],
)
def test_settings_that_cannot_be_meant_are_refused(settings, problem):
    with pytest.raises(ValueError, match=problem):
        ServeSettings(**settings)
    assert ServeSettings(host="0.0.0.0", is_open=True).host_names == ("*",)
    assert "localhost" in ServeSettings().host_names


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(thinking_model):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", "--model", str(thinking_model), "--port", port]) != 0


def test_no_answer_waits_until_its_headers_are_acknowledged():
    """A client that acknowledges late would otherwise wait 40 ms for each body."""
    settings = ServeSettings(port=0)

    async def course() -> int:
        found = asyncio.get_running_loop().create_future()

        def accepted(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            taken = writer.get_extra_info("socket")
            found.set_result(taken.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with bind(settings) as listener:
            async with await asyncio.start_server(accepted, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname())
                writer.close()
                return await asyncio.wait_for(found, 20)

    assert asyncio.run(course()) == 1
