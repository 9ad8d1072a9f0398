"""Latent thoughts: what sees what, the head, training in two stages, one vector everywhere."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from made_records import picture
from short_runs import SHORT_RUN, small_model
from tiny_backbones import make_idefics3
from torch import Tensor

from twn_rl.data.record import Item
from twn_rl.data.record_files import RecordSet
from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.run_folder import checkpoint_to_resume
from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    adapter_parameters,
    set_trainable,
)
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.gate import DOCUMENT_SIDE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.prefix_reading import continue_prefix
from twn_rl.modeling.readout import Tail, bottleneck_mask
from twn_rl.training.gate_examples import gate_examples
from twn_rl.training.latent import DECODER_FILE, LatentConfig, LatentTrainer
from twn_rl.training.latent_decoder import (
    LatentDecoder,
    LatentLearner,
    vector_losses,
    word_losses,
)
from twn_rl.training.losses import false_negative_mask, info_nce
from twn_rl.training.measure_gains import measure_gains
from twn_rl.training.pair_batches import LatentCollator, target_text

LATENT = {"num_reason_tokens": 2, "latent_bottleneck": True}


def small_config(folder: Path, **settings: Any) -> LatentConfig:
    settings = {
        "temperature": 0.1,
        "warm_up_share": 0.0,
        "decoder_width": 16,
        "decoder_heads": 2,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
        **SHORT_RUN,
        **settings,
    }
    return LatentConfig(output_dir=str(folder), **settings)


def latent_model(seed: int = 0, **settings: Any) -> DualLoraModel:
    model = small_model(seed, **{"max_think_tokens": 6, **LATENT, **settings})
    set_trainable(model.peft_model, [EMBEDDING_ADAPTER])
    return model


def weights(model: DualLoraModel, name: str = EMBEDDING_ADAPTER) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in adapter_parameters(model.peft_model, name).items()}


def test_the_bottleneck_mask_is_causal_and_hides_the_prompt_from_read_outs():
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])  # padding, prompt, two reason tokens, two read-outs
    tail = Tail([8, 9], [6, 7], is_bottleneck=True)
    seen = bottleneck_mask(mask, tail, torch.float32)[0, 0] == 0
    expected = [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 0, 0],
        [0, 0, 1, 1, 1, 0],
        [0, 0, 1, 1, 1, 1],
    ]
    assert seen.int().tolist() == expected


@pytest.mark.parametrize("name", ["idefics3", "llama"])
@pytest.mark.parametrize("is_bottleneck", [True, False])
def test_only_a_bottleneck_hides_another_prompt_behind_the_same_reason_states(
    name: str, is_bottleneck: bool, make_model, make_items
) -> None:
    model = make_model(name, num_reason_tokens=2, latent_bottleneck=is_bottleneck)
    pair = [Item(text="camel above"), Item(text="pizza below")]
    if name == "idefics3":
        pair = [Item(text="camel", images=(picture(seed),)) for seed in (1, 2)]
    prefixes = [model.read(model.prepare(model.collate([item]))) for item in pair]
    parts, reasons = (model.backbone, model.peft_model), torch.tensor([model.reason_ids])
    with torch.no_grad():
        _, thought = continue_prefix(
            *parts, prefixes[0], reasons, torch.ones_like(reasons), adapter=EMBEDDING_ADAPTER
        )

        def read_outs() -> Tensor:
            ids = torch.tensor([model.readout_ids])
            states, _ = continue_prefix(
                *parts,
                thought,
                ids,
                torch.ones_like(ids),
                adapter=EMBEDDING_ADAPTER,
                tail=model._tail(True),
            )
            return states

        before = read_outs()
        width = prefixes[0].attention_mask.shape[1]
        for layer, other in zip(thought.cache.layers, prefixes[1].cache.layers, strict=True):
            layer.keys = torch.cat([other.keys, layer.keys[:, :, width:]], 2)
            layer.values = torch.cat([other.values, layer.values[:, :, width:]], 2)
        assert torch.equal(read_outs(), before) == is_bottleneck


@pytest.mark.parametrize("name", ["idefics3", "llama", "qwen3_vl"])
@pytest.mark.parametrize("is_bottleneck", [True, False])
@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_one_pass_equals_a_continued_prefix_and_a_batch_equals_its_rows(
    name: str, is_bottleneck: bool, interface: str, make_model, make_items
) -> None:
    settings = {"num_reason_tokens": 2, "latent_bottleneck": is_bottleneck, "interface": interface}
    model, items = make_model(name, **settings), make_items(name)
    with torch.no_grad():
        whole = model.embed(model.collate(items), is_latent=True)
        alone = torch.cat([model.embed(model.collate([item]), is_latent=True) for item in items])
        never = model.embed(model.collate(items))
    prefix = model.read(model.prepare(model.collate(items)))
    states = model.read_out(prefix, is_latent=True)
    torch.testing.assert_close(whole, alone, atol=1e-5, rtol=0)
    torch.testing.assert_close(whole, torch.nn.functional.normalize(states), atol=1e-5, rtol=0)
    assert (whole - never).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_both_attention_kernels_take_the_bottleneck(name: str, make_model, make_items) -> None:
    model, items = make_model(name, **LATENT), make_items(name)
    vectors = []
    for kernel in ("sdpa", "eager"):
        model.backbone.model.set_attn_implementation(kernel)
        with torch.no_grad():
            vectors.append(model.embed(model.collate(items), is_latent=True))
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


def test_a_kernel_without_additive_masks_is_refused(make_backbone) -> None:
    backbone = make_backbone("llama")
    backbone.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match=r"attn_implementation = 'flash_attention_2'.*sdpa"):
        DualLoraModel.from_backbone(backbone, TwnConfig(**LATENT))


def test_reason_tokens_leave_every_other_vector_as_it_was(make_model, make_items) -> None:
    plain, latent = make_model(), make_model(**LATENT)
    own = weights(plain)
    for key, parameter in adapter_parameters(latent.peft_model, EMBEDDING_ADAPTER).items():
        with torch.no_grad():
            if "lora_" in key:
                parameter.copy_(own[key])
            else:
                parameter[: len(own[key])] = own[key]
    items = make_items("idefics3")
    with torch.no_grad():
        vectors = [model.embed(model.collate(items)) for model in (plain, latent)]
    torch.testing.assert_close(*vectors, atol=1e-6, rtol=0)


def test_the_decoder_hears_reason_states_alone_and_earlier_words() -> None:
    torch.manual_seed(0)
    decoder = LatentDecoder(12, width=8, num_heads=2, max_tokens=4)
    tail = torch.randn(2, 5, 12, requires_grad=True)  # 2 reason states, 3 read-outs
    words = torch.randn(2, 3, 12, requires_grad=True)
    states, vector = decoder(tail[:, :2], words)
    (from_tail,) = torch.autograd.grad(states.square().sum(), tail, retain_graph=True)
    assert from_tail[:, :2].abs().min(1).values.max() > 0
    assert torch.equal(from_tail[:, 2:], torch.zeros(2, 3, 12))
    (from_words,) = torch.autograd.grad(states[:, 2].square().sum(), words, retain_graph=True)
    assert from_words[:, :2].abs().sum() > 0
    assert torch.equal(from_words[:, 2], torch.zeros(2, 12))
    (unused,) = torch.autograd.grad(vector.sum(), words, allow_unused=True, materialize_grads=True)
    assert torch.equal(unused, torch.zeros_like(words))


def test_a_long_text_counts_as_much_as_a_short_one() -> None:
    logits = torch.zeros(2, 3, 8)
    logits[0, 0, 5] = 100.0
    ids, mask = torch.tensor([[5, 0, 0], [1, 2, 3]]), torch.tensor([[1, 0, 0], [1, 1, 1]])
    nll, is_right = word_losses(logits, ids, mask)
    assert nll.tolist() == pytest.approx([0.0, np.log(8)], abs=1e-6)
    assert is_right.tolist() == [1.0, 0.0]


def test_regression_moves_what_is_said_and_never_the_target() -> None:
    said = torch.randn(3, 4, requires_grad=True)
    target = torch.randn(3, 4, requires_grad=True)
    vector_losses(said, target).sum().backward()
    assert said.grad is not None
    assert target.grad is None


@pytest.mark.parametrize("latent_documents", [False, True])
def test_the_loss_is_the_sum_of_its_parts_computed_by_hand(
    latent_documents: bool, records: RecordSet, tmp_path: Path
) -> None:
    model = latent_model(latent_documents=latent_documents).eval()
    chosen = [records[i] for i in range(4)]
    args = small_config(tmp_path, no_think_weight=2.0, reconstruction_weight=0.5)
    trainer = LatentTrainer(model, args, records)
    trainer.learner.eval()
    batch = trainer.data_collator(chosen)  # pyright: ignore[reportArgumentType]
    loss = trainer.compute_loss(trainer.learner, batch)
    parts = {name: values[-1] for name, values in trainer._noted.items()}
    index = torch.arange(4)
    mask = false_negative_mask(batch["query_keys"], batch["target_keys"], index)
    with torch.no_grad():
        target = model.embed(batch["target"], is_latent=latent_documents)[batch["target_rows"]]
        latent = model.embed(batch["query"], is_latent=True)
        never = model.embed(batch["query"])
        states = model(latent={"query": batch["query"]})["reason_states"]["query"]
        said = trainer.learner.decode(states, batch["text"])
    rows = []
    for row, record in enumerate(chosen):
        if record.positive.text:
            rows.append(float(said["nll"][row]))
        else:
            rows.append(float(1 - torch.cosine_similarity(said["vector"][row], target[row], dim=0)))
    expected = {
        "contrastive": info_nce(latent, target, temperature=0.1, positive_index=index, mask=mask),
        "no_think": info_nce(never, target, temperature=0.1, positive_index=index, mask=mask),
        "reconstruction": np.mean(rows),
    }
    for name, value in expected.items():
        assert parts[f"loss_{name}"] == pytest.approx(float(value), rel=1e-4), name
    total = expected["contrastive"] + 2 * expected["no_think"] + 0.5 * expected["reconstruction"]
    assert loss.item() == pytest.approx(float(total), rel=1e-4)


def test_the_warm_up_moves_rows_and_head_only_and_nothing_ever_moves_the_reasoner(
    records: RecordSet, tmp_path: Path
) -> None:
    model = latent_model()
    before, reasoner = weights(model), weights(model, REASONING_ADAPTER)
    LatentTrainer(
        model, small_config(tmp_path, max_steps=2, warm_up_share=0.9, weight_decay=0.1), records
    ).train()
    after = weights(model)
    for key in before:
        assert torch.equal(before[key], after[key]) == ("lora_" in key), key
    LatentTrainer(model, small_config(tmp_path, max_steps=2), records).train()
    joint = weights(model)
    assert not any(torch.equal(after[key], joint[key]) for key in after if "lora_B" in key)
    again = weights(model, REASONING_ADAPTER)
    assert all(torch.equal(reasoner[key], again[key]) for key in reasoner)


def test_an_optimizer_that_cannot_pass_over_lora_is_refused(
    records: RecordSet, tmp_path: Path
) -> None:
    """A DeepSpeed file that names its optimizer leaves the trainer without groups of its own."""
    args = small_config(tmp_path, max_steps=2, warm_up_share=0.9)
    trainer: Any = LatentTrainer(latent_model(), args, records)
    inner = SimpleNamespace(param_groups=[{"params": []}])
    trainer.model_wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=inner))
    with pytest.raises(ValueError, match=r"take `optimizer` out of the file or set warm_up_share"):
        trainer._hold_lora(True)
    trainer.args.warm_up_share = 0.0
    trainer._hold_lora(False)


def test_chains_of_thought_are_not_read(records: RecordSet, tmp_path: Path) -> None:
    model = latent_model()
    collator = LatentCollator(model, small_config(tmp_path))
    batches = []
    for cot in ("camel left", None):
        chosen = [replace(records[i], query_cot=cot, positive_cot=cot) for i in range(3)]
        batches.append(collator(chosen))
    first, second = (json.dumps(_plain(batch)) for batch in batches)
    assert first == second


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return value.tolist()


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(
    records: RecordSet, tmp_path: Path
) -> None:
    settings = {"warm_up_share": 0.3, "save_strategy": "steps", "save_steps": 2}
    whole, parts = latent_model(), latent_model()
    LatentTrainer(whole, small_config(tmp_path / "whole", **settings), records).train()
    folder = tmp_path / "whole"
    assert (folder / "checkpoint-2" / DECODER_FILE).is_file()
    trainer = LatentTrainer(parts, small_config(folder, **settings), records)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(folder, str(folder / "checkpoint-2")))
    first, second = weights(whole), weights(parts)
    assert all(torch.equal(first[key], second[key]) for key in first)
    (folder / "checkpoint-2" / DECODER_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="decoder head to resume with"):
        trainer.train(resume_from_checkpoint=str(folder / "checkpoint-2"))


def test_a_saved_model_has_no_head_and_gives_the_same_bits(
    records: RecordSet, tmp_path: Path
) -> None:
    model = latent_model(latent_documents=True)
    trainer = LatentTrainer(model, small_config(tmp_path, max_steps=1), records)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").rglob(DECODER_FILE))
    loaded = DualLoraModel.from_pretrained(tmp_path / "saved", backbone=make_idefics3())
    assert loaded.config.num_reason_tokens == 2
    assert loaded.config.latent_bottleneck
    items = [record.query for record in records]
    with torch.no_grad():
        vectors = [m.eval().embed(m.collate(items), is_latent=True) for m in (model, loaded)]
    assert torch.equal(*vectors)
    changed = replace(loaded.config, num_reason_tokens=3)
    changed.save(tmp_path / "saved")
    with pytest.raises(ValueError, match="other shapes"):
        DualLoraModel.from_pretrained(tmp_path / "saved", backbone=make_idefics3())


def test_a_config_without_reason_tokens_is_read_and_fingerprinted_as_ever() -> None:
    stored = TwnConfig().to_dict()
    for name in ("num_reason_tokens", "latent_bottleneck", "latent_documents"):
        del stored[name]
    config = TwnConfig.from_dict(stored)
    assert config.num_reason_tokens == 0
    assert config.readout_settings == {"num_readout_tokens": 4}


def test_serving_and_evaluation_agree_on_latent_vectors(records: RecordSet) -> None:
    model = latent_model().eval()
    embedder = ThinkingEmbedder(model)
    queries = [record.query for record in records]
    with torch.no_grad():
        expected = model.embed(model.collate(queries), is_latent=True).numpy()
    details = embedder.encode_query(queries, think="latent", return_details=True, batch_size=4)
    np.testing.assert_allclose(details.embeddings, expected, atol=1e-5)
    assert details.think_tokens == [0] * len(queries)
    np.testing.assert_array_equal(embedder.encode_query(queries, batch_size=4), details.embeddings)
    raw = embedder.encode_query(queries, think="latent", normalize_embeddings=False)
    np.testing.assert_allclose(
        raw / np.linalg.norm(raw, axis=1, keepdims=True), expected, atol=1e-5
    )
    settings = EvaluationSettings(modes=("never", "latent"), show_progress_bar=False)
    evaluation = evaluate(model, records, settings)
    rows = [row for row in evaluation.queries if row["mode"] == "latent"]
    assert evaluation.metrics["test/all/latent/think_tokens"] == 0
    assert evaluation.metrics["test/all/latent/think_rate"] == 0
    targets = {
        key: embedder.encode_document([record.positive])[0]
        for record, key in zip(records, [row["positive"] for row in rows], strict=True)
    }
    for row, vector in zip(rows, expected, strict=True):
        nearest = [key for key in row["nearest"] if key in targets]
        scores = [float(targets[key] @ vector) for key in nearest]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("latent_documents", [False, True])
def test_documents_are_read_as_in_training(latent_documents: bool) -> None:
    model = latent_model(latent_documents=latent_documents).eval()
    embedder, documents = ThinkingEmbedder(model), [Item(text="camel"), Item(text="pizza left")]
    with torch.no_grad():
        expected = model.embed(model.collate(documents), is_latent=latent_documents).numpy()
    for think in ("never", "auto"):
        vectors = embedder.encode_document(documents, think=think)
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


@pytest.mark.parametrize("latent_documents", [False, True])
def test_a_gate_learns_from_documents_as_they_are_served(
    latent_documents: bool, records: RecordSet, tmp_path: Path
) -> None:
    model = latent_model(latent_documents=latent_documents).eval()
    labels = measure_gains(model, records, DOCUMENT_SIDE, tmp_path)
    documents = [example.item for example in gate_examples(records, DOCUMENT_SIDE)]
    served = ThinkingEmbedder(model).encode_document(documents, normalize_embeddings=False)
    np.testing.assert_allclose(labels.states, served, atol=1e-4)
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert plan.get("is_latent", False) == latent_documents


def test_no_reason_tokens_are_a_clear_error_everywhere(records: RecordSet, tmp_path: Path) -> None:
    settings = {"num_reason_tokens": 0, "latent_bottleneck": False}
    model = latent_model(**settings)
    with pytest.raises(ValueError, match=r"num_reason_tokens = 0.*direct_only"):
        LatentTrainer(model, small_config(tmp_path), records)
    with pytest.raises(ValueError, match=r"think = 'latent'.*num_reason_tokens = 0"):
        ThinkingEmbedder(model).encode_query("camel", think="latent")
    with pytest.raises(ValueError, match=r"num_reason_tokens = 0.*latent_embed"):
        evaluate(model, records, EvaluationSettings(modes=("latent",)))
    with pytest.raises(ValueError, match=r"latent_bottleneck = True with num_reason_tokens = 0"):
        TwnConfig(latent_bottleneck=True)
    trainer = LatentTrainer(model, small_config(tmp_path, max_steps=1), records, direct_only=True)
    trainer.train()
    assert "loss_reconstruction" not in trainer.state.log_history[0]
    assert trainer.learner.decoder is None


def test_a_target_without_words_needs_regression(records: RecordSet, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"record 'r1'.*no text.*regression_weight = 0"):
        LatentTrainer(latent_model(), small_config(tmp_path, regression_weight=0.0), records)
    captioned = [
        replace(record, metadata={**record.metadata, "caption": f"camel {i}"})
        for i, record in enumerate(records)
    ]
    assert target_text(captioned[1], "caption") == "camel 1"
    assert target_text(records[1], "caption") is None
    args = small_config(tmp_path, regression_weight=0.0, max_steps=1)
    LatentTrainer(latent_model(), args, captioned).train()
    broken = replace(records[1], metadata={"caption": 7})
    with pytest.raises(ValueError, match=r"record 'r1'.*= 7; expected a string"):
        target_text(broken, "caption")


def test_the_check_tells_a_head_that_listens_from_one_that_does_not(
    records: RecordSet, tmp_path: Path
) -> None:
    model = latent_model(num_reason_tokens=4, latent_bottleneck=False).eval()
    trainer = LatentTrainer(model, small_config(tmp_path), records)
    deaf = trainer.check_reconstruction(records)
    assert deaf["reconstruction_own"] == pytest.approx(deaf["reconstruction_shuffled"], abs=0.1)
    batch = trainer.data_collator(list(records))  # pyright: ignore[reportArgumentType]
    with torch.no_grad():
        states = model(latent={"query": batch["query"]})["reason_states"]["query"]
    decoder = trainer.learner.decoder
    assert decoder is not None
    optimizer = torch.optim.Adam(decoder.parameters(), lr=1e-2)
    for _ in range(160):
        said = trainer.learner.decode(states, batch["text"])
        optimizer.zero_grad()
        said["nll"].sum().backward()
        optimizer.step()
    hearing = trainer.check_reconstruction(records)
    assert hearing["reconstruction_own"] < 0.5 * hearing["reconstruction_shuffled"]
    assert hearing["word_accuracy_own"] > hearing["word_accuracy_shuffled"]


def test_every_problem_of_the_settings_is_named_at_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"temperature = 0.*warm_up_share = 1.*decoder_width = 10"):
        small_config(tmp_path, temperature=0, warm_up_share=1, decoder_width=10, decoder_heads=4)


def test_a_head_without_reason_tokens_is_refused() -> None:
    model = latent_model(num_reason_tokens=0, latent_bottleneck=False)
    with pytest.raises(ValueError, match="expected K >= 1"):
        LatentLearner(model, LatentDecoder(model.hidden_size, width=16))
