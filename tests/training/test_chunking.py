"""Batches in chunks: the same tensors, the same vectors, the same gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_records import picture_records
from short_runs import SHORT_RUN, small_model
from tiny_backbones import sharing_pictures

from twn_rl.data.record import Item
from twn_rl.modeling.adapters import set_trainable
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.chunking import PATCHES_PER_TOKEN, Chunks, join_prompts, num_patches, pack
from twn_rl.training.latent import LatentConfig
from twn_rl.training.sft import SftConfig, SftTrainer


@given(
    st.lists(st.tuples(st.integers(1, 50), st.integers(0, 900)), min_size=1, max_size=40),
    st.integers(1, 120),
)
def test_every_row_is_in_one_chunk_and_no_chunk_is_over_its_budget(
    rows: list[tuple[int, int]], budget: int
) -> None:
    lengths, patches = [row[0] for row in rows], [row[1] for row in rows]
    chunks = pack(lengths, budget, patches)
    assert sorted(row for chunk in chunks for row in chunk) == list(range(len(rows)))
    for chunk in chunks:
        tokens = len(chunk) * max(lengths[row] for row in chunk)
        pixels = sum(patches[row] for row in chunk)
        assert len(chunk) == 1 or (tokens <= budget and pixels <= PATCHES_PER_TOKEN * budget)


@pytest.mark.parametrize("name", ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"])
def test_joined_prompts_are_those_of_one_call_of_the_processor(
    name: str, make_model: Any, make_items: Any
) -> None:
    model, items = make_model(name), make_items(name)
    whole = model.collate(items)
    joined = join_prompts(model.backbone, [model.collate([item]) for item in items])
    assert joined.keys() == whole.keys()
    for key, value in whole.items():
        assert torch.equal(joined[key], value), key
    alone = [num_patches(model.backbone, model.collate([item])) for item in items]
    assert (num_patches(model.backbone, whole) == 0) == (name == "llama")
    assert sum(alone) > 0 or name == "llama"


def test_the_output_of_a_processor_that_cannot_be_joined_is_named() -> None:
    model = small_model()
    batch = {**model.collate([Item(text="camel")]), "rows": [[2]]}
    with pytest.raises(ValueError, match="rows of the processor is list"):
        join_prompts(model.backbone, [batch, batch])


def test_accumulation_is_refused_because_its_batches_do_not_see_each_other(tmp_path: Any) -> None:
    for kind in (SftConfig, LatentConfig):
        with pytest.raises(ValueError, match="raise per_device_train_batch_size instead"):
            kind(
                output_dir=str(tmp_path),
                contrastive_chunk_tokens=100,
                gradient_accumulation_steps=2,
                **SHORT_RUN,
            )
        with pytest.raises(ValueError, match="contrastive_chunk_tokens = 0"):
            kind(output_dir=str(tmp_path), contrastive_chunk_tokens=0, **SHORT_RUN)


def test_with_dropout_the_gradient_is_that_of_one_graph_through_all_chunks(tmp_path: Any) -> None:
    """The reference keeps the graph of every chunk, under the same dice in the same order."""
    folder = tmp_path / "data"
    folder.mkdir()
    records = picture_records(folder)
    loras: dict[str, Any] = {
        "reasoning_lora": LoraSettings(r=2, alpha=4, dropout=0.3),
        "embedding_lora": LoraSettings(r=3, alpha=6, dropout=0.3),
    }
    args = SftConfig(
        output_dir=str(tmp_path / "run"),
        per_device_train_batch_size=6,
        max_steps=1,
        contrastive_chunk_tokens=60,
        **SHORT_RUN,
    )
    trainer: Any = SftTrainer(small_model(**loras), args, records)
    set_trainable(trainer.dual_model.peft_model, ["default", "embedding"])
    trained = [p for p in trainer.model.parameters() if p.requires_grad]

    torch.manual_seed(7)
    inputs = trainer.data_collator(list(records))
    assert all(len(own) > 1 for own in inputs["chunks"].kinds.values())
    loss = trainer.training_step(trainer.model, inputs)
    found = [p.grad.clone() for p in trained]

    torch.manual_seed(7)
    inputs = trainer.data_collator(list(records))
    chunks: Chunks = inputs["chunks"]
    trainer._begin_step(inputs)
    vectors: dict[str, torch.Tensor] = {}
    tokens = torch.zeros(())
    trainer.model.train()
    pieces: dict[str, list[tuple[int, torch.Tensor]]] = {}
    states = []
    for kind, own in chunks.kinds.items():
        for chunk in own:
            states.append((kind, chunk, torch.get_rng_state()))
            call = trainer._chunk_call(kind, *trainer._on_device(chunk), inputs, is_second=False)
            for name, value in trainer.model(**call)["embeds"].items():
                rows = zip(chunk.rows.tolist(), value, strict=True)
                pieces.setdefault(name, []).extend(rows)
    for kind, chunk, state in states:
        if kind == "query":  # the token loss comes after the vectors, under the dice of its chunk
            torch.set_rng_state(state)
            call = trainer._chunk_call(kind, *trainer._on_device(chunk), inputs, is_second=True)
            outputs = trainer.model(**call)
            tokens = tokens + trainer._row_losses(outputs, chunk, {}, inputs)["token"]
    for name, rows in pieces.items():
        vectors[name] = torch.stack([value for _, value in sorted(rows, key=lambda r: r[0])])
    parts = {**trainer._contrastive_losses(vectors, inputs), "token": tokens}
    reference = trainer._weighted(parts)
    wanted = torch.autograd.grad(reference, trained)
    assert float(loss) == pytest.approx(float(reference.detach()), rel=1e-6)
    for parameter, gradient in zip(found, wanted, strict=True):
        torch.testing.assert_close(parameter, gradient, rtol=1e-4, atol=1e-5)


@sharing_pictures
@pytest.mark.parametrize("chunk_tokens", [None, 60])
def test_a_step_with_thoughts_of_its_own_encodes_no_picture_twice(
    tmp_path: Any, chunk_tokens: int | None
) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    records = picture_records(folder)
    seen: dict[float, list[int]] = {}
    found: dict[float, float] = {}
    for share in (0.0, 1.0):
        args = SftConfig(
            output_dir=str(tmp_path / "run"),
            per_device_train_batch_size=6,
            max_steps=1,
            self_written_from=0.0,
            self_written_share=share,
            contrastive_chunk_tokens=chunk_tokens,
            **SHORT_RUN,
        )
        trainer: Any = SftTrainer(small_model(max_think_tokens=6), args, records)
        seen[share] = count_pictures(trainer.dual_model)
        found[share] = trainer.train().training_loss
        logged = trainer.state.log_history[0]
        assert ("self_written_malformed_ratio" in logged) == bool(share)
    pictures = {item.images for record in records for item in (record.query, record.positive)}
    crops = 5  # Idefics3's processor makes of each: a view of all of it, and four parts
    assert sum(seen[1.0]) == sum(seen[0.0]) == crops * len(pictures - {()})
    assert found[1.0] != found[0.0]


def count_pictures(model: DualLoraModel) -> list[int]:
    """Return a list that grows by the crops of every run of the vision tower."""
    seen: list[int] = []
    inner: Any = model.backbone.inner_model
    inner.vision_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(next(iter((*args, *kwargs.values()))))),
        with_kwargs=True,
    )
    return seen
