"""Fingerprints change with every part a result depends on, and with nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_backbones import make_llama

from twn_rl.data.chat import Renderer
from twn_rl.modeling.adapters import snapshot_reasoning_adapter
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import DOCUMENT_SIDE, QUERY_SIDE, Gate
from twn_rl.modeling.model import DualLoraModel

EMBEDDING, REASONING, ROWS = "lora_B.embedding", "lora_B.default", "trainable_tokens_delta"


def nudge(model: DualLoraModel, part: str) -> None:
    """Change every weight whose name holds `part`."""
    with torch.no_grad():
        touched = [p.add_(0.01) for name, p in model.named_parameters() if part in name]
    assert touched


def kinds(model: DualLoraModel) -> dict[str, Any]:
    found = Fingerprints(model)
    return {
        "vectors": found.vectors,
        "thoughts": found.thoughts,
        "query": found.decision(QUERY_SIDE),
        "document": found.decision(DOCUMENT_SIDE),
        "everything": found.everything,
        "gate": found.gate_origin,
    }


def changed(model: DualLoraModel, change: Callable[[DualLoraModel], object]) -> set[str]:
    before = kinds(model)
    change(model)
    after = kinds(model)
    return {name for name in before if before[name] != after[name]}


def test_equal_models_have_equal_fingerprints(make_model) -> None:
    for name in ("llama", "idefics3"):
        assert kinds(make_model(name)) == kinds(make_model(name))


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (EMBEDDING, {"vectors", "everything", "gate"}),
        (ROWS, {"vectors", "everything", "gate"}),
        (REASONING, {"thoughts", "everything", "gate"}),
        ("mlp.up_proj.base_layer", {"vectors", "thoughts", "everything", "gate"}),
        ("vision_model", {"vectors", "thoughts", "everything", "gate"}),
    ],
)
def test_weights_belong_to_what_is_made_with_them(make_model, part, expected) -> None:
    assert changed(make_model(), lambda model: nudge(model, part)) == expected


def test_token_tables_count_but_for_the_random_rows_of_new_tokens(make_model) -> None:
    model = make_model("llama")
    table = model.backbone.model.get_input_embeddings().weight.data
    first_new = min(model.readout_ids)
    assert changed(model, lambda _: table[first_new:].add_(1)) == set()
    assert changed(model, lambda _: table[:first_new].add_(1)) >= {"vectors", "thoughts"}


def test_another_precision_gives_other_vectors_and_keeps_the_gate(make_model) -> None:
    moved = changed(make_model("llama"), lambda model: model.backbone.model.bfloat16())
    assert moved == {"vectors", "thoughts", "everything"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"backbone_revision": "abc"}, {"vectors", "thoughts"}),
        ({"renderer": Renderer(system_prompt="find")}, {"vectors", "thoughts", "gate"}),
        ({"max_length": 40}, {"vectors", "thoughts", "gate"}),
        ({"max_image_pixels": 40}, {"vectors", "thoughts", "gate"}),
        ({"num_readout_tokens": 2}, {"vectors", "gate"}),
        ({"num_reason_tokens": 2}, {"vectors", "gate"}),
        ({"thinking_decision": "policy"}, {"thoughts", "query"}),
        ({"gate_threshold": 0.3}, {"query"}),
        ({"document_gate_threshold": 0.3}, {"document"}),
        ({"max_think_tokens": 3}, set()),
        ({"backbone": "elsewhere"}, None),
    ],
)
def test_settings_belong_to_what_they_change(make_model, change, expected) -> None:
    moved = changed(make_model("llama"), lambda model: vars(model.config).update(change))
    assert moved == (set() if expected is None else {*expected, "everything"})


def test_the_policys_threshold_counts_where_the_policy_decides(make_model) -> None:
    def raise_threshold(model: DualLoraModel) -> None:
        model.config.policy_threshold = 0.9

    assert changed(make_model("llama"), raise_threshold) == set()
    policy = make_model("llama", thinking_decision="policy")
    assert changed(policy, raise_threshold) == {"query", "everything"}


def test_the_chat_template_counts(make_model) -> None:
    def reword(model: DualLoraModel) -> None:
        model.processor.chat_template += " "

    assert changed(make_model("llama"), reword) == {"vectors", "thoughts", "everything"}


def test_a_gate_decides_for_its_side_alone(make_model) -> None:
    def fit(model: DualLoraModel) -> None:
        model.gates[QUERY_SIDE] = Gate(model.hidden_size, 4)

    model = make_model("llama")
    assert changed(model, fit) == {"query", "everything"}
    assert changed(model, lambda model: nudge(model, "gates.query")) == {"query", "everything"}


def test_with_kv_detach_the_reasoner_is_part_of_the_vectors_until_a_snapshot_is(make_model) -> None:
    model = make_model("llama", interface="kv_detach")
    assert "vectors" in changed(model, lambda model: nudge(model, REASONING))
    before = Fingerprints(model).vectors
    model.prefill_adapter = snapshot_reasoning_adapter(model.peft_model)
    assert Fingerprints(model).vectors == before, "a copy reads alike"
    assert "vectors" not in changed(model, lambda model: nudge(model, REASONING))


def test_what_a_gate_was_fitted_to_is_as_checkpoints_hold_it() -> None:
    config = TwnConfig(
        num_readout_tokens=3,
        reasoning_lora=LoraSettings(r=2),
        embedding_lora=LoraSettings(r=3),
    )
    model = DualLoraModel.from_backbone(make_llama(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            count = parameter.numel()
            parameter.copy_(torch.linspace(-1, 1, count).view_as(parameter))
    assert Fingerprints(model).gate_origin == {
        "embedding": "16a3d69226fe2b1d317d593659ffc4d5db8b1bce322f6f8383f76b4f0b38e319",
        "reasoning": "da4270153652027bf7732afbdd42e57ab45e04bb3ddb8d85522c0e863bd20dcd",
    }
