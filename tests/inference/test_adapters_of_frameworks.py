"""LangChain and LlamaIndex get `ThinkingEmbedder`'s vectors; skipped where they are absent."""

from typing import Any

import numpy as np
import pytest

from twn_rl.inference.embedder import ThinkingEmbedder

TEXTS = ["camel pizza", "zebra above the tree", "row"]


@pytest.fixture
def embedder(make_model) -> ThinkingEmbedder:
    return ThinkingEmbedder(make_model())


def test_langchain_searches_with_our_vectors_and_queries_think(embedder: ThinkingEmbedder):
    core: Any = pytest.importorskip("langchain_core.vectorstores", reason="langchain is absent")
    from twn_rl.inference.langchain_embeddings import LangChainEmbeddings

    thinking = LangChainEmbeddings(embedder, think="always", max_think_tokens=4)
    expected = embedder.encode_query(TEXTS[1], think="always", max_think_tokens=4)
    found = np.array(thinking.embed_query(TEXTS[1]), np.float32)
    np.testing.assert_array_equal(found, expected)
    documents = embedder.encode_document(TEXTS)
    np.testing.assert_allclose(thinking.embed_documents(TEXTS), documents, atol=1e-6)
    store = core.InMemoryVectorStore.from_texts(TEXTS, LangChainEmbeddings(embedder, think="never"))
    query = embedder.encode_query("zebra tree", think="never")
    ((best, score),) = store.similarity_search_with_score("zebra tree", k=1)
    assert best.page_content == TEXTS[int((documents @ query).argmax())]
    assert score == pytest.approx(float((documents @ query).max()), abs=1e-5)


def test_llama_index_gets_our_vectors_and_queries_think(embedder: ThinkingEmbedder):
    pytest.importorskip("llama_index.core", reason="llama-index-core is absent")
    from llama_index.core.schema import TextNode  # pyright: ignore[reportMissingImports]

    from twn_rl.inference.llama_index_embeddings import LlamaIndexEmbedding

    thinking = LlamaIndexEmbedding(embedder, think="always", max_think_tokens=4)
    expected = embedder.encode_query(TEXTS[1], think="always", max_think_tokens=4)
    vector = np.array(thinking.get_query_embedding(TEXTS[1]), np.float32)
    np.testing.assert_array_equal(vector, expected)
    documents = embedder.encode_document(TEXTS)
    nodes = thinking([TextNode(text=text) for text in TEXTS])
    np.testing.assert_allclose([node.embedding for node in nodes], documents, atol=1e-6)
    one = thinking.get_text_embedding(TEXTS[0])
    np.testing.assert_allclose(one, documents[0], atol=1e-6)
