"""Embedding models that think only when it helps: training, evaluation and serving."""

from typing import TYPE_CHECKING, Any

from twn_rl.modeling.sentence_transformers_import import tell_sentence_transformers

if TYPE_CHECKING:
    from twn_rl.inference.embedder import ThinkingEmbedder

__version__ = "0.1.0"
__all__ = ["ThinkingEmbedder", "__version__"]

tell_sentence_transformers()


def __getattr__(name: str) -> Any:
    # Imported when asked for: the command line's help must not load torch.
    if name == "ThinkingEmbedder":
        from twn_rl.inference.embedder import ThinkingEmbedder

        return ThinkingEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
