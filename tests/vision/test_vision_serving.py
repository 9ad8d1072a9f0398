"""On every family with its real processor: ThinkingEmbedder's vectors are those of plain passes.

Skipped where the extra `vision` is missing; `make test-vision` runs it.
"""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torchvision", reason="needs the extra `vision`: run `make test-vision`")

import numpy as np
import torch
from torch import nn
from torch.nn.functional import normalize
from vision_families import VISION_BACKBONES, make_vlm, mixed_items

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.model import DualLoraModel

THOUGHT = "<think> zebra above it </think>"
NEAR = {"rtol": 0, "atol": 1e-5}


class Gate(nn.Module):
    """The contract of a gate: states (N, D) to probabilities (N,)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.direction = nn.Parameter(torch.randn(width, generator=generator))

    def probability(self, states: torch.Tensor) -> torch.Tensor:
        return (normalize(states, dim=-1) @ self.direction).sigmoid()


def teach(model: DualLoraModel) -> None:
    """Train the reasoning adapter until it writes `THOUGHT` about each item, and ends its turn."""
    items = mixed_items()
    taught = model.completion_ids(THOUGHT, add_eos=True)
    batch = model.collate(items, [taught] * len(items))
    decoder: Any = model.backbone.model.get_decoder()
    norm: torch.Tensor = decoder.norm.weight
    with torch.no_grad():  # a random head is almost flat, and no adapter could sharpen it
        is_offset = not norm.any()  # Gemma's and Qwen3.5's norms scale by 1 + weight
        norm.copy_(torch.full_like(norm, 59.0) if is_offset else 60 * norm)
    parameters = list(adapter_parameters(model.peft_model, REASONING_ADAPTER).values())
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(300):
        if step % 10 == 0 and model.reason(batch) == [taught] * len(items):
            return
        optimizer.zero_grad()
        model.token_nll(batch)[0].sum().backward()
        optimizer.step()
    raise AssertionError("the tiny model did not learn its thought")


@pytest.mark.parametrize("name", VISION_BACKBONES)
@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_vectors_are_those_of_plain_passes_in_every_way_to_think(name: str, interface: str) -> None:
    settings: dict[str, Any] = {
        "reasoning_lora": LoraSettings(r=8, alpha=16),
        "max_think_tokens": 9,
    }
    model = make_vlm(name, interface=interface, num_reason_tokens=2, gate_threshold=0.5, **settings)
    teach(model)
    model.gates["query"] = Gate(model.hidden_size)
    embedder, items = ThinkingEmbedder(model.requires_grad_(False)), mixed_items()
    with torch.no_grad():
        never = model.embed(model.collate(items)).numpy()
        always = model.embed(model.collate(items, [THOUGHT] * len(items))).numpy()
        latent = model.embed(model.collate(items), is_latent=True).numpy()
    for batch_size in (1, 2, 8):
        options = {"batch_size": batch_size, "return_details": True}
        found = embedder.encode_query(items, think="never", **options)
        np.testing.assert_allclose(found.embeddings, never, **NEAR)
        found = embedder.encode_query(items, think="always", **options)
        assert found.thoughts == [["zebra above it"]] * len(items)
        np.testing.assert_allclose(found.embeddings, always, **NEAR)
        found = embedder.encode_query(items, think="latent", **options)
        np.testing.assert_allclose(found.embeddings, latent, **NEAR)
        found = embedder.encode_query(items, think="auto", think_rate=0.4, **options)
        chosen = np.array([bool(own) for own in found.thoughts])
        assert chosen.sum() == 2
        np.testing.assert_allclose(
            found.embeddings, np.where(chosen[:, None], always, never), **NEAR
        )
    assert np.abs(never - always).max() > 1e-3
    assert np.abs(never - latent).max() > 1e-3
