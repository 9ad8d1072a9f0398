"""What sentence-transformers' functions ask of a model besides its vectors; embeds nothing.

Its evaluators and utilities read these properties and call these methods. Names and arguments are
theirs; `tests/inference/test_sentence_transformers.py` walks their signatures.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import torch
from torch import Tensor

from twn_rl.inference.inputs import InputRules
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.process_pool import EncodePool, start_pool
from twn_rl.inference.vector_forms import as_float_rows
from twn_rl.modeling.backbone_names import plain_name
from twn_rl.modeling.limits import PromptLimits, prompt_room
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.model_card import CardNotes, write_card
from twn_rl.modeling.publishing import push_folder
from twn_rl.modeling.sentence_transformers_files import write_settings

QUERY_PROMPTS = ("query",)
DOCUMENT_PROMPTS = ("document", "passage", "corpus")
SIMILARITY = "cosine"


class ServedModel:
    """A model with what its users set for all calls: prompts, limits, device.

    Attributes:
        model: The model underneath.
        prompts: Name -> instruction for inputs that bring none; "" is no instruction.
        default_prompt_name: Which of them `encode` uses if it is given none.
        truncate_dim: How many numbers of a vector calls keep that do not say; None is all.
        model_card_data: What the card says beyond the folder: licence, what evaluators found.
        source: Folder the model was loaded from, whose run its card describes; None in memory.
    """

    def __init__(
        self,
        model: DualLoraModel,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        """Set what holds for all calls."""
        self.model = model
        self.prompts = {"query": "", "document": "", **(prompts or {})}
        self.default_prompt_name, self.truncate_dim = default_prompt_name, truncate_dim
        self.model_card_data = CardNotes(plain_name(model.config.backbone))
        self.source: Path | None = None
        self._max_seq_length: int | None = None
        if default_prompt_name is not None:
            self._prompt(default_prompt_name)

    def completed(self, options: EncodeOptions, prompt_names: Sequence[str] = ()) -> EncodeOptions:
        """Return the options of a call, what it leaves open filled in from the model.

        Args:
            options: Of the call.
            prompt_names: Prompts to use if it names none; the first that the model has.
        """
        prompt, dim = options.prompt, options.truncate_dim
        if prompt is None:
            known = [name for name in prompt_names if name in self.prompts]
            name = options.prompt_name or (known[0] if known else self.default_prompt_name)
            prompt = None if name is None else self._prompt(name)
        return replace(
            options, prompt=prompt, truncate_dim=self.truncate_dim if dim is None else dim
        )

    def _prompt(self, name: str) -> str:
        if name not in self.prompts:
            raise ValueError(
                f"prompt_name = {name!r}; expected one of {sorted(self.prompts)}; pass prompt=..., "
                "or add it to the model's prompts"
            )
        return self.prompts[name]

    def similarity(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return cosine similarities (N, M) of float vectors (N, D) and (M, D); one may be (D,)."""
        rows = [_unit(vectors) for vectors in (embeddings1, embeddings2)]
        return rows[0] @ rows[1].to(rows[0].device).T

    def similarity_pairwise(self, embeddings1: Any, embeddings2: Any) -> Tensor:
        """Return the cosine similarity (N,) of each vector to the one in the same place."""
        rows = [_unit(vectors) for vectors in (embeddings1, embeddings2)]
        if len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"{len(rows[0])} queries and {len(rows[1])} documents; expected as many of both; "
                "use similarity for all pairs"
            )
        return (rows[0] * rows[1].to(rows[0].device)).sum(dim=1)

    @property
    def similarity_fn_name(self) -> str:
        """What `similarity` computes: always "cosine"."""
        return SIMILARITY

    @similarity_fn_name.setter
    def similarity_fn_name(self, name: str | None) -> None:
        if getattr(name, "value", name) not in (None, SIMILARITY):
            raise ValueError(
                f"similarity_fn_name = {name!r}; expected 'cosine'; vectors are of unit length, so "
                "that 'dot' is the same number and distances sort alike; leave it"
            )

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    def to(self, device: str | torch.device) -> Self:
        """Move the model."""
        self.model.to(device)
        return self

    @property
    def tokenizer(self) -> Any:
        """The backbone's tokenizer, read-out tokens included."""
        return self.model.tokenizer

    @property
    def processor(self) -> Any:
        """The backbone's processor; of a text model, its tokenizer."""
        return self.model.processor

    @property
    def modalities(self) -> list[str]:
        """What an input may hold."""
        pictures = ["image", "video"] if self.model.backbone.is_multimodal else []
        return ["text", *pictures, "message"]

    def supports(self, modality: str | tuple[str, ...]) -> bool:
        """Return whether an input may hold "text", "image", "video" or be a "message".

        Of a tuple: whether one input may hold all of them.
        """
        asked = (modality,) if isinstance(modality, str) else modality
        is_one = isinstance(modality, str)
        return all(part in self.modalities and (is_one or part != "message") for part in asked)

    def get_embedding_dimension(self) -> int:
        """Return the width D of a vector, `truncate_dim` applied."""
        return min(self.model.hidden_size, self.truncate_dim or self.model.hidden_size)

    @contextmanager
    def truncate_embeddings(self, truncate_dim: int | None) -> Iterator[None]:
        """Keep this many numbers of the vectors of calls in the body; None keeps all."""
        before, self.truncate_dim = self.truncate_dim, truncate_dim
        try:
            yield
        finally:
            self.truncate_dim = before

    @property
    def max_seq_length(self) -> int | None:
        """Longest prompt in tokens; longer texts are cut. None if nothing names a limit.

        By default the model's `max_length`, but at most the backbone's context, less the model's
        longest thought and the read-outs.
        """
        if self._max_seq_length is not None:
            return self._max_seq_length
        return self._longest_prompt(self.model.config.max_length)

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(
                f"max_seq_length = {tokens}; expected at least 1, or None for the model's "
                "max_length; set another number"
            )
        self._max_seq_length = tokens

    def _longest_prompt(self, asked: int | None, max_think_tokens: int | None = None) -> int | None:
        """Return what was asked for, but at most what the backbone's context leaves."""
        room = prompt_room(self.model.backbone, self.model.config, max_think_tokens)
        return min((limit for limit in (asked, room) if limit is not None), default=None)

    def prompt_limits(self, max_think_tokens: int | None = None) -> PromptLimits:
        """Return what texts are cut and pictures are scaled to; the counts are the model's.

        The same whether or not a call thinks: vectors must agree.

        Args:
            max_think_tokens: Longest thought that must still fit; None is the model's.
        """
        asked = self._max_seq_length or self.model.config.max_length
        longest = self._longest_prompt(asked, max_think_tokens)
        return replace(self.model.limits, max_length=longest)

    def input_rules(self, prompt: str | None = None) -> InputRules:
        """Return what inputs are checked for; `prompt` is the instruction of those without."""
        return InputRules(instruction=prompt, is_multimodal=self.model.backbone.is_multimodal)

    def start_multi_process_pool(
        self, target_devices: Sequence[str | torch.device] | None = None
    ) -> EncodePool:
        """Return processes to embed in, for the argument `pool`; the model moves to the CPU.

        Args:
            target_devices: One process for each; None takes all GPUs, or the CPU four times.
        """
        return start_pool(self, target_devices)  # type: ignore[arg-type]

    @staticmethod
    def stop_multi_process_pool(pool: EncodePool) -> None:
        """End the processes."""
        pool.stop()

    def save_pretrained(
        self,
        path: str | Path,
        model_name: str | None = None,
        create_model_card: bool = True,
        train_datasets: Sequence[str] | None = None,
        safe_serialization: bool = True,
    ) -> None:
        """Write the model with its prompts, as a folder that sentence-transformers loads, too.

        Args:
            path: Folder; created if needed.
            model_name: What its card says to load it by; the folder's name if None.
            create_model_card: Write `README.md`, unless somebody else's is there.
            train_datasets: Names of what it was trained on, for the card.
            safe_serialization: Always True: nothing else is written.

        Raises:
            ValueError: For `safe_serialization=False`.
        """
        if not safe_serialization:
            raise ValueError(
                "safe_serialization = False; expected True: weights are written as safetensors "
                "only; leave it out"
            )
        folder = Path(path)
        self.model.save_pretrained(folder)
        write_settings(folder, self.prompts, self.default_prompt_name, self.truncate_dim)
        notes = self.model_card_data
        if train_datasets:
            notes = replace(notes, train_datasets=list(train_datasets))
        if create_model_card:
            write_card(folder, name=model_name, run=self.source, notes=notes)

    def push_to_hub(
        self,
        repo_id: str,
        token: str | bool | None = None,
        private: bool | None = None,
        safe_serialization: bool = True,
        commit_message: str | None = None,
        local_model_path: str | Path | None = None,
        exist_ok: bool = False,
        replace_model_card: bool = False,
        train_datasets: Sequence[str] | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload the model and its card to the hub; return the address of the commit.

        Arguments are those of `save_pretrained` and `twn_rl.modeling.publishing.push_folder`;
        `local_model_path` is the folder of a model to upload instead of this one.

        Raises:
            OSError: If the hub refuses.
        """
        settings: dict[str, Any] = {
            "commit_message": commit_message or "Add model",
            "token": token,
            "private": private,
            "exist_ok": exist_ok,
            "replace_model_card": replace_model_card,
            "revision": revision,
            "create_pr": create_pr,
        }
        if local_model_path is not None:
            return push_folder(local_model_path, repo_id, **settings)
        with TemporaryDirectory() as aside:
            self.save_pretrained(
                aside, repo_id, train_datasets=train_datasets, safe_serialization=safe_serialization
            )
            return push_folder(aside, repo_id, **settings)

    def evaluate(self, evaluator: Any, output_path: str | None = None) -> Any:
        """Return what one of sentence-transformers' evaluators finds, and note it for the card."""
        return evaluator(self, output_path)


def _unit(vectors: Any) -> Tensor:
    return torch.nn.functional.normalize(as_float_rows(vectors), dim=-1)
