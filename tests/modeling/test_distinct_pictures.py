"""Rows that share a picture share its features, and get the outputs of encoding each."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from made_records import picture

from twn_rl.data.record import Item
from twn_rl.modeling.distinct_pictures import encoding_distinct
from twn_rl.modeling.model import DualLoraModel

# Groups of one picture each, and of one and of two, apart as TRL's shuffling leaves them.
ONE_EACH = [(0,), (1,), (0,), (2,), (0,), (1,), (0,)]
SEVERAL = [(0,), (1, 2), (0,), (1, 2), (0,)]


@pytest.mark.parametrize("shown", [ONE_EACH, SEVERAL], ids=["one_each", "several"])
@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "qwen2_5_vl"])
def test_a_shared_picture_is_encoded_once_and_changes_no_output(
    make_model: Callable[..., DualLoraModel], name: str, shown: list[tuple[int, ...]]
) -> None:
    model = make_model(name)
    own = [picture(seed, 64, 64) for seed in range(3)]
    items = [Item(text="camel left", images=tuple(own[i] for i in row)) for row in shown]
    batch = model.collate(items)
    inner: Any = model.backbone.inner_model
    tower: Any = getattr(inner, "vision_model", None) or inner.visual
    seen: list[int] = []
    tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(next(iter((*args, *kwargs.values()))))),
        with_kwargs=True,
    )
    with torch.no_grad():
        expected = model.backbone.model(**batch).logits
        with encoding_distinct(model.backbone):
            found = model.backbone.model(**batch).logits
        alone = model.backbone.model(**batch).logits
    assert len(seen) == 3
    assert seen[0] == seen[2]
    assert seen[1] * 7 == seen[0] * 3  # 3 distinct of 7 pictures, all of one size
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert torch.equal(alone, expected)
    assert "get_image_features" not in vars(inner)
