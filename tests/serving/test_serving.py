"""The server's answers: OpenAI's client and vLLM's requests get `ThinkingEmbedder`'s vectors."""

import base64
import io
import json
import re
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from openai.types import CreateEmbeddingResponse
from PIL import Image
from serving_fixtures import embedder, server, thinking_model  # noqa: F401 -- fixtures
from serving_process import TEXTS, Server, data_uri, picture_bytes

from twn_rl.inference.embedder import ThinkingEmbedder

pytestmark = pytest.mark.distributed
NEAR = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def post(server: Server, body: Any, path: str = "/v1/embeddings") -> httpx2.Response:
    return httpx2.post(f"{server.url}{path}", json=body, timeout=60)


def vectors(reply: Any) -> np.ndarray:
    return np.array([row.embedding for row in reply.data], np.float32)


def test_openais_client_gets_the_vectors_of_the_embedder(client, embedder: ThinkingEmbedder):
    expected = embedder.encode(TEXTS)
    reply = client.embeddings.create(model="small", input=TEXTS)  # asks for base64
    np.testing.assert_allclose(vectors(reply), expected, **NEAR)
    assert [row.index for row in reply.data] == list(range(len(TEXTS)))
    floats = client.embeddings.create(model="small", input=TEXTS[1], encoding_format="float")
    np.testing.assert_allclose(vectors(floats)[0], expected[1], **NEAR)
    short = client.embeddings.create(model="small", input=TEXTS, dimensions=16, user="me")
    np.testing.assert_allclose(vectors(short), embedder.encode(TEXTS, truncate_dim=16), **NEAR)
    assert reply.usage.prompt_tokens == reply.usage.total_tokens > len(TEXTS)


@pytest.mark.parametrize("think", [None, "auto", "always", "never"])
def test_queries_think_as_the_embedder_lets_them(client, embedder: ThinkingEmbedder, think):
    found = embedder.encode_query(TEXTS, think=think or "auto", return_details=True)
    wish = {"input_type": "query", "return_thoughts": True} | ({"think": think} if think else {})
    reply = client.embeddings.create(model="small", input=TEXTS, extra_body=wish)
    np.testing.assert_allclose(vectors(reply), found.embeddings, **NEAR)
    assert [getattr(row, "thought", None) for row in reply.data] == [
        texts[0] if texts else None for texts in found.thoughts
    ]
    assert [row.think_tokens for row in reply.data] == found.think_tokens
    assert reply.usage.think_tokens == sum(found.think_tokens)
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.think_tokens
    if think in (None, "auto"):
        said = [row.gate_probability for row in reply.data]
        np.testing.assert_allclose(said, found.gate_probabilities, **NEAR)
        assert 0 < sum(tokens > 0 for tokens in found.think_tokens) < len(TEXTS)


def test_documents_do_not_think_unless_asked(client, embedder: ThinkingEmbedder):
    plain, thinking = (
        client.embeddings.create(
            model="small", input=TEXTS, extra_body={"input_type": "document", **more}
        )
        for more in ({}, {"think": "always"})
    )
    np.testing.assert_allclose(vectors(plain), embedder.encode_document(TEXTS), **NEAR)
    expected = embedder.encode_document(TEXTS, think="always")
    np.testing.assert_allclose(vectors(thinking), expected, **NEAR)
    assert plain.usage.think_tokens == 0 < thinking.usage.think_tokens


def test_vllms_request_with_a_picture(client, embedder: ThinkingEmbedder):
    content = picture_bytes()
    user = [
        {"type": "image_url", "image_url": {"url": data_uri(content)}},
        {"type": "text", "text": "which object is at the north"},
    ]
    messages = [{"role": "user", "content": user}]
    body = {"messages": messages, "model": "small", "encoding_format": "float"}
    item = {"image": Image.open(io.BytesIO(content)), "text": user[1]["text"]}
    reply = client.post("/embeddings", cast_to=CreateEmbeddingResponse, body=body)
    np.testing.assert_allclose(vectors(reply)[0], embedder.encode(item), **NEAR)

    messages.insert(0, {"role": "system", "content": "find the name"})
    reply = client.post(
        "/embeddings", cast_to=CreateEmbeddingResponse, body={**body, "think": "always"}
    )
    expected = embedder.encode_query({**item, "instruction": "find the name"}, think="always")
    np.testing.assert_allclose(vectors(reply)[0], expected, **NEAR)


def test_a_thought_is_told_while_it_is_written(server: Server, embedder: ThinkingEmbedder):
    body = {"input": TEXTS[7], "think": "always", "return_thoughts": True, "stream": True}
    events: list[tuple[str, Any]] = []
    with httpx2.stream("POST", f"{server.url}/v1/embeddings", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        for block in "".join(reply.iter_text()).strip().split("\n\n"):
            kind, data = block.split("\n")
            events.append((kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    kinds = [kind for kind, _ in events]
    assert kinds == ["read", *["token"] * (len(events) - 2), "done"]
    read, done = events[0][1], events[-1][1]
    assert read["thinks"] is True
    np.testing.assert_allclose(read["embedding"], embedder.encode(TEXTS[7]), **NEAR)
    expected = embedder.encode_query(TEXTS[7], think="always")
    np.testing.assert_allclose(done["data"][0]["embedding"], expected, **NEAR)
    assert "".join(data["text"] for _, data in events[1:-1]) == done["data"][0]["thought"]
    # The end of turn is a token, too.
    assert len(events) - 2 == done["usage"]["think_tokens"] + 1


def test_coheres_request_gets_vectors_in_several_types(server: Server, embedder: ThinkingEmbedder):
    types = ["float", "int8", "ubinary", "base64"]
    body = {"model": "small", "texts": TEXTS, "input_type": "search_query"}
    reply = post(server, {**body, "embedding_types": types}, "/v2/embed").json()
    expected = embedder.encode_query(TEXTS)
    found = reply["embeddings"]
    np.testing.assert_allclose(found["float"], expected, **NEAR)
    decoded = [np.frombuffer(base64.b64decode(row), "<f4") for row in found["base64"]]
    np.testing.assert_array_equal(decoded, np.array(found["float"], np.float32))
    assert (
        np.abs(np.array(found["int8"]) - embedder.encode_query(TEXTS, precision="int8")).max() <= 1
    )
    assert np.array(found["ubinary"]).shape == (len(TEXTS), 20)
    assert reply["meta"]["billed_units"]["output_tokens"] > 0
    uri = data_uri(picture_bytes())
    picture = embedder.encode_document(Image.open(io.BytesIO(picture_bytes())))
    parts = [{"content": [{"type": "image_url", "image_url": {"url": uri}}]}]
    for source in ({"images": [uri]}, {"inputs": parts}):
        told = post(server, {"model": "small", "input_type": "image", **source}, "/v2/embed").json()
        np.testing.assert_allclose(told["embeddings"]["float"][0], picture, **NEAR)
    long = {**body, "texts": ["camel " * 2000], "truncate": "NONE"}
    assert post(server, long, "/v2/embed").status_code == 400
    assert post(server, {**body, "images": [uri]}, "/v2/embed").status_code == 400


def test_search_finds_with_and_without_the_thought(server: Server, embedder: ThinkingEmbedder):
    assert httpx2.get(f"{server.url}/collection").json()["rows"] == len(TEXTS) + 1
    picture = Image.open(io.BytesIO(picture_bytes()))
    index = embedder.encode_document([*TEXTS, picture])
    body = {"query": TEXTS[7], "think": "always", "top_k": 3, "without_thought": True}
    reply = post(server, body, "/search").json()
    think: Any
    for think, hits in (("always", reply["hits"]), ("never", reply["hits_without_thought"])):
        scores = index @ embedder.encode_query(TEXTS[7], think=think)
        assert [hit["row"] for hit in hits] == np.argsort(-scores)[:3].tolist()
        np.testing.assert_allclose(
            [hit["score"] for hit in hits], np.sort(-scores)[:3] * -1, **NEAR
        )
    assert reply["think_tokens"] > 0

    found = post(
        server, {**image(data_uri(picture_bytes())), "think": "never", "top_k": 1}, "/search"
    )
    (hit,) = found.json()["hits"]
    sent = httpx2.get(f"{server.url}{hit['pictures'][0]}")
    assert (sent.content, sent.headers["content-type"]) == (picture_bytes(), "image/png")
    assert httpx2.get(f"{server.url}/collection/pictures/0/0").status_code == 404
    assert post(server, {"query": "a", "top_k": 101}, "/search").status_code == 400

    long = post(server, {**body, "top_k": 20, "filter": {"words": [9, 4]}}, "/search").json()
    wanted = {row for row, text in enumerate(TEXTS) if len(text.split()) in (4, 9)}
    assert {hit["row"] for hit in (*long["hits"], *long["hits_without_thought"])} == wanted
    refused = post(server, {"query": "a", "filter": {"words": {"gt": 3}}}, "/search")
    assert "expected names and values of metadata" in refused.json()["error"]["message"]

    with httpx2.stream("POST", f"{server.url}/search", json={**body, "stream": True}) as told:
        events = [block.split("\n") for block in "".join(told.iter_text()).strip().split("\n\n")]
    first, last = (json.loads(events[n][1].removeprefix("data: ")) for n in (0, -1))
    assert (first["hits"], last["hits"]) == (reply["hits_without_thought"], reply["hits"])


def test_the_server_says_what_it_is_and_counts_what_it_does(server: Server, client):
    (model,) = client.models.list().data
    assert (model.id, model.dimensions, model.think_auto) == ("small", 160, ["query"])
    assert httpx2.get(f"{server.url}/health").json() == {"status": "ok", "model": "small"}
    before = server.metrics()
    client.embeddings.create(model="small", input=TEXTS, extra_body={"think": "always"})
    after = server.metrics()
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown['twn_rl_inputs_total{side="query",think="yes"}'] == len(TEXTS)
    assert grown['twn_rl_input_seconds_count{think="yes"}'] == len(TEXTS)
    assert grown["twn_rl_think_tokens_total"] > len(TEXTS)
    assert grown['twn_rl_batch_inputs_count{work="read"}'] == 1  # they were read together
    assert grown['twn_rl_batch_inputs_count{work="write"}'] <= 13
    assert grown['twn_rl_requests_total{path="/v1/embeddings",status="200"}'] == 1
    assert after["twn_rl_queue_inputs"] == after["twn_rl_places_taken"] == 0


def test_a_long_text_is_cut_as_by_the_embedder_and_that_is_told(client, server, embedder):
    text = "which object is above the camel " * 200
    reply = client.embeddings.create(model="small", input=[text, "camel"])
    np.testing.assert_allclose(vectors(reply)[0], embedder.encode(text), **NEAR)
    assert reply.data[0].truncated is True
    assert not hasattr(reply.data[1], "truncated")
    log = server.log.read_text()
    assert re.search(r"the text of an item of \d+ characters is cut", log)
    assert "camel" not in log  # what clients send is not for the log


TINY = base64.b64encode(b"not a picture").decode()


def image(url: Any) -> dict[str, Any]:
    part = {"type": "image_url", "image_url": {"url": url}}
    return {"messages": [{"role": "user", "content": [part]}]}


@pytest.mark.parametrize(
    ("body", "status", "code", "told"),
    [
        ({"input": "a", "model": "other"}, 404, "model_not_found", "'small'"),
        ({"input": [1, 2, 3]}, 400, "bad_request", "token ids"),
        ({"input": [[1], [2]]}, 400, "bad_request", "token ids"),
        ({"input": ["a", None]}, 400, "bad_request", "entry 1"),
        ({"input": []}, 400, "no_input", "at least one"),
        ({"input": ["a", " "]}, 400, "bad_input", "input.1"),
        ({"input": "a \x00 b"}, 400, "bad_input", "NUL"),
        ({}, 400, "bad_request", "either input or messages"),
        ({"input": "a", "messages": []}, 400, "bad_request", "either input or messages"),
        ({"input": "a", "colour": 1}, 400, "bad_request", "colour: unknown field"),
        ({"input": "a", "think": "always", "keep": "better"}, 400, "bad_request", "no judge"),
        ({"input": "a", "keep": "best"}, 400, "bad_request", "keep"),
        ({"input": "a", "dimensions": 161}, 400, "bad_request", "at most 160"),
        ({"input": "a", "dimensions": "16"}, 400, "bad_request", "dimensions"),
        ({"input": "a", "think": "often"}, 400, "bad_request", "'auto', 'always'"),
        ({"input": "a", "think": "latent"}, 400, "bad_request", "num_reason_tokens"),
        ({"input": "a", "input_type": "document", "think": "auto"}, 400, "bad_request", "gate"),
        ({"input": "a", "think": "never", "think_threshold": 0.5}, 400, "bad_request", "auto"),
        ({"input": "a", "max_think_tokens": 10**6}, 400, "bad_request", "at most 12"),
        ({"input": ["a", "b"], "stream": True}, 400, "bad_request", "expected one"),
        ({"input": ["a"] * 257}, 413, "too_many_inputs", "1 to 256"),
        ({"input": "a " * 60_000}, 413, "text_too_long", "100000"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "bad_input", "user message"),
        ({"messages": [{"role": "user", "content": 3}]}, 400, "bad_input", "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "image": "/etc/passwd"}]}]},
         400, "bad_input", "text or image_url"),
        (image("https://example.org/a.png"), 400, "no_data_uri", "nothing is fetched"),
        (image("file:///etc/passwd"), 400, "no_data_uri", "nothing is fetched"),
        (image("/etc/passwd"), 400, "no_data_uri", "no file is read"),
        (image("data:image/png;base64,@@@"), 400, "bad_input", "base64"),
        (image(f"data:image/png;base64,{TINY}"), 400, "unreadable_image", "cannot be read"),
        (image(["data:image/png;base64,"]), 400, "bad_input", "a string"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_told_in_one_error(server: Server, body, status, code, told):
    reply = post(server, body)
    assert (reply.status_code, reply.json()["error"]["code"]) == (status, code), reply.text
    assert told in reply.json()["error"]["message"]
    assert len(reply.text) < 1000


def test_openais_client_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="'small'"):
        client.embeddings.create(model="other", input="a")
    with pytest.raises(openai.BadRequestError, match="token ids"):
        client.embeddings.create(model="small", input=[1, 2])
