"""Read-out tokens, positions, pooling, and both interfaces against plain references."""

import pytest
import torch

from twn_rl.data.record import Item
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, use_adapter
from twn_rl.modeling.readout import add_readout_tokens, join_sequence, pool, position_ids

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
THOUGHT = "<think> camel is top left </think>"


def _thoughts(items):
    return [THOUGHT, None, "<think> it </think>", THOUGHT, None][: len(items)]


def test_pooling_gives_the_unit_mean_of_the_states_in_float32():
    hidden = torch.tensor([[[3.0, 0.0], [3.0, 8.0]]], dtype=torch.bfloat16)
    assert torch.equal(pool(hidden), torch.tensor([[0.6, 0.8]]))


def test_tokens_are_added_once_and_the_table_grows_only_when_it_must(make_backbone):
    roomy, tight = make_backbone("qwen3_vl"), make_backbone("idefics3")
    roomy_size = roomy.model.get_input_embeddings().weight.shape[0]
    ids = add_readout_tokens(roomy, 4)
    assert add_readout_tokens(roomy, 4) == ids
    assert roomy.model.get_input_embeddings().weight.shape[0] == roomy_size
    old = tight.model.get_input_embeddings().weight.detach().clone()
    ids = add_readout_tokens(tight, 4)
    table = tight.model.get_input_embeddings().weight
    assert len(table) == max(ids) + 1
    assert torch.equal(table[: len(old)], old)
    assert torch.equal(table[ids[0]], old.mean(0))
    assert tight.model.lm_head.weight is table


def test_a_sequence_is_prompt_then_completion_then_read_outs():
    batch = {
        "input_ids": torch.tensor([[0, 5, 6], [7, 8, 9]]),
        "attention_mask": torch.tensor([[0, 1, 1], [1, 1, 1]]),
        "completion_ids": torch.tensor([[3, 0], [3, 4]]),
        "completion_mask": torch.tensor([[1, 0], [1, 1]]),
        "mm_token_type_ids": torch.tensor([[0, 1, 0], [1, 0, 0]]),
    }
    joined = join_sequence(batch, [98, 99])
    assert joined["input_ids"].tolist() == [[0, 5, 6, 3, 0, 98, 99], [7, 8, 9, 3, 4, 98, 99]]
    assert joined["attention_mask"].tolist() == [[0, 1, 1, 1, 0, 1, 1], [1] * 7]
    assert joined["mm_token_type_ids"].tolist() == [[0, 1, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert "completion_ids" not in joined


def test_ordinary_positions_count_real_tokens_only(make_backbone):
    mask = torch.tensor([[0, 1, 1, 1, 0, 0, 1, 1]])
    positions = position_ids(make_backbone("llama"), {"attention_mask": mask})
    assert positions[mask.bool()].tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("name", ["qwen3_vl", "qwen2_5_vl"])
def test_three_dimensional_positions_match_the_models_own_on_unpadded_rows(
    make_model, make_items, name
):
    model = make_model(name)
    for item in make_items(name):
        inputs = join_sequence(model.collate([item], [THOUGHT]), model.readout_ids)
        positions = position_ids(model.backbone, inputs)
        assert positions.shape == (3, *inputs["input_ids"].shape)
        own = model.backbone.inner_model.compute_3d_position_ids(
            input_ids=inputs["input_ids"],
            inputs_embeds=None,
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=None,
            past_key_values=None,
            attention_mask=inputs["attention_mask"],
            mm_token_type_ids=inputs["mm_token_type_ids"],
        )
        if own is None:  # no images: plain counting on all three axes
            own = torch.arange(inputs["input_ids"].shape[1]).expand(3, 1, -1)
        assert torch.equal(positions, own)
        tail = positions[:, 0, -len(model.readout_ids) :]
        assert (tail == tail[0]).all()
        assert (tail[0].diff() == 1).all()


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_does_not_depend_on_its_batch(make_model, make_items, name, interface):
    model, items = make_model(name, interface=interface), make_items(name)
    thoughts = _thoughts(items)
    with torch.no_grad():
        together = model.embed(model.collate(items, thoughts))
        reverse = model.embed(model.collate(items[::-1], thoughts[::-1])).flip(0)
        alone = [model.embed(model.collate([i], [t])) for i, t in zip(items, thoughts, strict=True)]
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(len(items)))
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    torch.testing.assert_close(together, reverse, atol=1e-5, rtol=0)
    assert torch.pdist(together).min() > 1e-3


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_empty_completion_gives_the_no_think_vector(make_model, make_items, name, interface):
    model, items = make_model(name, interface=interface), make_items(name)
    with torch.no_grad():
        plain = model.embed(model.collate(items))
        empty = model.embed(model.collate(items, [None, []] + [""] * (len(items) - 2)))
        mixed = model.embed(model.collate(items, [THOUGHT] + [None] * (len(items) - 1)))
    torch.testing.assert_close(empty, plain, atol=1e-6, rtol=0)
    torch.testing.assert_close(mixed[1:], plain[1:], atol=1e-6, rtol=0)
    assert (mixed[0] - plain[0]).norm() > 1e-3


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_beside_prompt_and_completion_changes_nothing(make_model, make_items, name):
    model, items = make_model(name), make_items(name)[:3]
    batch = model.collate(items, _thoughts(items))
    pad = model.tokenizer.pad_token_id
    left = {"input_ids": pad, "attention_mask": 0, "mm_token_type_ids": 0}
    right = {"completion_ids": pad, "completion_mask": 0}
    padded = dict(batch)
    for key in left.keys() & batch.keys():
        padded[key] = torch.nn.functional.pad(batch[key], (4, 0), value=left[key])
    for key in right:
        padded[key] = torch.nn.functional.pad(batch[key], (0, 5), value=right[key])
    with torch.no_grad():
        torch.testing.assert_close(model.embed(padded), model.embed(batch), atol=1e-5, rtol=0)
        for one, two in zip(model.token_nll(padded), model.token_nll(batch), strict=True):
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("name", FAMILIES)
def test_reencode_equals_a_plain_forward_of_the_unpadded_row(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    for item in items:
        batch = model.collate([item], [THOUGHT])
        inputs = join_sequence(batch, model.readout_ids)
        with torch.no_grad(), use_adapter(model.peft_model, EMBEDDING_ADAPTER):
            hidden = model.backbone.model(**inputs, output_hidden_states=True).hidden_states[-1]
            expected = pool(hidden[:, -len(model.readout_ids) :])
            torch.testing.assert_close(model.embed(batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_kv_detach_equals_reencode_when_both_adapters_are_silent(make_model, make_items, name):
    model, items = make_model(name, interface="kv_detach"), make_items(name)
    batch = model.collate(items, _thoughts(items))
    with torch.no_grad():
        for key, parameter in model.peft_model.named_parameters():
            if "lora_B" in key:
                parameter.zero_()
        cached = model.embed(batch)
        model.config.interface = "reencode"
        torch.testing.assert_close(cached, model.embed(batch), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_kv_detach_equals_its_reference_without_a_cache(make_model, make_items, name):
    """The reference runs the whole sequence at once and picks the adapter by position."""
    model, items = make_model(name, interface="kv_detach"), make_items(name)
    batch = model.collate(items, _thoughts(items))
    inputs = join_sequence(batch, model.readout_ids)
    positions = position_ids(model.backbone, inputs)
    num_readout_tokens = len(model.readout_ids)
    is_readout = torch.arange(inputs["input_ids"].shape[1]) >= (
        inputs["input_ids"].shape[1] - num_readout_tokens
    )

    def choose_by_position(layer, args, output):
        by_adapter = {
            adapter: layer.lora_B[adapter](layer.lora_A[adapter](args[0])) * layer.scaling[adapter]
            for adapter in (REASONING_ADAPTER, EMBEDDING_ADAPTER)
        }
        update = torch.where(
            is_readout[None, :, None], by_adapter["embedding"], by_adapter["default"]
        )
        return layer.base_layer(args[0]) + update

    layers = [m for m in model.peft_model.modules() if hasattr(m, "lora_A")]
    with torch.no_grad():
        expected_cached = model.embed(batch)
        handles = [layer.register_forward_hook(choose_by_position) for layer in layers]
        with use_adapter(model.peft_model, EMBEDDING_ADAPTER):
            hidden = model.backbone.inner_model(
                **inputs, position_ids=positions, use_cache=False
            ).last_hidden_state
        for handle in handles:
            handle.remove()
    torch.testing.assert_close(
        expected_cached, pool(hidden[:, -num_readout_tokens:]), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_embedding_never_runs_the_language_head(make_model, make_items, interface):
    model = make_model(interface=interface)
    calls = []
    model.backbone.model.lm_head.register_forward_hook(lambda *_: calls.append(1))
    model.embed(model.collate(make_items("idefics3"), None))
    assert not calls


def test_the_order_of_images_matters_and_each_is_seen(make_model, make_items):
    model, item = make_model("qwen3_vl"), make_items("qwen3_vl")[4]
    swapped = Item(instruction=item.instruction, video=item.video[::-1])
    single = Item(instruction=item.instruction, video=item.video[:1])
    with torch.no_grad():
        vectors = model.embed(model.collate([item, swapped, single]))
    assert torch.pdist(vectors).min() > 1e-3


def test_video_frames_are_read_like_images(make_model, make_items):
    model, item = make_model(), make_items("idefics3")[4]
    as_images = Item(instruction=item.instruction, images=item.video)
    with torch.no_grad():
        assert torch.equal(
            model.embed(model.collate([item])), model.embed(model.collate([as_images]))
        )
