"""`ThinkingEmbedder`: inputs of any kind -> vectors, thinking where it helps. The public API.

Queries and documents, with and without thoughts, share one vector space: index documents without
thinking, and let queries think when the gate says so. Those are the defaults.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.inference.chooser import make_chooser
from twn_rl.inference.details import EncodeDetails, Ledger
from twn_rl.inference.inputs import InputError, InputRules, as_list, is_single, parse_input
from twn_rl.inference.options import EncodeOptions, QueryOptions, Side, SidedOptions, takes
from twn_rl.inference.reading_pass import ReadingPass
from twn_rl.inference.thought_cache import CotCache
from twn_rl.inference.thought_pool import ThoughtCache
from twn_rl.inference.vector_forms import as_float_rows
from twn_rl.inference.way import Way
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.limits import prompt_room
from twn_rl.modeling.model import DualLoraModel

# What reading depends on, and what is done to all ways at once.
_READING_OPTIONS = ("batch_size", "max_think_tokens", "on_bad_input", "prompt", "show_progress_bar")


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

    @takes(QueryOptions)
    def encode_query(self, inputs: Any, options: EncodeOptions) -> Any:
        """Return vectors of what searches; gate or policy decides who thinks. See `encode`."""
        return self._encode(inputs, "query", options)

    @takes(EncodeOptions)
    def encode_document(self, inputs: Any, options: EncodeOptions) -> Any:
        """Return vectors of what is found; nobody thinks unless asked for. See `encode`."""
        return self._encode(inputs, "document", options)

    @takes(SidedOptions)
    def encode(self, inputs: Any, options: SidedOptions) -> Any:
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
            options: Keyword arguments, see `EncodeOptions`; and `side`, see `SidedOptions`. Under
                "auto", a model with reason tokens and neither gate nor policy reads inputs as in
                training. Documents of a model with `latent_documents` have a latent thought
                wherever they have no written one.

        Returns:
            (N, D) float32 unit vectors as an array, (D,) for a single input; other forms by
            `options`; `EncodeDetails` with `return_details=True`.

        Raises:
            InputError: For an input that cannot be embedded, with its position.
            ValueError: For options that contradict each other or the model.
            TypeError: For unknown options.
        """
        return self._encode(inputs, options.side, options)

    def encode_ways(
        self, inputs: Any, ways: Mapping[str, EncodeOptions], *, side: Side = "query"
    ) -> dict[str, EncodeDetails]:
        """Return the details of one list of inputs under several options, by their names.

        Everything is read once: pictures, prompts, and what thoughts are written from.

        Args:
            inputs: A list, see `encode`.
            ways: Name -> options, which must agree in what reading depends on: `batch_size`,
                `max_think_tokens`, `on_bad_input`, `prompt` and `show_progress_bar`.
            side: See `SidedOptions`.

        Raises:
            InputError: For an input that cannot be embedded, with its position.
            ValueError: For options that contradict each other or the model.
        """
        for name in _READING_OPTIONS:
            values = {way: getattr(options, name) for way, options in ways.items()}
            if len(set(values.values())) != 1:
                raise ValueError(
                    f"{name} by way = {values}; expected at least one way and the same in all of "
                    "them, inputs are read once; change these options"
                )
        every = [replace(options, return_details=True) for options in ways.values()]
        return dict(zip(ways, self._details(inputs, side, every), strict=True))

    def _encode(self, inputs: Any, side: Side, options: EncodeOptions) -> Any:
        (details,) = self._details(inputs, side, [options])
        return details if options.return_details else details.embeddings

    def _details(
        self, inputs: Any, side: Side, every: Sequence[EncodeOptions]
    ) -> list[EncodeDetails]:
        """Embed under every one of some options, which agree in what reading depends on."""
        values, single, width = as_list(inputs), is_single(inputs), self.model.hidden_size
        choosers = [make_chooser(self.model, side, options, len(values)) for options in every]
        for options in every:
            if options.truncate_dim is not None and options.truncate_dim > width:
                raise ValueError(
                    f"truncate_dim = {options.truncate_dim}; expected at most the width {width}; "
                    "lower it or leave it out"
                )
        with self._turn:
            is_strict = every[0].on_bad_input == "raise"
            ledgers = [Ledger(len(values), width, is_strict=is_strict) for _ in every]
            items = self._items(values, every[0].prompt, ledgers)
            usable = sum(item is not None for item in items)
            ways = [
                Way(self.model, *parts, num_usable=usable, cache=self._cache)
                for parts in zip(every, choosers, ledgers, strict=True)
            ]
            # The same whether or not a call thinks: vectors must agree.
            asked = self._max_seq_length or self.model.config.max_length
            longest = self._longest_prompt(asked, every[0].max_think_tokens)
            limits = replace(self.model.limits, max_length=longest)
            ReadingPass(self.model, items, ways, limits=limits).run()
        for options, ledger in zip(every, ledgers, strict=True):
            ledger.finish(options, is_single=single, device=self.device)
        return [ledger.details for ledger in ledgers]

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

    @property
    def reserved_tokens(self) -> frozenset[str]:
        """Tokens that no text may hold: placeholders of pictures, read-outs, reason tokens."""
        backbone = self.model.backbone
        tail_ids = [*self.model.readout_ids, *self.model.reason_ids]
        tail = backbone.tokenizer.convert_ids_to_tokens(tail_ids)
        return frozenset(backbone.placeholder_tokens() | set(tail))

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

    def _items(
        self, values: list[Any], prompt: str | None, ledgers: Sequence[Ledger]
    ) -> list[Item | None]:
        rules = InputRules(
            instruction=prompt,
            is_multimodal=self.model.backbone.is_multimodal,
            reserved_tokens=self.reserved_tokens,
        )
        items: list[Item | None] = []
        for position, value in enumerate(values):
            try:
                items.append(parse_input(value, position, rules))
            except InputError as error:
                for ledger in ledgers:
                    ledger.refuse(error)
                items.append(None)
        return items


def _unit(vectors: Any) -> Tensor:
    return torch.nn.functional.normalize(as_float_rows(vectors), dim=-1)
