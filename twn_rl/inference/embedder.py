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

from twn_rl.data.record import Item
from twn_rl.inference.chooser import make_chooser
from twn_rl.inference.details import EncodeDetails, Ledger
from twn_rl.inference.inputs import (
    InputError,
    as_list,
    is_single,
    parse_input,
    warn_of_file_names,
)
from twn_rl.inference.options import EncodeOptions, QueryOptions, Side, SidedOptions, takes
from twn_rl.inference.process_pool import encode_in_pool
from twn_rl.inference.reading_pass import ReadingPass
from twn_rl.inference.served_model import DOCUMENT_PROMPTS, QUERY_PROMPTS, ServedModel
from twn_rl.inference.thought_cache import CotCache
from twn_rl.inference.thought_pool import ThoughtCache
from twn_rl.inference.way import Way
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.hub import HubAccess, model_folder
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.sentence_transformers_files import read_settings

# What reading depends on, and what is done to all ways at once.
_ONE_PLACE = ("device", "pool")
_READING_OPTIONS = (
    "batch_size", "max_think_tokens", "on_bad_input", "prompt", "show_progress_bar", *_ONE_PLACE,
)  # fmt: skip


class ThinkingEmbedder(ServedModel):
    """Embeds texts, pictures and both, in sentence-transformers' manner.

    Calls from several threads take turns.

    Attributes:
        cot_cache: Thoughts on disk, or None.
        turn: Held by whoever uses the model.
    """

    def __init__(
        self,
        model: DualLoraModel,
        *,
        cot_cache_dir: str | Path | None = None,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
    ) -> None:
        """Serve a model that is in memory.

        Args:
            model: The model; its weights must not change while it is served.
            cot_cache_dir: Folder to keep thoughts in, so that the same input is thought about
                once. They are kept by content, reasoning adapter and decoding settings, so several
                models may share a folder.
            prompts: Name -> instruction, see `ServedModel`.
            default_prompt_name: Which of them `encode` uses if it is given none.
            truncate_dim: How many numbers of a vector to keep; None keeps all.
        """
        super().__init__(model, prompts, default_prompt_name, truncate_dim)
        self.cot_cache: CotCache | None = None
        self._cache: ThoughtCache | None = None
        self.turn = threading.RLock()
        if cot_cache_dir is not None:
            self.cot_cache = CotCache(cot_cache_dir)
            self._cache = ThoughtCache(self.cot_cache, Fingerprints(model).thoughts)

    def __getstate__(self) -> dict[str, Any]:
        # Other processes get what they need to make locks and connections of their own.
        state = {name: value for name, value in vars(self).items() if name != "turn"}
        folder = self.cot_cache.path.parent if self.cot_cache else None
        return {**state, "cot_cache": folder, "_cache": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self.turn = threading.RLock()
        if state["cot_cache"] is not None:
            self.cot_cache = CotCache(state["cot_cache"])
            self._cache = ThoughtCache(self.cot_cache, Fingerprints(self.model).thoughts)

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        backbone: str | Path | Backbone | None = None,
        cot_cache_dir: str | Path | None = None,
        accept_other_backbone: bool = False,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_folder: str | Path | None = None,
        local_files_only: bool = False,
        prompts: Mapping[str, str] | None = None,
        default_prompt_name: str | None = None,
        truncate_dim: int | None = None,
    ) -> ThinkingEmbedder:
        """Return the embedder of a checkpoint folder or of a model on the hub.

        Args:
            path: Folder written by a recipe or by `save_pretrained`, or "owner/name" on the hub.
            device: Where to run; None takes the first GPU if there is one.
            dtype: Parameter type; None keeps the stored one.
            backbone: Backbone to use instead of the one the checkpoint names.
            cot_cache_dir: See the class.
            accept_other_backbone: Load although the backbone's weights are not those the checkpoint
                was trained on.
            revision: Commit, tag or branch on the hub.
            token: Access token of the hub; None takes the stored one.
            cache_folder: Where files of the hub are kept; None takes its own cache.
            local_files_only: Take what is in the cache and ask nobody.
            prompts: More than the stored ones, or others, by their names.
            default_prompt_name: Another than the stored one.
            truncate_dim: Another than the stored one.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        access = HubAccess(token, cache_folder, local_files_only)
        folder = model_folder(path, revision, access)
        model = DualLoraModel.from_pretrained(
            folder,
            backbone=backbone,
            dtype=dtype,
            accept_other_backbone=accept_other_backbone,
            access=access,
        )
        stored = read_settings(folder)
        embedder = cls(
            model.to(device),
            cot_cache_dir=cot_cache_dir,
            prompts={**stored.get("prompts", {}), **(prompts or {})},
            default_prompt_name=default_prompt_name or stored.get("default_prompt_name"),
            truncate_dim=truncate_dim or stored.get("truncate_dim"),
        )
        embedder.source = folder
        return embedder

    @takes(QueryOptions)
    def encode_query(self, inputs: Any, options: EncodeOptions) -> Any:
        """Return vectors of what searches; gate or policy decides who thinks. See `encode`.

        Without a prompt, the one named "query" is used.
        """
        return self._encode(inputs, "query", options, QUERY_PROMPTS)

    @takes(EncodeOptions)
    def encode_document(self, inputs: Any, options: EncodeOptions) -> Any:
        """Return vectors of what is found; nobody thinks unless asked for. See `encode`.

        Without a prompt, the one named "document", "passage" or "corpus" is used.
        """
        return self._encode(inputs, "document", options, DOCUMENT_PROMPTS)

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
        self,
        inputs: Any,
        ways: Mapping[str, EncodeOptions],
        *,
        side: Side = "query",
        logs: bool = True,
    ) -> dict[str, EncodeDetails]:
        """Return the details of one list of inputs under several options, by their names.

        Everything is read once: pictures, prompts, and what thoughts are written from.

        Args:
            inputs: A list, see `encode`.
            ways: Name -> options, which must agree in what reading depends on: `batch_size`,
                `max_think_tokens`, `on_bad_input`, `prompt` and `show_progress_bar`. They name
                neither `device` nor `pool`.
            side: See `SidedOptions`.
            logs: Log what went another way than asked for; whoever embeds parts of a call logs
                that of the whole.

        Raises:
            InputError: For an input that cannot be embedded, with its position.
            ValueError: For options that contradict each other or the model.
        """
        completed = [self.completed(options) for options in ways.values()]
        for name in _READING_OPTIONS:
            values = [getattr(options, name) for options in completed]
            if len({str(value) for value in values}) != 1 or (name in _ONE_PLACE and values[0]):
                raise ValueError(
                    f"{name} by way = {dict(zip(ways, values, strict=True))}; expected at least "
                    "one way and the same in all of them, inputs are read once, in this process; "
                    "change these options"
                )
        every = [replace(options, return_details=True) for options in completed]
        found = dict(zip(ways, self._details(inputs, side, every), strict=True))
        for details in found.values() if logs else ():
            details.log()
        return found

    def _encode(
        self, inputs: Any, side: Side, options: EncodeOptions, prompt_names: Sequence[str] = ()
    ) -> Any:
        options = self.completed(options, prompt_names)
        values = as_list(inputs) if options.output_value is None else inputs
        if options.is_spread:
            details = encode_in_pool(self, values, side, options)
        else:
            (details,) = self._details(values, side, [options])
        details.log()
        if options.return_details or options.output_value is not None:
            return details if options.return_details else details.embeddings
        rows = details.rows()
        return rows[0] if is_single(inputs) else rows

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
        with self.turn:
            place = every[0].device
            if place is not None and not isinstance(place, list):  # a list has gone to a pool
                self.to(place)
            is_strict = every[0].on_bad_input == "raise"
            ledgers = [Ledger(len(values), width, is_strict=is_strict) for _ in every]
            items = self._items(values, every[0].prompt, ledgers)
            usable = sum(item is not None for item in items)
            ways = [
                Way(self.model, *parts, num_usable=usable, cache=self._cache)
                for parts in zip(every, choosers, ledgers, strict=True)
            ]
            limits = self.prompt_limits(every[0].max_think_tokens)
            ReadingPass(self.model, items, ways, limits=limits).run()
        for options, ledger in zip(every, ledgers, strict=True):
            ledger.finish(options, is_single=single, device=self.device)
        return [ledger.details for ledger in ledgers]

    def _items(
        self, values: list[Any], prompt: str | None, ledgers: Sequence[Ledger]
    ) -> list[Item | None]:
        rules = self.input_rules(prompt)
        warn_of_file_names(values)
        items: list[Item | None] = []
        for position, value in enumerate(values):
            try:
                items.append(parse_input(value, position, rules))
            except InputError as error:
                for ledger in ledgers:
                    ledger.refuse(error)
                items.append(None)
        return items
