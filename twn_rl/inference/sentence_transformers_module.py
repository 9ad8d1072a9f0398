"""`ThinkingModule`: a checkpoint as a module of sentence-transformers, which then thinks.

`SentenceTransformer(folder)` loads it without `trust_remote_code` where twn_rl has been imported:
the code that runs is this file, and a checkpoint holds none. Needs the extra `st`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import gettempdir
from typing import Any, ClassVar, Self

import torch
from sentence_transformers.base.modules import InputModule
from torch import Tensor

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import Side
from twn_rl.modeling.hub import HubAccess
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.publishing import forget_ways
from twn_rl.modeling.sentence_transformers_import import MODULE_CLASS

# What `SentenceTransformer.encode` may be told besides its own arguments. Left out is what asks
# about the other inputs of a call or their positions: it sorts them and passes on batches.
THINKING = (
    "think",
    "think_decision",
    "think_threshold",
    "keep",
    "max_think_tokens",
    "do_sample",
    "temperature",
    "top_p",
    "num_thoughts",
    "seed",
)


class ThinkingModule(InputModule):
    """The only module of a `SentenceTransformer` that thinks; vectors are `ThinkingEmbedder`'s.

    `encode_query` asks the gate by default, `encode_document` and `encode` do not think;
    `think="never"` and the other options in `THINKING` say otherwise. With `output_value=None` each
    input has a "sentence_embedding" (D,), "think_tokens" and a "gate_probability", NaN where the
    gate was not asked.

    Attributes:
        embedder: What embeds.
        model: The model underneath.
    """

    forward_kwargs: ClassVar[set[str]] = {"task", *THINKING}  # type: ignore[misc]

    def __init__(self, embedder: ThinkingEmbedder) -> None:
        """Serve an embedder; its prompts are left to sentence-transformers."""
        super().__init__()
        self.embedder, self.model = embedder, embedder.model

    @classmethod
    def load(
        cls,
        model_name_or_path: str,
        subfolder: str = "",
        token: bool | str | None = None,
        cache_folder: str | None = None,
        revision: str | None = None,
        local_files_only: bool = False,
        init_defaults: dict[str, Any] | None = None,
        model_kwargs: Mapping[str, Any] | None = None,
        **_: Any,
    ) -> Self:
        """Return the module of a checkpoint.

        Args:
            model_name_or_path: Folder.
            subfolder: Always "": the module is the folder itself.
            token: Of the hub.
            cache_folder: Where files of the hub lie.
            revision: Commit on the hub.
            local_files_only: Ask no hub.
            init_defaults: Of their conversions of models; unused.
            model_kwargs: `dtype` is taken, and `backbone`, to use another than the checkpoint's.

        Raises:
            ValueError: For other `model_kwargs`.
        """
        options = dict(model_kwargs or {})
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        backbone = options.pop("backbone", None)
        if options:
            raise ValueError(
                f"model_kwargs = {sorted(options)}; expected only dtype and backbone; remove the "
                "others"
            )
        access = HubAccess(token, cache_folder, local_files_only)
        model = DualLoraModel.from_pretrained(
            model_name_or_path, dtype=dtype, backbone=backbone, revision=revision, access=access
        )
        return cls(ThinkingEmbedder(model))

    def save(self, output_path: str, *args: Any, safe_serialization: bool = True, **_: Any) -> None:
        """Write the checkpoint, as safetensors whatever is asked for.

        What is saved under the system's temporary folder is on its way to the hub: it names no way
        to a backbone elsewhere on this machine.
        """
        self.model.save_pretrained(output_path)
        folder, temporary = Path(output_path).resolve(), Path(gettempdir()).resolve()
        backbone = Path(self.model.config.backbone).resolve()
        if folder.is_relative_to(temporary) and not backbone.is_relative_to(temporary):
            forget_ways(folder, folder)

    def preprocess(
        self, inputs: Sequence[Any], prompt: str | None = None, **_: Any
    ) -> dict[str, Any]:
        """Return the inputs as they are: what a prompt holds depends on who thinks."""
        return {"inputs": list(inputs), "prompt": prompt or None}

    def forward(
        self, features: dict[str, Any], task: str | None = None, **options: Any
    ) -> dict[str, Any]:
        """Return the features with "sentence_embedding" (N, D), float32 and of unit length.

        Raises:
            RuntimeError: In training: vectors of `encode` have no gradient.
            ValueError: For inputs and options that `ThinkingEmbedder` refuses.
        """
        if self.training and torch.is_grad_enabled():
            raise RuntimeError(
                "a ThinkingModule is asked for a gradient; expected calls of encode; train with "
                "twn-rl sft and twn-rl grpo, and load the result here"
            )
        inputs = features["inputs"]
        if not isinstance(options.get("think", ""), str):
            raise ValueError(
                f"think = {str(options['think'])[:80]}; expected one mode for all inputs, which "
                "SentenceTransformer sorts; pass lists to ThinkingEmbedder"
            )
        options.setdefault("think", "auto" if task == "query" else "never")
        side: Side = "document" if task == "document" else "query"
        details = self.embedder.encode(
            inputs,
            prompt=features["prompt"],
            batch_size=max(1, len(inputs)),
            show_progress_bar=False,
            side=side,
            return_details=True,
            **options,
        )
        probabilities = [float("nan") if p is None else p for p in details.gate_probabilities]
        return {
            **features,
            "sentence_embedding": self._tensor(details.embeddings),
            "think_tokens": self._tensor(details.think_tokens),
            "gate_probability": self._tensor(probabilities),
        }

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, device=self.embedder.device)

    def get_embedding_dimension(self) -> int:
        """Return the width D of a vector."""
        return self.embedder.get_embedding_dimension()

    @property
    def modalities(self) -> list[Any]:
        """What an input may hold."""
        return self.embedder.modalities

    @property
    def max_seq_length(self) -> int | None:
        """Longest prompt in tokens; see `ThinkingEmbedder.max_seq_length`."""
        return self.embedder.max_seq_length

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        self.embedder.max_seq_length = tokens

    @property
    def tokenizer(self) -> Any:  # type: ignore[override]
        """The backbone's tokenizer."""
        return self.embedder.tokenizer

    @property
    def processor(self) -> Any:
        """The backbone's processor."""
        return self.embedder.processor


assert f"{ThinkingModule.__module__}.{ThinkingModule.__name__}" == MODULE_CLASS
