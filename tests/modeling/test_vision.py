"""Passes that share their pictures share one run of the vision tower, and nothing else changes."""

import functools

import pytest
import torch
from tiny_backbones import sharing_pictures

from twn_rl.modeling.vision import FEATURES_KEY, share_images

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl"]
THOUGHTS = ("<think> camel is top left </think>", "<think> zebra below </think>")


@pytest.fixture
def count_encodings(monkeypatch):
    """Return model -> list that grows with every call of its get_image_features."""

    def start(model):
        family, calls = type(model.backbone.inner_model), []
        encode = family.get_image_features

        @functools.wraps(encode)  # with the signature, which the code under test reads
        def counting(*args, **kwargs):
            calls.append(kwargs)
            return encode(*args, **kwargs)

        monkeypatch.setattr(family, "get_image_features", counting)
        return calls

    return start


def _batches(model, items):
    """Return a no-think and two think batches of the same prompts, with the same tensors."""
    prompts = model.collate(items)
    thinks = [prompts | model.collate_completions([text] * len(items)) for text in THOUGHTS]
    return {"no_think": prompts, "think": thinks[0], "other": thinks[1]}


def _assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@sharing_pictures
@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
@pytest.mark.parametrize("name", FAMILIES)
def test_shared_pictures_are_encoded_once_and_give_the_same_numbers(
    make_model, make_items, count_encodings, name, interface
):
    model = make_model(name, interface=interface)
    batches = _batches(model, make_items(name))
    calls = count_encodings(model)
    with torch.no_grad():
        vectors = {key: model.embed(batch) for key, batch in batches.items()}
        nll, count = model.token_nll(batches["think"])
        assert len(calls) == 4  # alone, each pass looks at the pictures again
        calls.clear()
        output = model(embed=batches, token_nll=batches["think"])
    assert len(calls) == 1
    assert list(output["embeds"]) == list(batches)
    for key, expected in vectors.items():
        _assert_close(output["embeds"][key], expected)
    assert not torch.allclose(vectors["think"], vectors["other"], atol=1e-3)
    _assert_close(output["token_nll"], nll)
    assert torch.equal(output["token_count"], count)


@pytest.mark.parametrize("name", FAMILIES)
def test_different_pictures_are_never_shared(make_model, make_items, count_encodings, name):
    model, items = make_model(name), make_items(name)
    first, second = model.collate(items[2:3]), model.collate(items[3:])
    expected = [model.embed(first), model.embed(second)]
    calls = count_encodings(model)
    output = model(embed={"query": first, "target": second, "again": first})["embeds"]
    assert len(calls) == 2
    _assert_close(output["query"], expected[0])
    _assert_close(output["again"], expected[0])
    _assert_close(output["target"], expected[1])


@pytest.mark.parametrize("name", [*FAMILIES, "llama"])
def test_batches_without_pictures_are_left_untouched(make_model, make_items, count_encodings, name):
    model = make_model(name)
    batch = model.collate(make_items(name)[:2], THOUGHTS)
    calls = count_encodings(model) if name != "llama" else []
    (shared,) = share_images(model.backbone, {"text": batch}).values()
    assert set(shared) == set(batch)
    assert all(shared[key] is batch[key] for key in batch)
    _assert_close(model(embed={"text": batch})["embeds"]["text"], model.embed(batch))
    assert not calls


@sharing_pictures
@pytest.mark.parametrize("name", FAMILIES)
def test_text_beside_pictures_gets_no_features(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    batches = {"text": model.collate(items[:2]), "pictures": model.collate(items[2:])}
    shared = share_images(model.backbone, batches)
    assert set(shared["text"]) == set(batches["text"])
    assert FEATURES_KEY in shared["pictures"]
    assert "pixel_values" not in shared["pictures"]
    assert "pixel_values" in batches["pictures"]  # the caller's batch is not changed
