"""On every family with its real processor: cached is whole, alone is in a batch, written is likely.

Skipped where the extra `vision` is missing; `make test-vision` runs it.
"""

from __future__ import annotations

import pytest

pytest.importorskip("torchvision", reason="needs the extra `vision`: run `make test-vision`")

import torch
from torch.nn.functional import log_softmax, normalize
from vision_families import VISION_BACKBONES, make_vlm, mixed_items

from twn_rl.modeling.adapters import REASONING_ADAPTER, use_adapter
from twn_rl.modeling.model import DualLoraModel

# Far apart in length: padding between a thought and the read-outs must not count.
THOUGHTS = [
    "<think> red </think>",
    None,
    "<think> " + "camel left of the pizza " * 4 + "</think>",
    "<think> zebra above it </think>",
    "<think> tree </think>",
]
# Of unit vectors in float32: rounding is up to 2e-6 on an AMD EPYC, 2.5e-6 on an Intel Xeon.
NEAR = {"rtol": 0, "atol": 5e-6}

families = pytest.mark.parametrize("name", VISION_BACKBONES)
interfaces = pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])


@families
@interfaces
def test_a_vector_is_the_same_alone_in_a_batch_and_from_a_prefix(name: str, interface: str) -> None:
    model, items = make_vlm(name, interface=interface), mixed_items()
    real = type(model.processor).__module__
    assert real.startswith("transformers.models."), real
    with torch.no_grad():
        never = model.embed(model.collate(items))
        always = model.embed(model.collate(items, THOUGHTS))
        pairs = zip(items, THOUGHTS, strict=True)
        alone = [model.embed(model.collate([item], [thought])) for item, thought in pairs]
        torch.testing.assert_close(torch.cat(alone), always, **NEAR)
    prefix = model.read(model.prepare(model.collate(items)))
    cached = normalize(model.read_out(prefix, THOUGHTS), dim=-1)
    torch.testing.assert_close(cached, always, **NEAR)
    # In this order: a continuation must leave the prefix as it was.
    torch.testing.assert_close(normalize(model.read_out(prefix), dim=-1), never, **NEAR)
    rows = [4, 2, 4]
    states = model.read_out(prefix.select(rows), [THOUGHTS[row] for row in rows])
    torch.testing.assert_close(normalize(states, dim=-1), always[rows], **NEAR)
    assert not torch.allclose(never[0], always[0], atol=1e-3)
    assert (never[2:] @ never[2:].T - torch.eye(3)).abs().max() < 0.9999, "pictures make no odds"


def plain_logps(model: DualLoraModel, row: int, written: list[int]) -> torch.Tensor:
    """Return log-probabilities (T, V) of one prompt's completion by one forward of the model."""
    batch = model.collate([mixed_items()[row]])
    length = batch["input_ids"].shape[1]
    ids = torch.cat([batch["input_ids"], torch.tensor([written])], 1)
    inputs = {**batch, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for key in ("token_type_ids", "mm_token_type_ids"):
        if key in inputs:
            inputs[key] = torch.nn.functional.pad(inputs[key], (0, len(written)))
    with torch.no_grad(), use_adapter(model.peft_model, REASONING_ADAPTER):
        logits = model.backbone.model(**inputs).logits[0]
    return log_softmax(logits[length - 1 : -1].float(), dim=-1)


@families
def test_greedy_thoughts_are_the_likeliest_tokens_of_plain_forwards(name: str) -> None:
    model, items = make_vlm(name), mixed_items()
    written = model.reason(model.collate(items), max_think_tokens=6)
    assert written == [model.reason(model.collate([i]), max_think_tokens=6)[0] for i in items]
    for row, ids in enumerate(written):
        logps = plain_logps(model, row, ids)
        logps[:, model.suppressed_token_ids] = float("-inf")
        assert logps.argmax(-1).tolist() == ids


@families
def test_token_losses_are_those_of_plain_forwards(name: str) -> None:
    model, items = make_vlm(name), mixed_items()
    ids = [model.completion_ids(text or "<think> it </think>", add_eos=True) for text in THOUGHTS]
    nll, counts = model.token_nll(model.collate(items, ids))
    assert counts.tolist() == [len(row) for row in ids]
    for row, written in enumerate(ids):
        expected = -plain_logps(model, row, written).gather(1, torch.tensor(written)[:, None]).sum()
        torch.testing.assert_close(nll[row], expected, rtol=1e-5, atol=1e-4)


@families
@interfaces
def test_passes_that_share_prompts_and_pictures_change_nothing(name: str, interface: str) -> None:
    model, items = make_vlm(name, interface=interface, num_reason_tokens=2), mixed_items()
    prompts = model.collate(items)
    think = {**prompts, **model.collate_completions(THOUGHTS)}
    together = model(embed={"no_think": prompts, "think": think}, latent={"latent": prompts})
    expected = {
        "no_think": model.embed(prompts),
        "think": model.embed(think),
        "latent": model.embed(prompts, is_latent=True),
    }
    for key, vectors in expected.items():
        torch.testing.assert_close(together["embeds"][key], vectors, **NEAR)
    torch.stack([vectors[:, 0] for vectors in together["embeds"].values()]).sum().backward()
    embedding = [p.grad for n, p in model.peft_model.named_parameters() if ".embedding." in n]
    reasoning = [p.grad for n, p in model.peft_model.named_parameters() if ".reasoning." in n]
    assert any(grad is not None and grad.abs().max() > 0 for grad in embedding)
    assert all(grad is None for grad in reasoning)
