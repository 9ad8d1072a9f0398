"""Embedding models that think only when it helps: training, evaluation and serving."""

__version__ = "0.1.0"
