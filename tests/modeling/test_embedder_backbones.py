"""A backbone that already embeds: before any training our no-think vector is its own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import BACKBONES, COUNTING_BACKBONES, awaken
from tokenizers import processors
from torch.nn.functional import normalize

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item
from twn_rl.modeling.adapters import without_adapters
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.collator import collate_opened
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.readout import position_ids

NEAR = {"rtol": 0, "atol": 1e-5}
THOUGHT = "<think> camel left of the tree </think>"


def embedder(name: str, **settings: Any) -> DualLoraModel:
    config = TwnConfig(num_readout_tokens=1, readout_start="pooled_token", **settings)
    return DualLoraModel.from_backbone(BACKBONES[name](), config).eval()


def own_vectors(model: DualLoraModel, items: list[Item]) -> torch.Tensor:
    """Return what the bare backbone gives at the last token of each prompt."""
    batch = collate_opened(model.backbone, model.renderer, items)
    appended = model.backbone.appended_token_id
    if appended is not None:
        rows = torch.full((len(items), 1), appended)
        batch["input_ids"] = torch.cat([batch["input_ids"], rows], 1)
        batch["attention_mask"] = torch.cat([batch["attention_mask"], torch.ones_like(rows)], 1)
    positions = position_ids(model.backbone, batch)
    with torch.no_grad(), without_adapters(model.peft_model):
        states = model.backbone.inner_model(**batch, position_ids=positions).last_hidden_state
    return normalize(states[:, -1].float(), dim=-1)


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", BACKBONES)
def test_an_untrained_model_embeds_as_its_backbone_does(
    make_items: Callable[[str], list[Item]], name: str, interface: str
) -> None:
    model, items = embedder(name, interface=interface), make_items(name)
    expected = own_vectors(model, items)
    with torch.no_grad():
        assert model.embed(model.collate(items)).mul(expected).sum(1).min() > 0.9999
        torch.testing.assert_close(model.embed(model.collate(items)), expected, **NEAR)
        # Beside rows that think, and from a prefix that they share.
        mixed = model.embed(model.collate(items, [THOUGHT, *[None] * (len(items) - 1)]))
    torch.testing.assert_close(mixed[1:], expected[1:], **NEAR)
    prefix = model.read(model.prepare(model.collate(items)))
    for thoughts in (None, [None] * len(items)):
        found = normalize(model.read_out(prefix, thoughts), dim=-1)
        torch.testing.assert_close(found, expected, **NEAR)
    found = model.read_out(prefix, [THOUGHT, *[None] * (len(items) - 1)])
    torch.testing.assert_close(normalize(found, dim=-1), mixed, **NEAR)
    assert not torch.allclose(mixed[0], expected[0], atol=1e-3)
    plain = DualLoraModel.from_backbone(BACKBONES[name](), TwnConfig(num_readout_tokens=1)).eval()
    with torch.no_grad():
        assert plain.embed(plain.collate(items)).mul(expected).sum(1).min() < 0.99


def appending_llama() -> Backbone:
    """A text embedder whose tokenizer writes `<eos>` behind every text, as Qwen3-Embedding's."""
    tokenizer = BACKBONES["llama"]().tokenizer
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <eos>", special_tokens=[("<eos>", tokenizer.eos_token_id)]
    )
    return from_parts(BACKBONES["llama"]().model, tokenizer)


def test_a_token_that_the_tokenizer_appends_is_the_read_out_and_not_the_prompt(
    make_items: Callable[[str], list[Item]], tmp_path: Path
) -> None:
    config = TwnConfig(num_readout_tokens=1, readout_start="pooled_token")
    backbone, items = appending_llama(), make_items("llama")
    model = DualLoraModel.from_backbone(backbone, config).eval()
    assert backbone.appended_token_id == backbone.eos_token_id
    batch = model.collate(items)
    assert not (batch["input_ids"][:, -1] == backbone.eos_token_id).any()
    assert backbone.eos_token_id not in backbone.tokenizer("camel tree")["input_ids"]
    with torch.no_grad():
        torch.testing.assert_close(model.embed(batch), own_vectors(model, items), **NEAR)
    awaken(model)
    model.save_pretrained(tmp_path)
    again = DualLoraModel.from_pretrained(tmp_path, backbone=appending_llama())
    with torch.no_grad():
        assert torch.equal(again.embed(again.collate(items)), model.embed(batch))


def test_instructions_may_be_the_system_message() -> None:
    renderer = Renderer(system_prompt="Represent it.", instruction_in_system=True)
    item = Item(instruction="find the name", text="camel")

    def contents(item: Item) -> list[tuple[str, str]]:
        found = renderer.messages(item, is_multimodal=False)
        return [(message["role"], message["content"]) for message in found]

    assert contents(item) == [("system", "find the name"), ("user", "camel")]
    assert contents(Item(text="camel")) == [("system", "Represent it."), ("user", "camel")]
    alone = contents(Item(instruction="find a camel"))
    assert alone == [("system", "Represent it."), ("user", "find a camel")]
    assert Renderer.from_dict(renderer.to_dict()) == renderer
    assert "instruction_in_system" not in Renderer().to_dict()


def test_what_cannot_start_so_is_refused() -> None:
    with pytest.raises(ValueError, match=r"num_readout_tokens = 4.*expected 1"):
        TwnConfig(readout_start="pooled_token")
    config = TwnConfig(num_readout_tokens=1, readout_start="pooled_token")
    with pytest.raises(ValueError, match="sliding windows or linear attention"):
        DualLoraModel.from_backbone(COUNTING_BACKBONES["gemma3_text"](), config)
