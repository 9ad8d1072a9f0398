"""A model as LangChain's embeddings: queries may think, documents do not. Needs `langchain`."""

from __future__ import annotations

from typing import Any

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.runtime.extras import extra

with extra("langchain"):
    from langchain_core.embeddings import (  # pyright: ignore[reportMissingImports]
        Embeddings,
    )


class LangChainEmbeddings(Embeddings):
    """What LangChain's vector stores and retrievers take.

    Attributes:
        embedder: What embeds.
        query_options: Of `encode_query`, such as `think="never"`.
    """

    def __init__(self, embedder: ThinkingEmbedder, **query_options: Any) -> None:
        """Serve an embedder; the options are those of queries."""
        self.embedder, self.query_options = embedder, query_options

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Return a vector of unit length for each text."""
        return self.embedder.encode_document(list(texts), show_progress_bar=False).tolist()

    def embed_query(self, text: str) -> list[float]:
        """Return the vector of a question, which may think."""
        return self.embedder.encode_query(text, **self.query_options).tolist()
