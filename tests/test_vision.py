"""Passes that share their pictures share one run of the vision tower, and nothing else changes."""

from collections import Counter

import pytest
import torch

from twn_rl.vision import encode_images, share_images

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl"]
INTERFACES = ["reencode", "kv_detach"]
THOUGHT = "<think> camel is top left </think>"
OTHER_THOUGHT = "<think> zebra below </think>"


@pytest.fixture
def count_towers(monkeypatch):
    """Return model -> Counter of its calls of get_image_features from now on."""

    def start(model):
        inner, calls = model.backbone.inner_model, Counter()
        encode = type(inner).get_image_features

        def counting(self, *args, **kwargs):
            calls["tower"] += 1
            return encode(self, *args, **kwargs)

        # On the class and with its signature, so that the code under test sees the real one.
        counting.__signature__ = inspect.signature(encode)
        monkeypatch.setattr(type(inner), "get_image_features", counting)
        return calls

    return start


def _sharing_batches(model, items):
    """Return a no-think and two think batches of the same prompts: one pixel tensor in all."""
    prompts = model.collate(items)
    thinks = [
        prompts | model.collate_completions([thought] * len(items))
        for thought in (THOUGHT, OTHER_THOUGHT)
    ]
    assert all(batch["pixel_values"] is prompts["pixel_values"] for batch in thinks)
    return prompts, *thinks
