"""The gate itself: what it learns, what it says when there is nothing to learn, and its file."""

import logging
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from twn_rl.metrics.calibration import expected_calibration_error, roc_auc
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import DOCUMENT_SIDE, QUERY_SIDE, FitSettings, Gate, Members, fit_gate
from twn_rl.modeling.gate_files import GATE_FILE, drop_gates
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer, freeze_scorer
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.sft import SftConfig, SftTrainer

WIDTH = 16


def clusters(count: int = 400, positive_share: float = 0.5, seed: int = 0):
    """States whose first direction tells the class; (N, D) and (N,) of 0 and 1."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(count, generator=generator) < positive_share).float()
    states = torch.randn(count, WIDTH, generator=generator)
    states[:, 0] += 4 * (2 * labels - 1)
    return states, labels


def noisy(count: int = 3000, seed: int = 0):
    """States whose class is a coin with 60 % or 10 %, told by the first direction."""
    generator = torch.Generator().manual_seed(seed)
    side = (torch.rand(count, generator=generator) < 0.3).float()
    states = torch.randn(count, WIDTH, generator=generator)
    states[:, 0] += 6 * (2 * side - 1)
    labels = (torch.rand(count, generator=generator) < 0.1 + 0.5 * side).float()
    return states, labels, side


def add_gate(model, side=QUERY_SIDE, seed=0) -> Gate:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        gate = Gate(model.hidden_size, 8)
        for parameter in gate.parameters():
            parameter.normal_()
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates[side] = gate
    return gate


def nudge(model, adapter) -> None:
    with torch.no_grad():
        for parameter in adapter_parameters(model.peft_model, adapter).values():
            parameter += 0.5


def test_the_gate_thinks_where_the_labels_say_so_and_not_the_other_way_round():
    gate, report = fit_gate(*clusters())
    states, labels = clusters(seed=1)
    probability = gate.probability(states)
    assert probability[labels == 1].mean() > 0.9
    assert probability[labels == 0].mean() < 0.1
    assert (roc_auc(probability, labels) or 0) > 0.98
    assert report["held_out_auc"] > 0.98
    assert report["num_folds"] == len(report["epochs"]) == 10
    assert torch.equal(probability, gate(states).sigmoid())


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_an_unbalanced_class_neither_drowns_nor_shifts_the_probabilities(share):
    gate, report = fit_gate(*clusters(2000, share))
    states, labels = clusters(2000, share, seed=1)
    probability = gate.probability(states)
    assert (roc_auc(probability, labels) or 0) > 0.98
    assert float(probability.mean()) == pytest.approx(share, abs=0.05)
    assert report["num_positive"] == pytest.approx(2000 * share, abs=60)


def test_probabilities_are_those_of_the_data_though_the_classes_are_weighted_alike():
    states, labels, _ = noisy()
    gate, report = fit_gate(states, labels)
    fresh, fresh_labels, side = noisy(seed=1)
    probability = gate.probability(fresh)
    assert float(probability[side == 1].mean()) == pytest.approx(0.6, abs=0.07)
    assert float(probability[side == 0].mean()) == pytest.approx(0.1, abs=0.05)
    assert expected_calibration_error(probability, fresh_labels) < 0.08
    assert report["held_out_ece"] < 0.15


def test_soft_labels_teach_their_own_value():
    states, _, side = noisy()
    gate, _ = fit_gate(states, 0.2 + 0.6 * side)
    fresh, _, side = noisy(seed=1)
    probability = gate.probability(fresh)
    assert float(probability[side == 1].mean()) == pytest.approx(0.8, abs=0.05)
    assert float(probability[side == 0].mean()) == pytest.approx(0.2, abs=0.05)


def test_equal_seeds_fit_equal_gates_and_leave_the_global_random_state_alone():
    before = torch.random.get_rng_state()
    first, _ = fit_gate(*clusters(), FitSettings(max_epochs=3))
    assert torch.equal(torch.random.get_rng_state(), before)
    second, _ = fit_gate(*clusters(), FitSettings(max_epochs=3))
    other, _ = fit_gate(*clusters(), FitSettings(max_epochs=3, seed=1))
    states = clusters(seed=1)[0]
    assert torch.equal(first(states), second(states))
    assert not torch.equal(first(states), other(states))


@pytest.mark.parametrize(("label", "side"), [(0.0, "below"), (1.0, "above")])
def test_labels_of_one_class_give_a_constant_gate_and_a_warning(label, side, caplog):
    states = torch.randn(50, WIDTH)
    gate, report = fit_gate(states, torch.full((50,), label))
    assert report["is_constant"]
    assert report["held_out_auc"] is None
    assert "needs two of each class" in caplog.text
    probability = gate.probability(torch.randn(5, WIDTH))
    assert len(set(probability.tolist())) == 1
    assert bool((probability < 0.1).all() if side == "below" else (probability > 0.9).all())


def test_no_labels_at_all_give_even_odds(caplog):
    gate, _ = fit_gate(torch.empty(0, WIDTH), torch.empty(0))
    assert gate.probability(torch.randn(3, WIDTH)).tolist() == [0.5] * 3
    assert "0 of 0 labels" in caplog.text


def test_two_labels_of_each_class_are_enough():
    states, labels = sorted_clusters()
    _, report = fit_gate(states[:4], labels[:4])
    assert not report["is_constant"]
    assert report["num_folds"] == 2
    assert 0 <= report["held_out_auc"] <= 1


def sorted_clusters():
    states, labels = clusters(8)
    order = torch.cat([torch.nonzero(labels == label).flatten()[:2] for label in (0, 1)])
    return states[order], labels[order]


def test_bad_states_targets_and_settings_are_refused():
    states, labels = clusters(10)
    with pytest.raises(ValueError, match=r"states has shape \(10, 16\), targets \(9,\)"):
        fit_gate(states, labels[:9])
    with pytest.raises(ValueError, match=r"targets reach from -1 to 1"):
        fit_gate(states, 2 * labels - 1)
    states[3, 2] = float("nan")
    with pytest.raises(ValueError, match=r"rows \[3\] \(1 in all\) hold NaN"):
        fit_gate(states, labels)
    with pytest.raises(ValueError, match=r"num_folds = 1.*patience = 0"):
        FitSettings(patience=0, num_folds=1)


def test_members_merge_into_the_gate_whose_logit_is_their_mean():
    members = Members(WIDTH, hidden_size=4, count=3)
    states, _ = clusters()
    one = members.merge()
    torch.testing.assert_close(one(states), members(states).mean(dim=1))
    assert one.hidden_size == 12
    assert not any(p.requires_grad for p in one.parameters())


def test_every_label_is_judged_by_a_member_that_has_not_seen_it():
    states = torch.eye(200)  # nothing to learn but the examples themselves
    labels = torch.arange(200) % 2 * 1.0
    gate, report = fit_gate(states, labels, FitSettings(learning_rate=0.05))
    assert 0.4 < report["held_out_auc"] < 0.6
    assert (roc_auc(gate.probability(states), labels) or 0) > 0.9


def test_a_unit_vector_does_as_well_as_the_state_it_was_made_of():
    gate, _ = fit_gate(*clusters(), FitSettings(max_epochs=3))
    states, _ = clusters(seed=1)
    unit = torch.nn.functional.normalize(states, dim=-1)
    torch.testing.assert_close(gate(unit), gate(states))


def test_the_gate_is_frozen_and_stays_in_float32():
    states, _ = clusters(20)
    gate = Gate(WIDTH, 4)
    before = gate(states)
    gate.to(torch.bfloat16)
    assert {p.dtype for p in gate.parameters()} == {torch.float32}
    assert torch.equal(gate(states), before)
    assert not any(p.requires_grad for p in gate.parameters())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(gate(states), before)
    assert not gate(states.requires_grad_()).requires_grad


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_probabilities_are_bit_identical_after_a_round_trip(
    make_model, make_backbone, make_items, tmp_path, interface
):
    model = make_model(interface=interface)
    add_gate(model, QUERY_SIDE, 1)
    add_gate(model, DOCUMENT_SIDE, 2)
    model.config.gate_threshold, model.config.document_gate_threshold = 0.3, 0.7
    model.save_pretrained(tmp_path)
    loaded = DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("idefics3"))
    assert list(loaded.gates) == [QUERY_SIDE, DOCUMENT_SIDE]
    batch = model.collate(make_items("idefics3"))

    def probability(owner: DualLoraModel, side: str) -> torch.Tensor:
        gate = owner.gates[side]
        assert isinstance(gate, Gate)
        return gate.probability(owner.read_out(owner.read(owner.prepare(batch))))

    for side in loaded.gates:
        assert torch.equal(probability(model, side), probability(loaded, side))
    assert not torch.equal(probability(loaded, QUERY_SIDE), probability(loaded, DOCUMENT_SIDE))
    assert loaded.config.gate_threshold == 0.3
    assert loaded.config.document_gate_threshold == 0.7
    assert not any(p.requires_grad for p in loaded.parameters())


def test_the_file_says_what_the_gate_was_fitted_to(make_model, tmp_path):
    model = make_model()
    add_gate(model)
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / GATE_FILE, framework="pt") as stored:
        metadata = stored.metadata()
        assert all(key.startswith("query.") for key in stored.keys())  # noqa: SIM118
    assert metadata["hidden_size"] == "32"
    assert metadata["backbone"] == model.config.backbone
    assert metadata["embedding"] == Fingerprints(model).gate_origin["embedding"]
    assert not list(tmp_path.glob(".*tmp"))


def test_saving_a_model_without_gates_removes_the_gate_of_an_earlier_one(make_model, tmp_path):
    model = make_model()
    add_gate(model)
    model.save_pretrained(tmp_path)
    assert (tmp_path / GATE_FILE).is_file()
    make_model().save_pretrained(tmp_path)
    assert not (tmp_path / GATE_FILE).exists()


def test_a_gate_of_another_embedding_adapter_is_refused(make_model, make_backbone, tmp_path):
    model, other = make_model(), make_model(seed=1)
    add_gate(model)
    model.save_pretrained(tmp_path / "a")
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / GATE_FILE).rename(tmp_path / "b" / GATE_FILE)
    with pytest.raises(ValueError, match=r"fitted to backbone.*expected the loaded.*delete the"):
        DualLoraModel.from_pretrained(tmp_path / "b", backbone=make_backbone("idefics3"))


def test_a_gate_of_another_backbone_is_refused(make_model, make_backbone, tmp_path):
    model = make_model()
    add_gate(model)
    model.save_pretrained(tmp_path)
    backbone = make_backbone("idefics3")
    with torch.no_grad():
        for name, parameter in backbone.model.named_parameters():
            if name.endswith("q_proj.weight"):
                parameter += 1
    with pytest.raises(ValueError, match="fitted to backbone"):
        DualLoraModel.from_pretrained(tmp_path, backbone=backbone)


def test_a_lower_precision_or_another_folder_is_the_same_backbone(
    make_model, make_backbone, tmp_path
):
    model = make_model()
    add_gate(model)
    model.save_pretrained(tmp_path / "model")
    half = make_backbone("idefics3")
    half.model.to(torch.bfloat16)
    half.name = "elsewhere"
    loaded = DualLoraModel.from_pretrained(tmp_path / "model", backbone=half)
    assert list(loaded.gates) == [QUERY_SIDE]
    assert next(loaded.gates[QUERY_SIDE].parameters()).dtype == torch.float32


def test_other_reasoning_weights_load_with_a_warning_that_says_how_to_refit(
    make_model, make_backbone, tmp_path, caplog
):
    model, other = make_model(), make_model()
    add_gate(model)
    model.save_pretrained(tmp_path / "a")
    nudge(other, REASONING_ADAPTER)
    other.save_pretrained(tmp_path / "b")
    (tmp_path / "a" / GATE_FILE).rename(tmp_path / "b" / GATE_FILE)
    loaded = DualLoraModel.from_pretrained(tmp_path / "b", backbone=make_backbone("idefics3"))
    assert list(loaded.gates) == [QUERY_SIDE]
    assert f"recipes/gate_embed.py --model {tmp_path / 'b'}" in caplog.text


def test_missing_and_unexpected_tensors_are_listed(make_model, make_backbone, tmp_path):
    model = make_model()
    add_gate(model)
    model.save_pretrained(tmp_path)
    path = tmp_path / GATE_FILE
    with safe_open(path, framework="pt") as stored:
        metadata = stored.metadata()
    tensors = load_file(path)

    model.config.digests = {}  # any content is accepted
    model.config.save(tmp_path)

    def load_with(changed):
        save_file(changed, path, metadata=metadata)
        return DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("idefics3"))

    renamed = {key.replace("hidden.bias", "hidden.shift"): t for key, t in tensors.items()}
    with pytest.raises(KeyError) as error:
        load_with(renamed)
    assert "missing keys ['query.hidden.bias']" in str(error.value)
    assert "unexpected keys ['query.hidden.shift']" in str(error.value)
    with pytest.raises(ValueError, match=r"query\.hidden\.bias: checkpoint \(3,\)"):
        load_with({**tensors, "query.hidden.bias": torch.zeros(3)})
    metadata.pop("sides")
    with pytest.raises(ValueError, match=r"has metadata .*delete the file"):
        load_with(tensors)


@pytest.mark.parametrize("adapter", [EMBEDDING_ADAPTER, REASONING_ADAPTER])
def test_a_gate_whose_model_was_changed_is_not_saved_with_it(make_model, tmp_path, adapter, caplog):
    model = make_model()
    add_gate(model)
    model.config.gate_threshold = 0.4
    model.save_pretrained(tmp_path)
    nudge(model, adapter)
    model.save_pretrained(tmp_path)
    assert not (tmp_path / GATE_FILE).exists()
    assert caplog.text.count("the routing gate is dropped") == 1
    assert f"recipes/gate_embed.py --model {tmp_path}" in caplog.text
    assert model.config.gate_threshold is None


def test_a_model_loaded_to_be_trained_leaves_its_gate_behind(
    make_model, make_backbone, tmp_path, caplog
):
    model = make_model()
    add_gate(model)
    model.config.gate_threshold = 0.4
    model.save_pretrained(tmp_path)
    loaded = DualLoraModel.from_pretrained(
        tmp_path, backbone=make_backbone("idefics3"), is_trainable=True
    )
    assert not loaded.gates
    assert loaded.config.gate_threshold is None
    assert [r.levelno for r in caplog.records if "gate is dropped" in r.message] == [
        logging.WARNING
    ]
    assert "recipes/gate_embed.py" in caplog.text
    assert (tmp_path / GATE_FILE).is_file()


def test_the_trainers_drop_the_gate_before_they_train(make_model, records, tmp_path, caplog):
    options: dict[str, Any] = {
        "output_dir": str(tmp_path / "out"),
        "report_to": [],
        "use_cpu": True,
    }
    model = make_model()
    add_gate(model)
    model.config.gate_threshold = 0.4
    SftTrainer(model, SftConfig(**options), records)
    assert not model.gates
    assert model.config.gate_threshold is None
    assert caplog.text.count(f"gate_embed.py --model {tmp_path / 'out'}") == 1

    add_gate(model)
    freeze_scorer(model)
    scorer = RolloutScorer(model, records, tmp_path / "bank")
    config = EmbedGRPOConfig(**options, per_device_train_batch_size=2, num_generations=2)
    EmbedGRPOTrainer(model, load_rewards(["margin"], REWARDS), config, records, scorer)
    assert not model.gates
    assert caplog.text.count("the routing gate is dropped") == 2


def test_dropping_nothing_says_nothing(make_model, caplog):
    drop_gates(make_model(), "of a reason")
    assert not caplog.records
