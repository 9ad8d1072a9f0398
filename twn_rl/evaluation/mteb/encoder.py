"""`MtebEncoder`: a model that thinks as an encoder of mteb 2.x; knows no tasks and no scores.

Every process of a launch embeds its share of the inputs and gets all vectors, so that scores do
not depend on the number of processes. Vectors that are not finite never reach mteb.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from mteb.abstasks.task_metadata import TaskMetadata
from mteb.models.abs_encoder import AbsEncoder
from mteb.models.modality_collators import FramesCollator
from mteb.models.model_meta import ModelMeta, ScoringFunction
from mteb.types import PromptType
from numpy.typing import NDArray
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from twn_rl.data.images import ImageSource
from twn_rl.evaluation.mteb.inputs import Reader, task_instruction
from twn_rl.evaluation.mteb.shares import (
    BATCHES_PER_CALL,
    assemble,
    chunk_rows,
    on_all_processes,
    own_share,
    processes,
)
from twn_rl.evaluation.queries import COLLAPSE_SAMPLE
from twn_rl.evaluation.usage import Account, Usage, UsageBook
from twn_rl.inference.embedder import Side, ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import ThinkMode
from twn_rl.metrics.ranking import collapse_report
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.runtime.whole_files import digest

logger = logging.getLogger(__name__)

FRAMES_PER_VIDEO = 8
# Unit vectors of distinct inputs this alike say nothing about them.
COLLAPSED_COSINE = 0.99
# Of fewer, some are alike by chance.
COLLAPSE_FROM_VECTORS = 8


class MtebEncoder(AbsEncoder):
    """Embeds mteb's inputs with a `ThinkingEmbedder`.

    Queries, and inputs of tasks without sides, think as `think` says, documents as
    `think_documents` says.

    Attributes:
        usage: What was embedded, for how much; by task, split, subset and side.
        open_picture: Reference -> picture, set by a run for tasks that name their pictures.
        meta: Name, revision (a hash of everything vectors depend on) and settings; mteb reads it
            as `mteb_model_meta`.
    """

    def __init__(
        self,
        embedder: ThinkingEmbedder,
        *,
        name: str,
        think: ThinkMode = "auto",
        think_documents: ThinkMode = "never",
        think_threshold: float | None = None,
        max_think_tokens: int | None = None,
    ) -> None:
        """Wrap an embedder.

        Args:
            embedder: The model.
            name: What results call it; the organisation is added.
            think: For queries and symmetric tasks.
            think_documents: For documents.
            think_threshold: Gate probability above which an input thinks; None takes the model's.
            max_think_tokens: Longest thought; None takes the model's.

        Raises:
            ValueError: For "auto" without a fitted gate, and settings that contradict each other.
        """
        self.embedder = embedder
        self.think: dict[Side, ThinkMode] = {"query": think, "document": think_documents}
        self.options: dict[str, Any] = {"max_think_tokens": max_think_tokens}
        self.think_threshold = think_threshold
        self.usage = UsageBook(None)
        self.open_picture: Callable[[str], ImageSource] | None = None
        for side in self.think:  # says now what would stop the first task
            embedder.encode([], side=side, **self._think_options(side))
        self.meta = self._meta(name)
        self.mteb_model_meta = self.meta

    def encode(
        self,
        inputs: DataLoader[Any],
        *,
        task_metadata: TaskMetadata,
        hf_split: str,
        hf_subset: str,
        prompt_type: PromptType | None = None,
        **kwargs: Any,
    ) -> NDArray[np.float32]:
        """Return unit vectors (N, D) in the order of the inputs, the same on every process.

        Raises:
            ValueError: For an input that cannot be embedded, non-finite vectors, or a `precision`
                other than float32.
        """
        precision = kwargs.get("precision") or "float32"
        if precision != "float32":
            raise ValueError(
                f"precision = {precision!r}; expected 'float32'; mteb compares with cosines, leave "
                "it out"
            )
        side: Side = "document" if prompt_type == PromptType.document else "query"
        where = f"{task_metadata.name} {hf_split}/{hf_subset}: {side}"
        usage = Usage()
        reader = Reader(
            task_instruction(task_metadata, prompt_type),
            self._reserved_tokens(),
            self.open_picture,
            usage,
        )
        if "video" in getattr(inputs.dataset, "features", {}):
            inputs.collate_fn = FramesCollator(num_frames=FRAMES_PER_VIDEO)
        is_quiet = not kwargs.get("show_progress_bar", True)

        def share() -> tuple[NDArray[np.float32], Usage]:
            return self._embed(inputs, reader, side=side, where=where, is_quiet=is_quiet), usage

        vectors = assemble(on_all_processes(share), chunk_rows(inputs), usage)
        check_vectors(where, vectors, usage)
        self.usage.note(task_metadata.name, Account(hf_split, hf_subset, side), usage)
        return vectors

    def _embed(
        self, inputs: DataLoader[Any], reader: Reader, *, side: Side, where: str, is_quiet: bool
    ) -> NDArray[np.float32]:
        """Return the vectors of this process's chunks."""
        batch_size = inputs.batch_size or 1
        options = {**self.options, **self._think_options(side), "batch_size": batch_size}
        parts = [np.zeros((0, self.embedder.get_embedding_dimension()), np.float32)]
        rows, first = chunk_rows(inputs)[processes()[0]], 0
        for items in _calls(own_share(inputs), reader, description=where, is_quiet=is_quiet):
            try:
                details = self.embedder.encode(
                    items, side=side, return_details=True, show_progress_bar=False, **options
                )
            except InputError as error:
                row = rows[first + error.position]
                raise ValueError(f"{where} in row {row}: {error.problem}") from error
            reader.usage.count(details)
            parts.append(details.embeddings)
            first += len(items)
        return np.concatenate(parts)

    def _reserved_tokens(self) -> set[str]:
        model = self.embedder.model
        readouts = model.backbone.tokenizer.convert_ids_to_tokens(model.readout_ids)
        return set(model.backbone.placeholder_tokens()) | set(readouts)

    def _think_options(self, side: Side) -> dict[str, Any]:
        think = self.think[side]
        threshold = self.think_threshold if think == "auto" else None
        return {"think": think, "think_threshold": threshold}

    def _meta(self, name: str) -> ModelMeta:
        model, settings = self.embedder.model, {"think": self.think["query"]}
        if self.think["document"] != "never":
            settings["think_documents"] = self.think["document"]
        if self.think_threshold is not None:
            settings["think_threshold"] = str(self.think_threshold)
        if self.options["max_think_tokens"] is not None:
            settings["max_think_tokens"] = str(self.options["max_think_tokens"])
        known = {"text", "image", "video"}
        return ModelMeta.create_empty(
            overwrites={
                "name": f"twn-rl/{name}",
                "revision": model_revision(self.embedder),
                "modalities": [m for m in self.embedder.modalities if m in known],
                "similarity_fn_name": ScoringFunction.COSINE,
                "embed_dim": self.embedder.get_embedding_dimension(),
                "max_tokens": self.embedder.max_seq_length,
                "n_parameters": sum(p.numel() for p in model.parameters()),
                "framework": ["PyTorch", "Transformers", "safetensors"],
                "use_instructions": True,
                "adapted_from": model.config.backbone or None,
                "open_weights": True,
                "experiment_kwargs": settings,
            }
        )


def model_revision(embedder: ThinkingEmbedder) -> str:
    """Return a hash that changes whenever any input could get another vector."""
    return digest([Fingerprints(embedder.model).everything, embedder.max_seq_length])[:16]


def check_vectors(where: str, vectors: NDArray[np.float32], usage: Usage) -> None:
    """Refuse non-finite vectors (N, D); note and log how far they have collapsed.

    Raises:
        ValueError: If any is non-finite: a ranking of them can be perfect and means nothing.
    """
    is_bad = ~np.isfinite(vectors).all(axis=1)
    if is_bad.any():
        raise ValueError(
            f"{where}: {int(is_bad.sum())} of {len(vectors)} vectors are non-finite (first: row "
            f"{int(is_bad.argmax())}); expected finite ones; check dtype and checkpoint"
        )
    if len(vectors) < 2:
        return
    report = collapse_report(vectors[:: -(-len(vectors) // COLLAPSE_SAMPLE)])
    usage.mean_pairwise_cosine = report["mean_pairwise_cosine"]
    usage.effective_rank = report["effective_rank"]
    is_collapsed = report["mean_pairwise_cosine"] > COLLAPSED_COSINE
    if is_collapsed and len(vectors) >= COLLAPSE_FROM_VECTORS:
        logger.warning(
            "%s: %d vectors have collapsed: mean pairwise cosine %.4f (1 when all are one), "
            "effective rank %.2f of %d; scores of such vectors come from ties and rounding",
            *(where, len(vectors), report["mean_pairwise_cosine"]),
            *(report["effective_rank"], min(vectors.shape)),
        )


def _calls(
    loader: DataLoader[Any], reader: Reader, *, description: str, is_quiet: bool
) -> Iterator[list[Any]]:
    """Yield the items of `BATCHES_PER_CALL` batches at a time."""
    pending: list[Any] = []
    for index, batch in enumerate(tqdm(loader, desc=description, disable=is_quiet, leave=False)):
        pending += reader.items(batch)
        if (index + 1) % BATCHES_PER_CALL == 0:
            yield pending
            pending = []
    if pending:
        yield pending
