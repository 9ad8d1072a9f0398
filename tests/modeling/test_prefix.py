"""Reading prompts once gives what reading them every time gives, for every family and interface."""

import pytest
import torch
from tiny_backbones import COUNTING_BACKBONES, sharing_pictures
from torch.nn.functional import normalize

from twn_rl.modeling.kv_prefix import merge
from twn_rl.modeling.prompt_features import merge_prompts
from twn_rl.modeling.readout import join_sequence, position_ids

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
COMPLETIONS = ["<think> red </think>", None, "<think> a much longer thought </think>"]
INTERFACES = ("reencode", "kv_detach", "shared_prefill")
# Layers whose reach is counted in columns: padding within a row would be read as tokens.
COUNTING = sorted(COUNTING_BACKBONES)
FAR_APART = ["<think> red </think>", None, f"<think> {'camel left of it ' * 6}</think>"]


def completions_for(items):
    return [COMPLETIONS[row % len(COMPLETIONS)] for row in range(len(items))]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_prefix_gives_the_vectors_of_a_whole_pass(make_model, make_items, name, interface):
    model, items = make_model(name, interface=interface), make_items(name)
    completions = completions_for(items)
    prefix = model.read(model.prepare(model.collate(items)))
    with torch.no_grad():
        never = model.embed(model.collate(items))
        always = model.embed(model.collate(items, completions))
    # In this order: a continuation must leave the prefix as it was.
    torch.testing.assert_close(normalize(model.read_out(prefix, completions), dim=-1), always)
    torch.testing.assert_close(normalize(model.read_out(prefix), dim=-1), never)
    assert not torch.allclose(never[0], always[0], atol=1e-3)
    torch.testing.assert_close(never[1], always[1])


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("name", COUNTING)
def test_a_thought_does_not_depend_on_longer_ones_beside_it(
    make_model, make_items, name, interface
):
    model, items = make_model(name, interface=interface), make_items(name)
    assert model.backbone.counts_columns
    with torch.no_grad():
        together = model.embed(model.collate(items, FAR_APART))
        pairs = zip(items, FAR_APART, strict=True)
        alone = torch.cat([model.embed(model.collate([item], [own])) for item, own in pairs])
    torch.testing.assert_close(together, alone, rtol=0, atol=2e-6)
    prefix = model.read(model.prepare(model.collate(items)))
    for rows in ([0, 1, 2], [2, 1, 2, 0], [1]):
        states = model.read_out(prefix.select(rows), [FAR_APART[row] for row in rows])
        torch.testing.assert_close(normalize(states, dim=-1), alone[rows], rtol=0, atol=2e-6)
    assert not torch.allclose(alone[0], model.embed(model.collate(items[:1]))[0], atol=1e-3)


@pytest.mark.parametrize("name", COUNTING)
def test_thoughts_are_written_alike_alone_and_in_a_batch_that_shrinks(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    options = {"do_sample": True, "temperature": 3.0, "max_think_tokens": 12, "num_thoughts": 6}
    together = model.reason(model.collate(items), seeds=range(3), **options)
    assert len({len(row) for row in together}) > 1, "no row left the batch early"
    for row, item in enumerate(items):
        alone = model.reason(model.collate([item]), seeds=[row], **options)
        assert alone == together[6 * row : 6 * row + 6]


@pytest.mark.parametrize("interface", INTERFACES)
@pytest.mark.parametrize("name", COUNTING)
def test_gradient_flows_where_states_are_written_in_place(make_model, make_items, name, interface):
    model, items = make_model(name, interface=interface), make_items(name)
    query = model.collate(items)
    think = {**query, **model.collate_completions(FAR_APART)}
    embeds = model(embed={"no_think": query, "think": think})["embeds"]
    torch.testing.assert_close(embeds["think"], model.embed(think), rtol=0, atol=2e-6)
    (embeds["think"][:, 0] + embeds["no_think"][:, 1]).sum().backward()
    grads = [p.grad for n, p in model.peft_model.named_parameters() if ".embedding." in n]
    assert any(grad is not None and grad.abs().max() > 0 for grad in grads)


@pytest.mark.parametrize("name", COUNTING)
def test_what_a_batch_holds_beside_its_thoughts_is_not_cut_by_row(make_model, make_items, name):
    model, items = make_model(name, interface="shared_prefill"), make_items(name)
    prefix = model.read(model.prepare(model.collate(items)))
    thoughts, tail = model.collate_completions(FAR_APART), model._tail(False)
    of_pictures = {"pixel_values": torch.zeros(1, 3), "batch_num_images": [1, 0, 0]}
    with torch.no_grad():
        found = model._read_tail(prefix, {**of_pictures, **thoughts}, tail)
        torch.testing.assert_close(found, model._read_tail(prefix, thoughts, tail))


@sharing_pictures
@pytest.mark.parametrize("name", FAMILIES)
def test_selected_prompts_are_read_as_if_they_were_alone(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    completions = completions_for(items)
    rows = [2, 0, 2]
    prompts = model.prepare(model.collate(items))
    assert prompts.image_tokens is not None
    with torch.no_grad():
        alone = model.embed(model.collate([items[r] for r in rows], [completions[r] for r in rows]))
    of_prompts = model.read(prompts, rows)
    of_prefix = model.read(prompts).select(rows)
    for prefix in (of_prompts, of_prefix):
        states = model.read_out(prefix, [completions[row] for row in rows])
        torch.testing.assert_close(normalize(states, dim=-1), alone)
    assert model.reason(prompts, rows, max_think_tokens=5) == [
        model.reason(model.collate([items[row]]), max_think_tokens=5)[0] for row in rows
    ]


@pytest.mark.parametrize("name", FAMILIES)
def test_prefixes_of_different_lengths_merge(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    completions = completions_for(items)
    prefixes = [model.read(model.prepare(model.collate([item]))) for item in items]
    assert all(prefix.is_mergeable for prefix in prefixes)
    assert len({prefix.attention_mask.shape[1] for prefix in prefixes}) > 1
    with torch.no_grad():
        expected = model.embed(model.collate(items, completions))
    states = model.read_out(merge(prefixes), completions)
    torch.testing.assert_close(normalize(states, dim=-1), expected)


@sharing_pictures
@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_of_different_batches_merge(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    options = {"do_sample": True, "temperature": 2.0, "max_think_tokens": 6}
    seeds = list(range(len(items)))
    batches = [[1], [0, 2], seeds[3:]] if len(items) > 3 else [[1], [0, 2]]
    order = [row for rows in batches for row in rows]
    parts = [model.prepare(model.collate([items[row] for row in rows])) for rows in batches]
    assert all(part.is_mergeable for part in parts)
    assert len({part.inputs["input_ids"].shape[1] for part in parts}) > 1
    merged = merge_prompts(parts)
    whole = model.prepare(model.collate([items[row] for row in order]))
    assert merged.lengths() == whole.lengths()
    assert merged.image_tokens == whole.image_tokens
    torch.testing.assert_close(
        model.read_out(model.read(merged), completions_for(items)),
        model.read_out(model.read(whole), completions_for(items)),
    )
    thoughts = model.reason(merged, seeds=order, **options)
    assert thoughts == model.reason(whole, seeds=order, **options)
    # A row taken out of the merged batch still has its own pictures.
    last = model.read_out(model.read(merged, [len(items) - 1]))
    torch.testing.assert_close(last, model.read_out(model.read(whole))[-1:])


def test_prompts_that_cannot_be_told_apart_do_not_merge(make_model, make_items):
    model = make_model()
    prompts = model.prepare(model.collate(make_items("idefics3")))
    blind = type(prompts)(prompts.inputs, prompts.position_ids, prompts.vision, None)
    assert not blind.is_mergeable
    with pytest.raises(ValueError, match="cannot be told apart"):
        merge_prompts([prompts, blind])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_next_position_is_the_one_of_a_longer_prompt(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    batch = model.collate(items, ["a b"] * len(items))
    prefix = model.read(model.prepare(batch))
    whole = position_ids(model.backbone, join_sequence(batch))
    whole = whole if whole.ndim == 2 else whole[0]
    assert torch.equal(prefix.next_position, whole[:, batch["input_ids"].shape[1]])


def test_pictures_that_cannot_be_told_apart_are_read_together(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    prompts = model.prepare(model.collate(items))
    expected = model.read_out(model.read(prompts, [1]))
    blind = type(prompts)(prompts.inputs, prompts.position_ids, prompts.vision, None)
    with pytest.raises(ValueError, match="cannot be told apart"):
        blind.select([1])
    torch.testing.assert_close(model.read_out(model.read(blind, [1])), expected)


def test_gradient_of_shared_prompts_is_that_of_separate_passes(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    query = model.collate(items)
    think = {**query, **model.collate_completions(completions_for(items))}

    def gradients(together):
        model.zero_grad()
        if together:
            embeds = model(embed={"no_think": query, "think": think})["embeds"]
        else:
            embeds = {"no_think": model.embed(query), "think": model.embed(think)}
        direction = torch.linspace(-1, 1, embeds["think"].shape[1])
        (embeds["no_think"] @ direction - (embeds["think"] @ direction).square()).sum().backward()
        return {
            key: value.grad.clone()
            for key, value in model.named_parameters()
            if value.grad is not None
        }

    shared, separate = gradients(True), gradients(False)
    assert shared.keys() == separate.keys()
    assert any("lora_" in key for key in shared)
    for key in shared:
        torch.testing.assert_close(shared[key], separate[key], rtol=1e-4, atol=1e-6)
