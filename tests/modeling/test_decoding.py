"""Decoding: the right distribution, rows that do not depend on each other."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GenerationConfig

from twn_rl.modeling.adapters import REASONING_ADAPTER, use_adapter
from twn_rl.modeling.decoding import dice, pick_tokens

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_ids_are_those_of_the_librarys_generate(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    batch = model.collate(items)
    settings = GenerationConfig(
        max_new_tokens=8,
        do_sample=False,
        suppress_tokens=model.suppressed_token_ids,
        eos_token_id=model.backbone.eos_token_id,
        pad_token_id=model.tokenizer.pad_token_id,
    )
    with torch.no_grad(), use_adapter(model.peft_model, REASONING_ADAPTER):
        expected = model.peft_model.generate(**batch, generation_config=settings)
    expected = expected[:, batch["input_ids"].shape[1] :].tolist()
    rows = model.reason(batch, max_think_tokens=8)
    assert [row == want[: len(row)] for row, want in zip(rows, expected, strict=True)] == [
        True
    ] * len(items)
    eos = model.backbone.eos_token_id
    assert all(row[-1] == eos or len(row) == 8 for row in rows)


def test_sampled_thoughts_do_not_depend_on_the_batch(make_model, make_items):
    for name in FAMILIES:
        model, items = make_model(name), make_items(name)
        options = {"do_sample": True, "num_thoughts": 2, "max_think_tokens": 6, "temperature": 2.0}
        together = model.reason(model.collate(items), seeds=range(7, 7 + len(items)), **options)
        for row, item in enumerate(items):
            alone = model.reason(model.collate([item]), seeds=[7 + row], **options)
            assert together[2 * row : 2 * row + 2] == alone


def test_a_row_that_ends_early_leaves_the_others_as_they_were(make_model, make_items):
    model, items = make_model("llama"), make_items("llama")
    free = model.reason(model.collate(items), max_think_tokens=8)
    eos = model.backbone.eos_token_id
    head = model.backbone.model.get_output_embeddings()
    # The token row 0 wrote third now means the end of turn for everyone.
    token = free[0][2]
    with torch.no_grad():
        head.weight[[eos, token]] = head.weight[[token, eos]]
    swapped = [[{eos: token, token: eos}.get(i, i) for i in row] for row in free]
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in swapped]
    got = model.reason(model.collate(items), max_think_tokens=8)
    assert got[0] == expected[0]
    assert len(got[0]) < 8


@given(
    logits=st.lists(st.floats(-5, 5), min_size=2, max_size=12),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.1]),
)
def test_a_die_falls_on_tokens_by_their_probability(logits, top_p):
    row = torch.tensor(logits)
    uniforms = (torch.arange(4000) + 0.5) / 4000
    tokens = pick_tokens(row.expand(4000, -1), uniforms, top_p=top_p)
    share = torch.bincount(tokens, minlength=len(row)) / 4000
    probability = row.double().softmax(0)
    # Ties in probability may be broken either way, so compare sorted shares.
    ranked = probability.sort(descending=True).values
    kept = torch.where(ranked.cumsum(0) - ranked < top_p, ranked, 0.0)
    expected = kept / kept.sum()
    np.testing.assert_allclose(share.sort(descending=True).values, expected, atol=2e-3)


def test_suppressed_tokens_are_never_drawn_even_by_the_highest_die():
    logits = torch.tensor([[0.0, 1.0, float("-inf")]])
    highest = torch.tensor([1.0 - 2**-53], dtype=torch.float64)
    assert pick_tokens(logits, highest).item() == 1
    assert pick_tokens(logits, torch.tensor([0.0])).item() == 0


def test_dice_belong_to_the_prompt_and_not_to_the_batch():
    both = dice(2, [1, 2], 3, 5)
    assert both.shape == (6, 5)
    assert torch.equal(both[3:], dice(1, [2], 3, 5))
    with pytest.raises(ValueError, match="2 seeds for 3 prompts"):
        dice(3, [1, 2], 1, 5)
