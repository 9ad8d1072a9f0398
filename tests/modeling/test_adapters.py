"""Attaching, switching and freezing the two adapters."""

import copy

import pytest
import torch
from peft.tuners.lora import LoraLayer
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    active_adapter,
    adapter_parameters,
    attach_adapters,
    change_last_bits,
    set_trainable,
    snapshot_reasoning_adapter,
    use_adapter,
)
from twn_rl.modeling.backbone import from_parts
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

BOTH = (REASONING_ADAPTER, EMBEDDING_ADAPTER)


def _state(model, name):
    return {k: p.detach().clone() for k, p in adapter_parameters(model.peft_model, name).items()}


def _flags(model):
    return {name: p.requires_grad for name, p in model.peft_model.named_parameters()}


def _loss(model, items, name):
    batch = model.collate(items, ["<think> camel </think>"] * len(items))
    if name == REASONING_ADAPTER:
        return model.token_nll(batch)[0].sum()
    embeds = model.embed(batch)
    return (embeds @ embeds.T).logsumexp(1).sum()


def test_the_reasoning_adapter_has_the_name_trl_looks_for(make_model):
    assert list(make_model().peft_model.peft_config) == ["default", "embedding"]


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"])
def test_adapters_sit_in_the_decoder_and_nowhere_else(make_model, name):
    model = make_model(name)
    prefix = model.backbone.language_prefix
    for adapter in BOTH:
        keys = adapter_parameters(model.peft_model, adapter)
        assert len([key for key in keys if "lora" in key]) == 2 * 7 * 2
        assert all(f"{prefix}.layers." in key for key in keys if "lora" in key)
    rows = [key for key in adapter_parameters(model.peft_model, "embedding") if "lora" not in key]
    assert len(rows) == 1


def test_the_reasoning_adapter_owns_no_token_rows(make_model):
    model = make_model()
    assert all("lora" in key for key in adapter_parameters(model.peft_model, REASONING_ADAPTER))


def test_equal_seeds_give_equal_adapters_and_leave_the_random_state_alone(make_model):
    before = torch.random.get_rng_state()
    first, again, other = (make_model(seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    for adapter in BOTH:
        one, two, three = (_state(model, adapter) for model in (first, again, other))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert not all(torch.equal(one[key], three[key]) for key in one)


def test_last_bits_change_every_weight_but_zeros_and_the_backbones(make_model):
    model, other, third = (make_model() for _ in range(3))
    for changed, number in ((other, 1), (third, 2)):
        change_last_bits(changed.peft_model, number)
    moved = 0
    for before, after, drawn in zip(
        *(each.peft_model.parameters() for each in (model, other, third)), strict=True
    ):
        if not before.requires_grad:
            assert torch.equal(before, after)
            continue
        inside = before != 0
        assert (after[inside] != before[inside]).all()
        assert (after[~inside] == 0).all()
        torch.testing.assert_close(after, before, rtol=2**-23, atol=0)
        moved += int(inside.sum())
        assert not inside.any() or not torch.equal(after, drawn)
    assert moved > 100
    again = make_model()
    change_last_bits(again.peft_model, 1)
    assert all(map(torch.equal, again.peft_model.parameters(), other.peft_model.parameters()))


def test_read_out_rows_start_different_from_each_other(make_model):
    model = make_model()
    rows = [p for k, p in adapter_parameters(model.peft_model, "embedding").items() if "delta" in k]
    assert torch.pdist(rows[0]).min() > 0


def test_switching_changes_no_flag_inside_or_after(make_model):
    model = make_model()
    set_trainable(model.peft_model, [REASONING_ADAPTER])
    before = _flags(model)
    with use_adapter(model.peft_model, EMBEDDING_ADAPTER):
        assert active_adapter(model.peft_model) == EMBEDDING_ADAPTER
        assert _flags(model) == before
    assert active_adapter(model.peft_model) == REASONING_ADAPTER
    assert _flags(model) == before


def _switched(model):
    return {
        name: vars(module).get("_active_adapter")
        for name, module in model.peft_model.named_modules()
        if "_active_adapter" in vars(module)
    } | {"": (active_adapter(model.peft_model), model.peft_model.base_model.active_adapter)}


def test_switches_set_what_pefts_switch_sets(make_model):
    model, expected = make_model(), {}
    for name in BOTH:
        model.peft_model.set_adapter(name)
        expected[name] = _switched(model)
    assert expected[REASONING_ADAPTER] != expected[EMBEDDING_ADAPTER]
    model.peft_model.set_adapter(REASONING_ADAPTER)
    set_trainable(model.peft_model, [REASONING_ADAPTER])
    before, flags = _switched(model), _flags(model)
    for name in (*BOTH, *BOTH, BOTH[1]):  # the first time as PEFT does, later from memory
        with use_adapter(model.peft_model, name):
            assert _switched(model) == expected[name]
            assert _flags(model) == flags
        assert (_switched(model), _flags(model)) == (before, flags)


def test_only_the_first_switch_to_an_adapter_walks_through_the_model(make_model, monkeypatch):
    model = make_model()
    for name in BOTH:
        with use_adapter(model.peft_model, name):
            pass

    def walk(*args, **kwargs):
        raise AssertionError("a walk through the model")

    with monkeypatch.context() as patch:
        for name in ("modules", "parameters", "named_modules"):
            patch.setattr(torch.nn.Module, name, walk)
        with use_adapter(model.peft_model, EMBEDDING_ADAPTER):
            assert active_adapter(model.peft_model) == EMBEDDING_ADAPTER


def test_an_adapter_that_is_added_later_can_be_switched_to_and_from(make_model):
    model = make_model()
    with use_adapter(model.peft_model, EMBEDDING_ADAPTER):
        pass
    name = snapshot_reasoning_adapter(model.peft_model)
    with use_adapter(model.peft_model, name):
        layers = [m for m in model.peft_model.modules() if isinstance(m, LoraLayer)]
        assert all(layer.active_adapters == [name] for layer in layers)
    assert active_adapter(model.peft_model) == REASONING_ADAPTER


def test_switching_is_undone_after_an_exception(make_model):
    model = make_model()
    set_trainable(model.peft_model, BOTH)
    before = _flags(model)

    def fail_inside():
        with use_adapter(model.peft_model, EMBEDDING_ADAPTER):
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail_inside()
    assert active_adapter(model.peft_model) == REASONING_ADAPTER
    assert _flags(model) == before


def test_switching_to_an_unknown_adapter_changes_nothing(make_model):
    model = make_model()
    with pytest.raises(ValueError, match="nobody"), use_adapter(model.peft_model, "nobody"):
        pass
    assert active_adapter(model.peft_model) == REASONING_ADAPTER


@pytest.mark.parametrize("trained", BOTH)
@pytest.mark.parametrize("is_interrupted", [False, True])
def test_training_one_adapter_leaves_the_other_bitwise_equal(
    make_model, make_items, trained, is_interrupted
):
    model, items = make_model(), make_items("idefics3")[:3]
    other = BOTH[1 - BOTH.index(trained)]
    set_trainable(model.peft_model, BOTH)
    before, unchanged = _state(model, trained), _state(model, other)
    base = {k: p.clone() for k, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1)
    if is_interrupted:
        with pytest.raises(KeyError), use_adapter(model.peft_model, other):
            raise KeyError(other)
    for _ in range(2):
        optimizer.zero_grad(set_to_none=True)
        _loss(model, items, trained).backward()
        optimizer.step()
    assert all(torch.equal(unchanged[k], v) for k, v in _state(model, other).items())
    assert not any(torch.equal(before[k], v) for k, v in _state(model, trained).items())
    assert all(torch.equal(p, base[k]) for k, p in model.named_parameters() if k in base)


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"])
def test_each_loss_reaches_its_own_adapter_only(make_model, make_items, name, interface):
    model, items = make_model(name, interface=interface), make_items(name)
    set_trainable(model.peft_model, BOTH)
    for own, other in (BOTH, BOTH[::-1]):
        model.zero_grad(set_to_none=True)
        _loss(model, items, own).backward()
        for key, parameter in adapter_parameters(model.peft_model, other).items():
            assert parameter.grad is None or not parameter.grad.any(), key
        grads = {k: p.grad for k, p in adapter_parameters(model.peft_model, own).items()}
        silent = [k for k, grad in grads.items() if grad is None or not grad.any()]
        assert not silent
        assert all(p.grad is None for p in model.parameters() if not p.requires_grad)


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_gradient_checkpointing_recomputes_under_the_adapter_of_the_forward(
    make_model, make_items, interface
):
    model, items = make_model(interface=interface), make_items("idefics3")
    set_trainable(model.peft_model, BOTH)

    def gradients():
        model.zero_grad(set_to_none=True)
        batch = model.collate(items, ["<think> camel </think>"] * len(items))
        output = model(embed={"query": batch}, token_nll=batch)
        embeds = output["embeds"]["query"]
        ((embeds @ embeds.T).logsumexp(1).sum() + output["token_nll"].sum()).backward()
        return [p.grad.clone() for p in model.parameters() if p.requires_grad]

    model.train()
    plain = gradients()
    model.gradient_checkpointing_enable()
    checkpointed = gradients()
    model.gradient_checkpointing_disable()
    for one, two in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(one, two)


def test_a_snapshot_stays_when_the_reasoning_adapter_moves(make_model, make_items):
    model = make_model(interface="kv_detach")
    batch = model.collate(make_items("idefics3")[:2])
    before_flags, before = _flags(model), model.embed(batch).detach()
    model.prefill_adapter = snapshot_reasoning_adapter(model.peft_model)
    after_flags = _flags(model)
    assert all(after_flags[key] == flag for key, flag in before_flags.items())
    assert sum(after_flags.values()) == sum(before_flags.values())
    with torch.no_grad():
        for parameter in adapter_parameters(model.peft_model, REASONING_ADAPTER).values():
            parameter.add_(1.0)
    assert torch.equal(model.embed(batch), before)
    snapshot_reasoning_adapter(model.peft_model)
    assert not torch.equal(model.embed(batch), before)


def test_unknown_targets_are_refused_with_the_ones_there_are(make_backbone):
    settings = LoraSettings(targets=("qkv_proj", "o_proj"))
    with pytest.raises(ValueError, match=r"\['qkv_proj'\] match no linear map.*'q_proj'"):
        DualLoraModel.from_backbone(make_backbone("idefics3"), TwnConfig(reasoning_lora=settings))


def test_a_backbone_is_not_adapted_twice(make_backbone):
    backbone = make_backbone("llama")
    DualLoraModel.from_backbone(backbone)
    with pytest.raises(ValueError, match="already carries adapters"):
        DualLoraModel.from_backbone(backbone)


def test_the_defaults_add_three_to_five_percent_on_a_4b_backbone(make_backbone):
    text = {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": True,
    }
    config = Qwen3VLConfig(
        text_config=text, vision_config={"out_hidden_size": 2560}, tie_word_embeddings=True
    )
    defaults = TwnConfig()
    with torch.device("meta"):
        model = Qwen3VLForConditionalGeneration(config)
        base = sum(p.numel() for p in model.parameters())
        backbone = from_parts(model, copy.copy(make_backbone("qwen3_vl").processor))
        peft_model = attach_adapters(
            backbone,
            reasoning=defaults.reasoning_lora,
            embedding=defaults.embedding_lora,
            readout_ids=[151700, 151701, 151702, 151703],
        )
    added = sum(p.numel() for name in BOTH for p in adapter_parameters(peft_model, name).values())
    assert 4.0e9 < base < 4.6e9
    assert 0.03 < added / base < 0.05
