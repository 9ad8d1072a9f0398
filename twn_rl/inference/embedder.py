"""`ThinkingEmbedder`: inputs of any kind -> vectors, thinking where it helps. The public API.

Queries and documents, with and without thoughts, share one vector space: index documents without
thinking, and let queries think when the gate says so. Those are the defaults.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.inference.inputs import InputError, InputRules, as_list, is_single, parse_input
from twn_rl.inference.ledger import Ledger
from twn_rl.inference.options import EncodeOptions, Think, think_mask
from twn_rl.inference.outputs import as_float_rows, finish
from twn_rl.inference.scheduler import Chooser, EncodeRun
from twn_rl.inference.thought_cache import CotCache
from twn_rl.inference.thought_pool import ThoughtCache
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import THRESHOLD_FIELDS
from twn_rl.modeling.limits import prompt_room
from twn_rl.modeling.model import DualLoraModel

Side = Literal["query", "document"]
SIDES = ("query", "document")


class ThinkingEmbedder:
    """Embeds texts, pictures and both, in sentence-transformers' manner.

    Calls from several threads take turns.

    Attributes:
        model: The model underneath.
        cot_cache: Thoughts on disk, or None.
    """

    def __init__(self, model: DualLoraModel, *, cot_cache_dir: str | Path | None = None) -> None:
        """Serve a model that is in memory.

        Args:
            model: The model; its weights must not change while it is served.
            cot_cache_dir: Folder to keep thoughts in, so that the same input is thought about
                once. They are kept by content, reasoning adapter and decoding settings, so several
                models may share a folder.
        """
        self.model = model
        self.cot_cache: CotCache | None = None
        self._cache: ThoughtCache | None = None
        self._max_seq_length: int | None = None
        self._turn = threading.RLock()
        if cot_cache_dir is not None:
            self.cot_cache = CotCache(cot_cache_dir)
            self._cache = ThoughtCache(self.cot_cache, Fingerprints(model).thoughts)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backbone: str | Path | Backbone | None = None,
        cot_cache_dir: str | Path | None = None,
    ) -> ThinkingEmbedder:
        """Return the embedder of a checkpoint folder.

        Args:
            path: Folder written by a recipe or by `DualLoraModel.save_pretrained`.
            device: Where to run; None takes the first GPU if there is one.
            dtype: Parameter type; None keeps the stored one.
            backbone: Backbone to use instead of the one the checkpoint names.
            cot_cache_dir: See the class.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model = DualLoraModel.from_pretrained(path, backbone=backbone, dtype=dtype)
        return cls(model.to(device), cot_cache_dir=cot_cache_dir)

    def encode_query(self, inputs: Any, *, think: Think = "auto", **options: Any) -> Any:
        """Return vectors of what searches; gate or policy decides who thinks. See `encode`."""
        return self.encode(inputs, side="query", think=think, **options)

    def encode_document(self, inputs: Any, *, think: Think = "never", **options: Any) -> Any:
        """Return vectors of what is found; nobody thinks unless asked for. See `encode`."""
        return self.encode(inputs, side="document", think=think, **options)

    def encode(
        self, inputs: Any, *, side: Side = "query", think: Think = "never", **options: Any
    ) -> Any:
        """Return one vector per input, in the order of the inputs.

        A vector depends on its input and the options alone, never on the other inputs (but for
        who thinks under `think_rate`). Pictures and prompts are read once per call, also by inputs
        that think. A truncated or malformed thought is left out; without any usable one an input
        keeps its no-think vector. Both are counted in the details and logged.

        Args:
            inputs: One input or a list: a string (always text, also if a file has that name), a
                `PIL.Image`, a `pathlib.Path` of a picture, a dict with some of "text", "image",
                "images", "video" (its frames) and "instruction", chat messages (one user message,
                before it perhaps a system message, which is the instruction), or an `Item`.
                Remote URLs are refused.
            side: "query" or "document": whose gate is asked; the policy decides about queries.
            think: "auto", "always", "never", "latent" (the model's reason tokens instead of a
                written thought; one pass, no tokens), or one bool per input. "auto" asks the side's
                gate, or the policy; a model with reason tokens and neither of the two reads inputs
                as in training. Documents of a model with `latent_documents` have a latent thought
                wherever they have no written one.
            options: Fields of `EncodeOptions`.

        Returns:
            (N, D) float32 unit vectors as an array, (D,) for a single input; other forms by
            `options`; `EncodeDetails` with `return_details=True`.

        Raises:
            InputError: For an input that cannot be embedded, with its position.
            ValueError: For options that contradict each other or the model.
            TypeError: For unknown options.
        """
        settings = EncodeOptions.from_arguments({"think": think, **options})
        values, single = as_list(inputs), is_single(inputs)
        chooser = self._chooser(side, settings, len(values))
        self._check_width(settings)
        with self._turn:
            width, is_strict = self.model.hidden_size, settings.on_bad_input == "raise"
            ledger = Ledger(len(values), width, is_strict=is_strict)
            run = EncodeRun(
                self.model,
                self._items(values, settings, ledger),
                settings,
                chooser,
                ledger,
                limits=replace(self.model.limits, max_length=self._prompt_limit(settings)),
                cache=self._cache,
            )
            run.run()
        ledger.details.log()
        vectors = finish(ledger.states, settings, is_single=single, device=self.device)
        ledger.details.embeddings = vectors
        return ledger.details if settings.return_details else vectors

    def similarity(self, queries: Any, documents: Any) -> Tensor:
        """Return cosine similarities (N, M) of float vectors (N, D) and (M, D); one may be (D,)."""
        rows = [_unit(vectors) for vectors in (queries, documents)]
        return rows[0] @ rows[1].to(rows[0].device).T

    def similarity_pairwise(self, queries: Any, documents: Any) -> Tensor:
        """Return the cosine similarity (N,) of each query to the document in the same place."""
        rows = [_unit(vectors) for vectors in (queries, documents)]
        if len(rows[0]) != len(rows[1]):
            raise ValueError(
                f"{len(rows[0])} queries and {len(rows[1])} documents; expected as many of both; "
                "use similarity for all pairs"
            )
        return (rows[0] * rows[1].to(rows[0].device)).sum(dim=1)

    @property
    def device(self) -> torch.device:
        """Where the model runs."""
        return self.model.device

    @property
    def modalities(self) -> list[str]:
        """What an input may hold."""
        pictures = ["image", "video"] if self.model.backbone.is_multimodal else []
        return ["text", *pictures, "message"]

    def supports(self, modality: str) -> bool:
        """Return whether an input may hold "text", "image", "video" or be a "message"."""
        return modality in self.modalities

    def get_embedding_dimension(self) -> int:
        """Return the width D of a vector."""
        return self.model.hidden_size

    @property
    def max_seq_length(self) -> int | None:
        """Longest prompt in tokens; longer texts are cut. None if nothing names a limit.

        By default the model's `max_length`, but at most the backbone's context, less the model's
        longest thought and the read-outs.
        """
        if self._max_seq_length is not None:
            return self._max_seq_length
        return _least(self.model.config.max_length, prompt_room(*self._parts))

    @max_seq_length.setter
    def max_seq_length(self, tokens: int | None) -> None:
        if tokens is not None and tokens < 1:
            raise ValueError(
                f"max_seq_length = {tokens}; expected at least 1, or None for the model's "
                "max_length; set another number"
            )
        self._max_seq_length = tokens

    @property
    def _parts(self) -> tuple[Backbone, TwnConfig]:
        return self.model.backbone, self.model.config

    def _prompt_limit(self, options: EncodeOptions) -> int | None:
        """Return the longest prompt of a call, whether or not it thinks: vectors must agree."""
        asked = self._max_seq_length
        limit = self.model.config.max_length if asked is None else asked
        return _least(limit, prompt_room(*self._parts, options.max_think_tokens))

    def _items(
        self, values: list[Any], options: EncodeOptions, ledger: Ledger
    ) -> list[Item | None]:
        backbone = self.model.backbone
        tail_ids = [*self.model.readout_ids, *self.model.reason_ids]
        tail = backbone.tokenizer.convert_ids_to_tokens(tail_ids)
        rules = InputRules(
            instruction=options.prompt,
            is_multimodal=backbone.is_multimodal,
            reserved_tokens=frozenset(backbone.placeholder_tokens() | set(tail)),
        )
        items: list[Item | None] = []
        for position, value in enumerate(values):
            try:
                items.append(parse_input(value, position, rules))
            except InputError as error:
                ledger.refuse(error)
                items.append(None)
        return items

    def _chooser(self, side: str, options: EncodeOptions, count: int) -> Chooser:
        if side not in SIDES:
            raise ValueError(f"side = {side!r}; expected one of {SIDES}; correct it")
        mask = think_mask(options.think, count)
        is_latent = side == "document" and self.model.config.latent_documents
        if isinstance(options.think, str) and options.think == "latent":
            self._check_reason_tokens()
            is_latent = True
        if mask is not None:
            return Chooser(mask=mask, is_latent=is_latent)
        if self._is_policy_asked(side, options):
            threshold = options.think_threshold
            return Chooser(
                threshold=self.model.config.policy_threshold if threshold is None else threshold,
                is_latent=is_latent,
            )
        if side not in self.model.gates and self.model.reason_ids and options.is_ungated:
            return Chooser(mask=[False] * count, is_latent=is_latent or side == "query")
        if side not in self.model.gates:
            raise ValueError(
                f"think = 'auto' but the model has no {side} gate (gates: "
                f"{sorted(self.model.gates)}); expected a fitted one; run recipes/gate_embed.py on "
                "this checkpoint, or pass think='always', 'never' or one bool per input"
            )
        gate: Any = self.model.gates[side]
        threshold = options.think_threshold
        if threshold is None:
            threshold = getattr(self.model.config, THRESHOLD_FIELDS[side])
        if threshold is None and options.think_rate is None:
            raise ValueError(
                f"{THRESHOLD_FIELDS[side]} = None; expected the probability above which a {side} "
                "thinks; fit it with recipes/gate_embed.py, or pass think_threshold or think_rate"
            )
        return Chooser(gate=gate.probability, threshold=threshold, is_latent=is_latent)

    def _check_reason_tokens(self) -> None:
        if not self.model.reason_ids:
            raise ValueError(
                "think = 'latent' but the model has num_reason_tokens = 0; expected at least one; "
                "train one with recipes/latent_embed.py, or pass think='always', 'never' or 'auto'"
            )

    def _is_policy_asked(self, side: str, options: EncodeOptions) -> bool:
        """Tell whether the policy decides; it learned to about queries only."""
        if side == "document" and options.think_decision is None:
            return False
        is_asked = (options.think_decision or self.model.config.thinking_decision) == "policy"
        if is_asked and (side == "document" or not self.model.is_policy_deciding):
            raise ValueError(
                f"think_decision = 'policy' for the {side} side of a model with thinking_decision "
                f"= {self.model.config.thinking_decision!r}; expected queries and a policy that "
                "learned to decide; train one with recipes/adaptive_embed.py, or pass "
                "think_decision='gate', think='always' or 'never'"
            )
        return is_asked

    def _check_width(self, options: EncodeOptions) -> None:
        width = self.model.hidden_size
        if options.truncate_dim is not None and options.truncate_dim > width:
            raise ValueError(
                f"truncate_dim = {options.truncate_dim}; expected at most the width {width}; "
                "lower it or leave it out"
            )


def _least(*limits: int | None) -> int | None:
    """Return the smallest of the limits there are; None if there is none."""
    return min((limit for limit in limits if limit is not None), default=None)


def _unit(vectors: Any) -> Tensor:
    return torch.nn.functional.normalize(as_float_rows(vectors), dim=-1)
