"""`MtebEncoder`: a model that thinks as an encoder of mteb 2.x.

Every process of a launch embeds its share of the inputs and gets all vectors, so that scores do
not depend on the number of processes.
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
    own_share,
    processes,
)
from twn_rl.evaluation.usage import Account, Usage, UsageBook
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import Side, ThinkMode
from twn_rl.metrics.ranking import sampled_collapse
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.runtime.processes import on_all_processes
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
        self.usage = UsageBook(None)
        self.open_picture: Callable[[str], ImageSource] | None = None
        modes: dict[Side, ThinkMode] = {"query": think, "document": think_documents}
        self.options: dict[Side, dict[str, Any]] = {
            side: {
                "side": side,
                "think": mode,
                "think_threshold": think_threshold if mode == "auto" else None,
                "max_think_tokens": max_think_tokens,
                "return_details": True,
                "show_progress_bar": False,
            }
            for side, mode in modes.items()
        }
        for options in self.options.values():  # says now what would stop the first task
            embedder.encode([], **options)
        settings = {
            "think": think,
            "think_documents": None if think_documents == "never" else think_documents,
            "think_threshold": think_threshold,
            "max_think_tokens": max_think_tokens,
        }
        self.meta = self.mteb_model_meta = _meta(
            embedder,
            name,
            {key: str(value) for key, value in settings.items() if value is not None},
        )

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
            ValueError: For an input that cannot be embedded, also if its vector is not finite, or a
                `precision` other than float32.
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
            self.open_picture,
            usage,
        )
        if "video" in getattr(inputs.dataset, "features", {}):
            inputs.collate_fn = FramesCollator(num_frames=FRAMES_PER_VIDEO)
        is_quiet = not kwargs.get("show_progress_bar", True)

        def share() -> tuple[NDArray[np.float32], Usage]:
            return self._embed(inputs, reader, side=side, where=where, is_quiet=is_quiet), usage

        vectors = assemble(on_all_processes(share), chunk_rows(inputs), usage)
        note_collapse(where, vectors, usage)
        self.usage.note(task_metadata.name, Account(hf_split, hf_subset, side), usage)
        return vectors

    def _embed(
        self, inputs: DataLoader[Any], reader: Reader, *, side: Side, where: str, is_quiet: bool
    ) -> NDArray[np.float32]:
        """Return the vectors of this process's chunks."""
        options = {**self.options[side], "batch_size": inputs.batch_size or 1}
        parts = [np.zeros((0, self.embedder.get_embedding_dimension()), np.float32)]
        rows, first = chunk_rows(inputs)[processes()[0]], 0
        for items in _calls(own_share(inputs), reader, description=where, is_quiet=is_quiet):
            try:
                details = self.embedder.encode(items, **options)
            except InputError as error:
                row = rows[first + error.position]
                raise ValueError(f"{where} in row {row}: {error.problem}") from error
            reader.usage.count(details)
            parts.append(details.embeddings)
            first += len(items)
        return np.concatenate(parts)


def _meta(embedder: ThinkingEmbedder, name: str, settings: dict[str, str]) -> ModelMeta:
    known = {"text", "image", "video"}
    return ModelMeta.create_empty(
        overwrites={
            "name": f"twn-rl/{name}",
            "revision": model_revision(embedder),
            "modalities": [m for m in embedder.modalities if m in known],
            "similarity_fn_name": ScoringFunction.COSINE,
            "embed_dim": embedder.get_embedding_dimension(),
            "max_tokens": embedder.max_seq_length,
            "n_parameters": sum(p.numel() for p in embedder.model.parameters()),
            "framework": ["PyTorch", "Transformers", "safetensors"],
            "use_instructions": True,
            "adapted_from": embedder.model.config.backbone or None,
            "open_weights": True,
            "experiment_kwargs": settings,
        }
    )


def model_revision(embedder: ThinkingEmbedder) -> str:
    """Return a hash that changes whenever any input could get another vector."""
    return digest([Fingerprints(embedder.model).everything, embedder.max_seq_length])[:16]


def note_collapse(where: str, vectors: NDArray[np.float32], usage: Usage) -> None:
    """Note how far finite vectors (N, D) have collapsed, and warn if that is all the way."""
    report = sampled_collapse(vectors)
    if not report:
        return
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
    for index, batch in enumerate(
        tqdm(loader, desc=description, disable=is_quiet or None, leave=False)
    ):
        pending += reader.items(batch)
        if (index + 1) % BATCHES_PER_CALL == 0:
            yield pending
            pending = []
    if pending:
        yield pending
