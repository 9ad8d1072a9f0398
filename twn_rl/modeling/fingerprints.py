"""What a model's outputs depend on, part by part; everything stored is keyed by these digests.

A result names the parts it depends on and is made anew when one of them changes: a vector with a
given thought, or none, is that of `vectors`; a thought that of `thoughts`; who thinks under "auto"
is `decision`; a gate goes with `gate_origin`.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cached_property

import torch
from torch import Tensor, nn

from twn_rl.modeling.adapter_files import adapter_state
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER
from twn_rl.modeling.gate import QUERY_SIDE, SIDES, THRESHOLD_FIELDS
from twn_rl.modeling.generation import DualLoraInference
from twn_rl.runtime.whole_files import digest
from twn_rl.runtime.zero import gathered

_PROBE_VALUES = 16
_STORED_VALUES = 64
# What of a completion is embedded; vectors stored when all of it was are made anew.
_EMBEDDED = "up to the closing mark"


class Fingerprints:
    """Digests (sha256) of a model, each as the model is when it is first asked for.

    Under ZeRO-3 every process must ask for the same ones in the same order.
    """

    def __init__(self, model: DualLoraInference) -> None:
        self.model, self.config = model, model.config

    @cached_property
    def vectors(self) -> str:
        """Changes when an input could get another vector with the same thought, latent or none.

        With "kv_detach" the adapter that fills the cache is part of it.
        """
        readout = {"interface": self.config.interface, **self.config.readout_settings}
        reader = self._adapter(self.model.prefill_adapter) if self._is_detached else None
        return digest([self.backbone, self.prompts, readout, self.embedding, reader, _EMBEDDED])

    @cached_property
    def thoughts(self) -> str:
        """Changes when an input could get another greedy thought; vectors may change without it."""
        is_opened = self.config.thinking_decision == "policy"
        # In the other two the reasoning adapter reads the prompt itself, as ever.
        bare = [self.config.interface] if self.model.shares_prefill else []
        return digest([self.backbone, self.prompts, self.reasoning, is_opened, *bare])

    def decision(self, side: str) -> str:
        """Return what changes when others could be chosen to think on one side.

        That is the side's gate and thresholds; what both read is in `vectors` and `thoughts`.
        """
        gate = dict(self.model.gates.items()).get(side)
        is_policy = side == QUERY_SIDE and self.config.thinking_decision == "policy"
        return digest(
            [
                None if gate is None else _digest(gate.state_dict()),
                getattr(self.config, THRESHOLD_FIELDS[side]),
                self.config.policy_threshold if is_policy else None,
            ]
        )

    @cached_property
    def everything(self) -> str:
        """Changes when any input could get another vector, however it thinks."""
        decisions = [self.decision(side) for side in SIDES]
        return digest([self.vectors, self.thoughts, self.config.max_think_tokens, decisions])

    @cached_property
    def backbone(self) -> str:
        """Of samples of every frozen weight and their type, wherever they were loaded from."""
        # Rows of new tokens are random, and the embedding adapter replaces those it uses.
        first_new = min([*self.model.readout_ids, *self.model.reason_ids])
        tables = {n: _sample(w, first_new) for n, w in self._frozen() if self._is_table(w)}
        dtype, revision = str(self.model.backbone.model.dtype), self.config.backbone_revision
        return digest([self._layers, _digest(tables), dtype, revision])

    @cached_property
    def frozen(self) -> str:
        """Tells one backbone from another; checkpoints hold it, so its contents are fixed.

        Names, shapes and `_STORED_VALUES` evenly spaced numbers of every frozen weight, rounded to
        bfloat16, so that the backbone may be loaded in that precision. It costs milliseconds at any
        size and tells missing, random, retrained and other weights; not a single changed number.
        """
        first_new = min([*self.model.readout_ids, *self.model.reason_ids])
        samples = {
            name: _sample(weight, first_new if self._is_table(weight) else None, _STORED_VALUES)
            for name, weight in self._frozen()
        }
        return _digest(samples, torch.bfloat16)

    @cached_property
    def prompts(self) -> str:
        """Of what turns an item into tokens: renderer, chat template and limits."""
        template = getattr(self.model.processor, "chat_template", None)
        config = self.config
        return digest([config.renderer.to_dict(), template, config.limit_settings])

    @cached_property
    def embedding(self) -> str:
        """Of the embedding adapter with the rows of read-out and reason tokens."""
        return self._adapter(EMBEDDING_ADAPTER)

    @cached_property
    def reasoning(self) -> str:
        """Of the adapter that writes thoughts."""
        return self._adapter(REASONING_ADAPTER)

    @cached_property
    def gate_origin(self) -> dict[str, str]:
        """What a gate was fitted to: `embedding`, what it reads, and `reasoning`, who thinks.

        Checkpoints hold these two, so their contents are fixed. A gate goes with its checkpoint in
        any precision: other than in `vectors`, weights count rounded to bfloat16.
        """
        config = self.config
        reasoning = self._adapter(REASONING_ADAPTER, dtype=torch.bfloat16)
        described = {
            "interface": config.interface,
            **config.readout_settings,
            **config.limit_settings,
            "renderer": config.renderer.to_dict(),
            "backbone": self._layers,
            "embedding": self._adapter(EMBEDDING_ADAPTER, dtype=torch.bfloat16),
            "reasoning": reasoning if self._is_detached else "",
        }
        text = json.dumps(described, sort_keys=True)
        return {"embedding": hashlib.sha256(text.encode()).hexdigest(), "reasoning": reasoning}

    @property
    def _is_detached(self) -> bool:
        return self.config.interface == "kv_detach"

    def _adapter(self, name: str, dtype: torch.dtype | None = None) -> str:
        return _digest(adapter_state(self.model.peft_model, name), dtype)

    @cached_property
    def _layers(self) -> str:
        frozen = self._frozen()
        layers = {name: _sample(weight) for name, weight in frozen if not self._is_table(weight)}
        return _digest(layers, torch.bfloat16)

    def _frozen(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, weight in self.model.backbone.model.named_parameters():
            if "lora_" not in name and "trainable_tokens_" not in name:
                yield name, weight

    def _is_table(self, weight: nn.Parameter) -> bool:
        """Tell whether a weight has a row for each token."""
        return id(weight) in self._tables

    @cached_property
    def _tables(self) -> set[int]:
        model = self.model.backbone.model
        modules = model.get_input_embeddings(), model.get_output_embeddings()
        return {id(p) for module in modules if module is not None for p in module.parameters()}


def _sample(weight: nn.Parameter, rows: int | None = None, count: int = _PROBE_VALUES) -> Tensor:
    """Return `count` evenly spaced numbers of the first rows of a weight, on the CPU."""
    with gathered([weight]):
        values = weight.detach()[:rows].flatten()
        return values[:: max(1, len(values) // count)][:count].clone().cpu()


def _digest(weights: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> str:
    """Return a hash of names, shapes and numbers, rounded to a type if one is given."""
    found = hashlib.sha256()
    for key, weight in sorted(weights.items()):
        found.update(f"{key} {tuple(weight.shape)}".encode())
        values = weight.detach().cpu().to(dtype or weight.dtype).contiguous().flatten()
        found.update(values.view(torch.uint8).numpy().tobytes())  # numpy has no bfloat16
    return found.hexdigest()
