"""Adaptive control: both modes in every group, what the policy decides, and who asks it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from short_runs import SHORT_RUN, small_model
from test_grpo import MAX_TOKENS
from tiny_backbones import make_idefics3
from trl.trainer.grpo_trainer import GRPOTrainer

import twn_rl.modeling.generation
from twn_rl.data.record_files import RecordSet
from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.report.page import write_report
from twn_rl.evaluation.report.tables import routing_table
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.metrics.negatives import margin_gains
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.kv_prefix import Prefix
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.training.adaptive import (
    ADAPTIVE_COLUMNS,
    DIRECT,
    KEEP,
    AdaptiveGRPOConfig,
    AdaptiveGRPOTrainer,
    pinned_modes,
    primer_loss,
    tapered,
    with_group_mean,
)
from twn_rl.training.grpo import ROLLOUT_COLUMNS, freeze_scorer
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer

GROUP = 4


def make_trainer(
    model: DualLoraModel,
    records: RecordSet,
    folder: Path,
    **settings: Any,
) -> AdaptiveGRPOTrainer:
    freeze_scorer(model)
    settings = {
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": MAX_TOKENS,
        "max_steps": 2,
        "bf16": False,
        "gradient_checkpointing": False,
        **SHORT_RUN,
        **settings,
    }
    config = AdaptiveGRPOConfig(output_dir=str(folder), **settings)
    scorer = RolloutScorer(model, records, folder / "bank", num_negatives=3)
    columns = [*ADAPTIVE_COLUMNS, *ROLLOUT_COLUMNS]
    names = ["format", "margin", "adaptive"]
    rewards = load_rewards(names, REWARDS, {}, available_columns=columns)
    return AdaptiveGRPOTrainer(model, rewards, config, records, scorer)


def policy(trainer: AdaptiveGRPOTrainer) -> torch.nn.Module:
    assert isinstance(trainer.model, torch.nn.Module)
    return trainer.model


def rollout(trainer: AdaptiveGRPOTrainer) -> tuple[dict[str, Any], list[list[int]]]:
    """One generation batch as TRL prepares it, and the completions without padding."""
    inputs = next(iter(trainer.get_train_dataloader()))
    policy(trainer).train()
    output = trainer._generate_and_score_completions(inputs)
    rows = zip(output["completion_ids"], output["completion_mask"], strict=True)
    return output, [ids[mask.bool()].tolist() for ids, mask in rows]


@torch.no_grad()
def direct_probability(model: DualLoraModel, records: RecordSet) -> float:
    prompts = model.prepare(model.collate([record.query for record in records]))
    logits = model.start_reasoning(prompts).logits
    assert logits is not None
    return float(logits.softmax(-1)[:, model.backbone.eos_token_id].mean())


@pytest.fixture
def always_direct(monkeypatch: pytest.MonkeyPatch) -> Callable[[DualLoraModel], None]:
    """Let TRL's first sampling of a batch end every turn at once; later calls are real."""

    def install(model: DualLoraModel) -> None:
        sample = GRPOTrainer._generate_single_turn

        def generate(self, prompt_ids, images, fields, num_generations, *rest):
            if num_generations == 1:
                return sample(self, prompt_ids, images, fields, num_generations, *rest)
            return [[model.backbone.eos_token_id] for _ in prompt_ids], None

        monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", generate)

    return install


@given(flags=st.lists(st.booleans(), min_size=12, max_size=12), count=st.integers(0, 3))
def test_every_group_holds_both_modes_and_mixed_ones_are_left_alone(flags, count):
    before = torch.tensor(flags).view(3, 4)
    pins = pinned_modes(before.view(-1), 4, count).view(3, 4)
    after = torch.where(pins == KEEP, before, pins == DIRECT)
    for old, new, pinned in zip(before, after, pins, strict=True):
        if old.any() and not old.all():
            assert (pinned == KEEP).all()
        else:
            assert (old != new).sum() == count
            assert not count or (new.any() and not new.all())


def test_the_gap_is_the_difference_of_margins_or_of_bare_similarities():
    columns = {
        "positive_similarity": [0.9, 0.5],
        "negative_similarities": [[0.5, 0.3, -1.0], []],
        "no_think_positive_similarity": [0.6, 0.5],
        "no_think_negative_similarities": [[0.4, 0.4, 0.4], []],
    }
    first, second = margin_gains(*columns.values(), num_negatives=2)
    assert first == pytest.approx((0.9 - 0.4) - (0.6 - 0.4))
    assert second is None
    assert margin_gains(*columns.values(), num_negatives=0) == pytest.approx([0.3, 0.0])


def test_a_direct_rollout_gets_the_mean_of_its_own_group_and_none_without_thoughts():
    gaps = torch.tensor([0.2, 0.4, 0.0, 0.0, 0.0, 0.0])
    direct = torch.tensor([False, False, True, True, True, True])
    filled = with_group_mean(gaps, direct, 3)
    torch.testing.assert_close(filled[:3], torch.tensor([0.2, 0.4, 0.3]))
    assert filled[3:].isnan().all()


def test_the_probability_is_a_softmax_over_the_two_decisions():
    model = small_model()
    logits = torch.randn(5, len(model.tokenizer))
    opening = model.think_open_ids[0]
    both = logits[:, [opening, model.backbone.eos_token_id]].softmax(1)
    got = model.think_probability(Prefix(None, logits, logits, logits))
    torch.testing.assert_close(got, both[:, 0])


def test_a_lost_pinned_decision_is_pushed_by_its_own_probability():
    logps = torch.tensor([[0.1, 0.5], [0.1, 0.5]]).log().requires_grad_()
    same = tapered(logps, torch.tensor([True, False]))
    torch.testing.assert_close(same, logps)
    same.sum().backward()
    torch.testing.assert_close(logps.grad, torch.tensor([[0.1, 1.0], [1.0, 1.0]]))


@given(share=st.floats(0.01, 0.99), num_direct=st.integers(1, 5), num_thinking=st.integers(1, 5))
def test_the_primer_is_least_at_even_odds_however_many_rollouts_a_mode_has(
    share, num_direct, num_thinking
):
    odds = torch.tensor([share] * num_direct + [1 - share] * num_thinking)
    direct = torch.tensor([True] * num_direct + [False] * num_thinking)
    assert primer_loss(odds.log(), direct) >= math.log(2) - 1e-6


def test_the_primer_draws_a_policy_that_always_thinks_towards_both_decisions(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model()
    trainer = make_trainer(model, records, tmp_path, max_steps=8, primer_steps=100, warmup_steps=0)
    before = direct_probability(model, records)
    trainer.train()
    assert direct_probability(model, records) > before
    losses = [e["primer_loss"] for e in trainer.state.log_history if "primer_loss" in e]
    assert len(losses) == 8
    assert losses[-1] < losses[0]


def test_groups_that_only_think_get_a_direct_answer_of_one_token(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model()
    trainer = make_trainer(model, records, tmp_path)
    output, completions = rollout(trainer)
    eos = model.backbone.eos_token_id
    direct = [ids == [eos] for ids in completions]
    assert direct == [False, False, False, True] * 2  # a random policy never ends at once here
    assert output["completion_mask"].sum(1).tolist() == [len(ids) for ids in completions]
    assert output["is_pinned"][torch.tensor(direct)].all()
    opening = model.think_open_ids[0]
    assert {ids[0] for ids in completions} == {eos, opening}
    mean = trainer._metrics["train"]
    assert mean["rollouts/think_rate"] == [1.0]
    assert mean["rollouts/pinned_direct"] == [1 / GROUP]
    assert mean["rollouts/pinned_think"] == [0.0]


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_groups_that_never_think_get_a_thought_that_the_policy_writes(
    records: RecordSet,
    tmp_path: Path,
    always_direct: Callable[[DualLoraModel], None],
    interface: str,
) -> None:
    model = small_model(interface=interface)
    # Nearly greedy, so that what TRL samples is what `reason` writes.
    trainer = make_trainer(model, records, tmp_path, temperature=1e-4)
    always_direct(model)
    inputs = next(iter(trainer.get_train_dataloader()))
    policy(trainer).train()
    output = trainer._generate_and_score_completions(inputs)
    rows = zip(output["completion_ids"], output["completion_mask"], strict=True)
    completions = [ids[mask.bool()].tolist() for ids, mask in rows]
    eos = model.backbone.eos_token_id
    assert [ids == [eos] for ids in completions] == [True, True, True, False] * 2
    assert trainer._metrics["train"]["rollouts/pinned_think"] == [1 / GROUP]
    items = [records[inputs[row]["record_index"]].query for row in (3, 7)]
    model.peft_model.eval()
    written = model.reason(model.collate(items), max_think_tokens=MAX_TOKENS)
    assert [completions[3], completions[7]] == written


def test_nothing_is_pinned_outside_training(records: RecordSet, tmp_path: Path) -> None:
    trainer = make_trainer(small_model(), records, tmp_path)
    inputs = next(iter(trainer.get_train_dataloader()))
    policy(trainer).eval()
    ids = trainer._generate_and_score_completions(inputs)["completion_ids"]
    assert not (ids[:, 0] == trainer.dual_model.backbone.eos_token_id).any()


def test_rewards_see_direct_answers_as_decisions_with_their_groups_gap(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model()
    trainer = make_trainer(model, records, tmp_path)
    policy(trainer).train()
    thought = model.completion_ids("<think> camel left </think>", add_eos=True)
    eos = model.backbone.eos_token_id
    columns = trainer.rollout_columns([1, 1, 1, 1], [thought, [eos], thought[:-2], thought])
    assert columns["is_direct"] == [False, True, False, False]
    assert columns["is_think_complete"] == [True, True, False, True]
    assert columns["think_tokens"] == [4, 0, 3, 4]
    gaps = columns["utility_gap"]
    assert gaps[2] == 0.0  # a thought that failed gained nothing
    assert gaps[1] == pytest.approx((gaps[0] + gaps[2] + gaps[3]) / 3, abs=1e-6)
    assert columns["positive_similarity"][1] == columns["no_think_positive_similarity"][1]


def test_an_empty_completion_stays_malformed_where_the_policy_does_not_decide(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model()
    scorer = RolloutScorer(model, records, tmp_path / "bank", num_negatives=3)
    columns = scorer.columns([0], [[model.backbone.eos_token_id]])
    assert (columns["is_direct"], columns["is_think_complete"]) == ([False], [False])


def test_two_steps_train_and_leave_a_model_whose_policy_decides(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model(policy_threshold=0.9)  # that of another policy
    trainer = make_trainer(model, records, tmp_path)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if "rewards/adaptive/mean" in e)
    assert {"rollouts/think_rate", "rollouts/pinned_direct", "rollouts/utility_gap"} <= set(entry)
    trainer.save_model(str(tmp_path / "saved"))
    again = DualLoraModel.from_pretrained(tmp_path / "saved", backbone=make_idefics3())
    assert again.config.thinking_decision == "policy"
    assert (
        json.loads((tmp_path / "saved" / "twn_config.json").read_text())["policy_threshold"] == 0.5
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pinned_generations": 4}, "pinned_generations = 4"),
        ({"utility_negatives": -1}, "utility_negatives = -1"),
        ({"primer_steps": -1}, "primer_steps = -1"),
        ({"use_liger_kernel": True}, "use_liger_kernel = True"),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path: Path, settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        AdaptiveGRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, num_generations=4, **settings
        )


def deciding_model(**settings: Any) -> DualLoraModel:
    return small_model(thinking_decision="policy", max_think_tokens=8, **settings)


def split_threshold(model: DualLoraModel, records: RecordSet) -> tuple[float, list[float]]:
    """A threshold between the probabilities of all queries, and these."""
    items = [record.query for record in records]
    prompts = model.prepare(model.collate(items))
    said = model.think_probability(model.start_reasoning(prompts)).tolist()
    ordered = sorted(said)
    return (ordered[2] + ordered[3]) / 2, said


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_serving_decides_as_the_evaluation_does(
    records: RecordSet, tmp_path: Path, interface: str
) -> None:
    model = deciding_model(interface=interface)
    threshold, said = split_threshold(model, records)
    model.config.policy_threshold = threshold
    settings = EvaluationSettings(
        modes=("never", "always", "policy"), batch_size=2, show_progress_bar=False
    )
    evaluation = evaluate(model, records, settings)
    rows = [row for row in evaluation.queries if row["mode"] == "policy"]
    details = ThinkingEmbedder(model).encode_query(
        [record.query for record in records], batch_size=3, return_details=True
    )
    np.testing.assert_allclose(details.policy_probabilities, said, atol=1e-5)
    np.testing.assert_allclose([row["policy_probability"] for row in rows], said, atol=1e-5)
    thinks = [chance > threshold for chance in said]
    assert sum(thinks) == 3
    assert [bool(row["think_rate"]) for row in rows] == thinks
    assert [bool(thoughts) for thoughts in details.thoughts] == thinks
    assert [row["cot"] for row in rows] == [(t or [""])[0] for t in details.thoughts]
    assert [sum(row["think_tokens"]) for row in rows] == details.think_tokens
    assert evaluation.metrics["test/all/policy/think_rate"] == 0.5
    assert details.gate_probabilities == [None] * len(records)
    table = routing_table("test", evaluation, "policy")
    assert table["columns"] == ["no thinking", "own thoughts", "policy decides"]
    assert table["rows"][-1][1][-1].detail == "50 % think"
    page = write_report(tmp_path / "report.html", evaluation).read_text(encoding="utf-8")
    assert "policy decides" in page
    assert "50 % think" in page
    seconds = {row["mode"]: row["seconds"] for row in evaluation.queries if row["id"] == "r0"}
    assert seconds["policy"] >= min(seconds["never"], seconds["always"])


@pytest.mark.parametrize(
    ("interface", "reads"), [("reencode", 2), ("kv_detach", 1), ("shared_prefill", 1)]
)
def test_the_decision_is_read_once_and_written_on_from(
    records: RecordSet, monkeypatch: pytest.MonkeyPatch, interface: str, reads: int
) -> None:
    model = deciding_model(interface=interface)
    read_rows, prepare = (
        twn_rl.modeling.generation.read_rows,
        twn_rl.modeling.generation.prepare_prompts,
    )
    adapters: list[str] = []
    towers: list[int] = []

    def counting(*parts: Any, adapter: str, **kwargs: Any) -> Any:
        adapters.append(adapter)
        return read_rows(*parts, adapter=adapter, **kwargs)

    def encoding(*parts: Any) -> Any:
        towers.append(1)
        return prepare(*parts)

    monkeypatch.setattr(twn_rl.modeling.generation, "read_rows", counting)
    monkeypatch.setattr(twn_rl.modeling.generation, "prepare_prompts", encoding)
    details = ThinkingEmbedder(model).encode_query(
        [record.query for record in records], think_threshold=0.0, return_details=True
    )
    assert all(details.thoughts)
    assert (len(adapters), len(set(adapters)), len(towers)) == (reads, reads, 1)


def test_vectors_are_those_of_always_and_never_by_decision(records: RecordSet) -> None:
    model = deciding_model()
    threshold, said = split_threshold(model, records)
    embedder, queries = ThinkingEmbedder(model), [record.query for record in records]
    auto = embedder.encode_query(queries, think_threshold=threshold, batch_size=2)
    always = embedder.encode_query(queries, think="always")
    never = embedder.encode_query(queries, think="never")
    expected = [
        thinking if chance > threshold else direct
        for chance, thinking, direct in zip(said, always, never, strict=True)
    ]
    np.testing.assert_allclose(auto, expected, atol=1e-5)


def test_a_think_rate_takes_the_likeliest_of_the_policy(records: RecordSet) -> None:
    model = deciding_model()
    _, said = split_threshold(model, records)
    details = ThinkingEmbedder(model).encode_query(
        [record.query for record in records], think_rate=0.5, batch_size=2, return_details=True
    )
    best = set(np.argsort(said)[3:].tolist())
    assert {i for i, thoughts in enumerate(details.thoughts) if thoughts} == best


def test_thoughts_of_a_policy_that_decides_are_opened_for_it(records: RecordSet) -> None:
    model = deciding_model()
    batch = model.collate([record.query for record in records])
    opening = model.think_open_ids
    written = model.reason(batch, max_think_tokens=4)
    assert all(ids[: len(opening)] == opening for ids in written)
    model.config.thinking_decision = "gate"
    assert any(ids[: len(opening)] != opening for ids in model.reason(batch, max_think_tokens=4))


def test_of_gate_and_policy_the_one_named_is_asked(records: RecordSet) -> None:
    model = deciding_model()
    model.gates["query"] = Gate(model.hidden_size).eval()
    model.config.gate_threshold = 0.5
    embedder, query = ThinkingEmbedder(model), records[0].query
    by_model = embedder.encode_query([query], return_details=True)
    by_gate = embedder.encode_query([query], think_decision="gate", return_details=True)
    assert by_model.policy_probabilities[0] is not None
    assert by_model.gate_probabilities == by_gate.policy_probabilities == [None]
    assert by_gate.gate_probabilities[0] is not None


def test_a_policy_that_did_not_learn_to_decide_is_not_asked(records: RecordSet) -> None:
    embedder, query = ThinkingEmbedder(small_model()), records[0].query
    with pytest.raises(ValueError, match="thinking_decision = 'gate'"):
        embedder.encode_query([query], think_decision="policy")
    with pytest.raises(ValueError, match="document side"):
        ThinkingEmbedder(deciding_model()).encode_document(
            [query], think="auto", think_decision="policy"
        )
    with pytest.raises(ValueError, match="think_decision"):
        embedder.encode_query([query], think="never", think_decision="gate")
    with pytest.raises(ValueError, match="learned to decide"):
        evaluate(small_model(), records, EvaluationSettings(modes=("policy",)))


def test_the_settings_of_deciding_are_checked_and_kept(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"thinking_decision = 'dice'.*policy_threshold = 2"):
        TwnConfig.from_dict({"thinking_decision": "dice", "policy_threshold": 2})
    TwnConfig(thinking_decision="policy", policy_threshold=0.3).save(tmp_path)
    loaded = TwnConfig.load(tmp_path)
    assert (loaded.thinking_decision, loaded.policy_threshold) == ("policy", 0.3)
