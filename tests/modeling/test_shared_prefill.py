"""One reading for both adapters: against a gate on LoRA, in gradients, in writing, and its cost."""

import functools
from dataclasses import replace

import pytest
import torch
from late_reference import gated_lora
from tiny_backbones import sharing_pictures
from torch.nn.functional import cross_entropy, normalize

import twn_rl.modeling.generation
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.thought_pool import Chunk, merge_chunks
from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    adapter_parameters,
    set_trainable,
    without_adapters,
)
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.late_adapter import acting_late
from twn_rl.modeling.readout import join_sequence, pool, position_ids

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
THOUGHTS = ["<think> camel is top left </think>", None, "<think> it </think>", "<think> a </think>"]
BOTH = (REASONING_ADAPTER, EMBEDDING_ADAPTER)


def shared(make_model, name="idefics3", **settings):
    return make_model(name, interface="shared_prefill", **settings)


def with_thoughts(model, items):
    return model.collate(items, [THOUGHTS[row % len(THOUGHTS)] for row in range(len(items))])


def reference_vectors(model, batch):
    """Vectors by one forward of the whole sequence, the embedding adapter gated by position."""
    inputs = join_sequence(batch, model.readout_ids)
    positions = position_ids(model.backbone, inputs)
    late = inputs["input_ids"].shape[1] - batch["input_ids"].shape[1] + 1
    with gated_lora(model, EMBEDDING_ADAPTER, late):
        hidden = model.backbone.inner_model(
            **inputs, position_ids=positions, use_cache=False
        ).last_hidden_state
    return pool(hidden[:, -len(model.readout_ids) :])


def reference_nll(model, batch):
    """Token losses (N,) by one forward of the whole sequence, the reasoning adapter gated."""
    inputs, targets = join_sequence(batch), batch["completion_ids"]
    positions = position_ids(model.backbone, inputs)
    with gated_lora(model, REASONING_ADAPTER, targets.shape[1] + 1):
        logits = model.backbone.model(**inputs, position_ids=positions, use_cache=False).logits
    logits = logits[:, -targets.shape[1] - 1 : -1]
    losses = cross_entropy(logits.transpose(1, 2), targets, reduction="none")
    return (losses * batch["completion_mask"]).sum(1)


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_and_token_losses_are_those_of_an_adapter_gated_by_position(
    make_model, make_items, name
):
    model, items = shared(make_model, name), make_items(name)
    thinking = with_thoughts(model, items)
    plain = model.collate(items)
    with torch.no_grad():
        output = model(embed={"no_think": plain, "think": thinking}, token_nll=thinking)
        exact = {"atol": 1e-5, "rtol": 0}
        for key, batch in (("no_think", plain), ("think", thinking)):
            expected = reference_vectors(model, batch)
            torch.testing.assert_close(output["embeds"][key], expected, **exact)
            torch.testing.assert_close(model.embed(batch), expected, **exact)
        nll = reference_nll(model, thinking)
        torch.testing.assert_close(output["token_nll"], nll, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(model.token_nll(thinking)[0], nll, atol=1e-4, rtol=1e-5)
        other = model.__class__.embed
        model.config.interface = "reencode"
        assert (other(model, plain) - output["embeds"]["no_think"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl"])
def test_gradients_are_those_of_an_adapter_gated_by_position(make_model, make_items, name):
    model, items = shared(make_model, name), make_items(name)
    set_trainable(model.peft_model, BOTH)
    thinking = with_thoughts(model, items)
    plain = {key: value for key, value in thinking.items() if "completion" not in key}

    def gradients(vectors, other, nll):
        model.zero_grad(set_to_none=True)
        ((vectors @ other.T).logsumexp(1).sum() + nll.sum()).backward()
        return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}

    output = model(embed={"think": thinking, "no_think": plain}, token_nll=thinking)
    found = gradients(output["embeds"]["think"], output["embeds"]["no_think"], output["token_nll"])
    expected = gradients(
        reference_vectors(model, thinking),
        reference_vectors(model, plain),
        reference_nll(model, thinking),
    )
    names = {key for adapter in BOTH for key in adapter_parameters(model.peft_model, adapter)}
    assert {f"peft_model.{key}" for key in names} <= set(found) == set(expected)
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_thoughts_are_those_of_an_adapter_gated_by_position(make_model, make_items, name):
    model, items = shared(make_model, name), make_items(name)
    written = model.reason(model.collate(items), max_think_tokens=4)
    assert len({tuple(ids) for ids in written}) > 1
    with torch.no_grad():
        for item, ids in zip(items, written, strict=True):
            for length in range(len(ids)):
                batch = model.collate([item], [ids[:length]])
                if not length:
                    batch = model.collate([item])
                inputs = join_sequence(batch)
                with gated_lora(model, REASONING_ADAPTER, length + 1):
                    logits = model.backbone.model(
                        **inputs, position_ids=position_ids(model.backbone, inputs)
                    ).logits[0, -1]
                logits[model.suppressed_token_ids] = float("-inf")
                assert int(logits.argmax()) == ids[length]


@pytest.mark.parametrize("name", FAMILIES)
def test_forwards_of_others_write_the_same_thoughts_and_give_the_same_losses(
    make_model, make_items, name
):
    """As TRL generates and scores: transformers' `generate`, and one forward of the sequence."""
    model, items = shared(make_model, name), make_items(name)
    batch = model.collate(items)
    with torch.no_grad(), acting_late(model.backbone, model.peft_model, 1):
        written = model.peft_model.generate(
            **batch,
            do_sample=False,
            max_new_tokens=4,
            min_new_tokens=4,
            suppress_tokens=[*model.suppressed_token_ids, model.backbone.eos_token_id],
        )[:, batch["input_ids"].shape[1] :]
    own = model.reason(batch, max_think_tokens=4)
    pairs = zip(written.tolist(), own, strict=True)
    assert all(ids == mine for ids, mine in pairs if len(mine) == 4)
    assert any(len(mine) == 4 for mine in own)
    thinking = with_thoughts(model, items)
    inputs, length = join_sequence(thinking), thinking["completion_ids"].shape[1]
    with acting_late(model.backbone, model.peft_model, length + 1):
        logits = model.backbone.model(**inputs, use_cache=False).logits[:, -length - 1 : -1]
    losses = cross_entropy(logits.transpose(1, 2), thinking["completion_ids"], reduction="none")
    losses = (losses * thinking["completion_mask"]).sum(1)
    torch.testing.assert_close(losses, model.token_nll(thinking)[0], atol=1e-4, rtol=1e-5)
    assert "forward" not in vars(model.backbone.inner_model)


@sharing_pictures
@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl"])
def test_forwards_of_others_read_equal_rows_once(make_model, make_items, name):
    model, items = shared(make_model, name), make_items(name)
    twin = replace(items[2], images=items[3].images[:1])  # the same words, another picture
    batch = with_thoughts(model, [items[2], items[2], twin, items[0], items[2], items[0]])
    inputs, length = join_sequence(batch), batch["completion_ids"].shape[1]
    sizes = []
    layer = model.backbone.model.get_submodule(f"{model.backbone.language_prefix}.layers.0.mlp")
    layer.register_forward_pre_hook(lambda _, args: sizes.append(tuple(args[0].shape[:2])))
    taken = []
    with acting_late(
        *(model.backbone, model.peft_model, length + 1), take=lambda *read: taken.append(read)
    ):
        logits = model.backbone.model(**inputs, use_cache=False).logits[:, -length - 1 : -1]
    early = inputs["input_ids"].shape[1] - length - 1
    assert sizes == [(3, early), (6, length + 1)]
    ((prefix, places),) = taken
    assert places == [0, 0, 1, 2, 0, 2]
    assert prefix.pending.tolist() == batch["input_ids"][:3, -1].tolist()
    losses = cross_entropy(logits.transpose(1, 2), batch["completion_ids"], reduction="none")
    losses = (losses * batch["completion_mask"]).sum(1)
    torch.testing.assert_close(losses, reference_nll(model, batch), atol=1e-4, rtol=1e-5)


def test_a_prompt_is_read_once_whoever_thinks(make_model, make_items, monkeypatch):
    model, items = shared(make_model), make_items("idefics3")
    read_rows, towers = twn_rl.modeling.generation.read_rows, []
    encode = type(model.backbone.inner_model).get_image_features
    adapters, chunks = [], []

    def reading(*parts, adapter, **options):
        adapters.append(adapter)
        return read_rows(*parts, adapter=adapter, **options)

    @functools.wraps(encode)  # with the signature, which the code under test reads
    def encoding(*args, **kwargs):
        towers.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(twn_rl.modeling.generation, "read_rows", reading)
    monkeypatch.setattr(type(model.backbone.inner_model), "get_image_features", encoding)
    select = Chunk.select
    monkeypatch.setattr(
        Chunk, "select", lambda chunk, rows: chunks.append(chunk) or select(chunk, rows)
    )
    details = ThinkingEmbedder(model).encode_query(items, think="always", return_details=True)
    assert len(details.thoughts) == len(items)
    assert sum(details.think_tokens)
    assert adapters == [None]
    assert len(towers) == 1
    assert chunks
    for chunk in chunks:
        assert chunk.is_shared
        assert select(chunk, [0]).is_shared
        assert merge_chunks([chunk, chunk]).is_shared
        lengths = chunk.prefix.attention_mask.shape
        layer = chunk.prefix.cache.layers[0]
        per_layer = layer.keys.nbytes + layer.values.nbytes
        assert layer.keys.shape[2] == lengths[1]
        assert chunk.num_bytes() == per_layer * len(chunk.prefix.cache.layers)


def test_what_the_bare_backbone_read_depends_on_no_adapter(make_model, make_items):
    model, items = shared(make_model), make_items("idefics3")
    prompts = model.prepare(model.collate(items))
    prefix = model.read(prompts)
    with torch.no_grad():
        for adapter in BOTH:
            for parameter in adapter_parameters(model.peft_model, adapter).values():
                parameter.add_(0.1)
    again = model.read(prompts)
    for one, two in zip(prefix.cache.layers, again.cache.layers, strict=True):
        assert torch.equal(one.keys, two.keys)
        assert torch.equal(one.values, two.values)
    assert prefix.pending.tolist() == prompts.inputs["input_ids"][:, -1].tolist()
    started = model.start_reasoning(prefix)
    assert started.pending is None
    assert not torch.equal(started.logits, model.start_reasoning(again, [0]).logits)


def test_vectors_go_stale_by_the_embedding_adapter_and_thoughts_by_the_interface(make_model):
    model = shared(make_model, "llama")
    vectors, thoughts = Fingerprints(model).vectors, Fingerprints(model).thoughts
    with torch.no_grad():
        next(iter(adapter_parameters(model.peft_model, REASONING_ADAPTER).values())).add_(1.0)
    moved = Fingerprints(model)
    assert moved.vectors == vectors
    assert moved.thoughts != thoughts
    model.config = replace(model.config, interface="reencode")
    other = Fingerprints(model)
    assert other.vectors != vectors
    assert other.thoughts != moved.thoughts


def test_prompts_of_one_token_are_refused(make_model):
    model = shared(make_model, "llama")
    batch = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.tensor([[1]])}
    with pytest.raises(ValueError, match="prompts of one token cannot be shared"):
        model.embed(batch)


def test_a_bare_body_is_left_as_it_was_found(make_model, make_items):
    model = shared(make_model)
    batch = model.collate(make_items("idefics3"))
    before = model.embed(batch)
    with model.peft_model.disable_adapter():
        with without_adapters(model.peft_model):
            bare = model.backbone.inner_model(**batch).last_hidden_state
        assert torch.equal(model.backbone.inner_model(**batch).last_hidden_state, bare)
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    with without_adapters(model.peft_model):
        assert {name: p.requires_grad for name, p in model.named_parameters()} == flags
    assert torch.equal(model.embed(batch), before)
    assert (model.backbone.inner_model(**batch).last_hidden_state - bare).abs().max() > 1e-3


def test_sessions_and_single_calls_read_alike(make_model, make_items):
    model, items = shared(make_model), make_items("idefics3")
    batch = model.collate(items)
    alone = (
        model.reason(batch, max_think_tokens=4),
        normalize(model.read_out(model.read(model.prepare(batch)), [*THOUGHTS, None]), dim=-1),
    )
    with model.session():
        assert model.reason(batch, max_think_tokens=4) == alone[0]
        states = model.read_out(model.read(model.prepare(batch)), [*THOUGHTS, None])
    torch.testing.assert_close(normalize(states, dim=-1), alone[1])
