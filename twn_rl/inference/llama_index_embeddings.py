"""A model as LlamaIndex's embedding: queries may think, texts do not. Needs `llamaindex`."""

from __future__ import annotations

from typing import Any

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.runtime.extras import extra

with extra("llamaindex"):
    from llama_index.core.embeddings import (  # pyright: ignore[reportMissingImports]
        BaseEmbedding,
    )


class LlamaIndexEmbedding(BaseEmbedding):
    """What LlamaIndex's indices and retrievers take; it batches by `embed_batch_size`."""

    def __init__(self, embedder: ThinkingEmbedder, *, embed_batch_size: int = 32, **options: Any):
        """Serve an embedder; the options are those of `encode_query`, such as `think="never"`."""
        super().__init__(model_name="twn_rl", embed_batch_size=embed_batch_size)
        self._embedder, self._options = embedder, options

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._embedder.encode_query(query, **self._options).tolist()

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.encode_document(list(texts), show_progress_bar=False).tolist()
