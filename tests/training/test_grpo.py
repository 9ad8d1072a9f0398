"""RL on the tiny fixture with TRL's real trainer: what moves, what is written, what is resumed."""

import shutil
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from picture_rollouts import assert_logps_are_plain, grpo_trainer, mixed_records
from short_runs import SHORT_RUN, moved, small_model, weights
from tiny_backbones import make_idefics3, sharing_pictures
from trl.trainer.grpo_trainer import GRPOTrainer

from twn_rl.data.images import open_image
from twn_rl.data.record_files import RecordSet
from twn_rl.launch.run_folder import checkpoint_to_resume
from twn_rl.modeling import limits
from twn_rl.modeling.adapters import REASONING_ADAPTER, SNAPSHOT_ADAPTER, adapter_parameters
from twn_rl.modeling.model import DualLoraModel
from twn_rl.rewards import REWARDS
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.adaptive import AdaptiveGRPOTrainer
from twn_rl.training.engine_trainer import EngineTrainer
from twn_rl.training.grpo import (
    ROLLOUT_COLUMNS,
    EmbedGRPOConfig,
    EmbedGRPOTrainer,
    check_vllm,
    freeze_scorer,
    rollout_dataset,
)
from twn_rl.training.reward_loading import RewardError, load_rewards
from twn_rl.training.rollout_scorer import RolloutScorer
from twn_rl.training.similarity_columns import SCORING_COLUMNS

MAX_TOKENS = 24
COLUMNS = [*SCORING_COLUMNS, *ROLLOUT_COLUMNS]


def brevity(completions: list, *, think_tokens: list[int], **kwargs: Any) -> list[float | None]:
    """Differs between rollouts also when no think is complete, so that there is a gradient."""
    return [-count / MAX_TOKENS for count in think_tokens]


def make_trainer(
    model: DualLoraModel,
    records: RecordSet,
    folder: Path,
    *,
    reward: Callable[..., list[float | None]] = brevity,
    **settings: Any,
) -> EmbedGRPOTrainer:
    freeze_scorer(model)
    settings = {
        "per_device_train_batch_size": 4,
        "num_generations": 2,
        "max_completion_length": MAX_TOKENS,
        "max_steps": 2,
        "beta": 0.0,
        "temperature": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        **SHORT_RUN,
        **settings,
    }
    config = EmbedGRPOConfig(output_dir=str(folder), **settings)
    scorer = RolloutScorer(model, records, folder / "bank", num_negatives=3)
    rewards = load_rewards(["mine"], {"mine": reward}, available_columns=COLUMNS)
    return EmbedGRPOTrainer(model, rewards, config, records, scorer)


@pytest.mark.parametrize(
    ("interface", "beta"),
    [("reencode", 0.0), ("reencode", 0.1), ("kv_detach", 0.0), ("shared_prefill", 0.1)],
)
def test_only_the_reasoning_adapter_moves(
    records: RecordSet, tmp_path: Path, interface: str, beta: float
) -> None:
    model = small_model(interface=interface)
    before = weights(model)
    trainer = make_trainer(model, records, tmp_path, beta=beta)
    trainer.train()
    after = weights(model)
    changed = moved(before, after)
    reasoning = set(adapter_parameters(model.peft_model, REASONING_ADAPTER))
    assert changed
    assert changed <= reasoning
    assert any("lora_A" in name for name in changed)
    assert any("lora_B" in name for name in changed)
    if interface == "kv_detach":
        copies = adapter_parameters(model.peft_model, SNAPSHOT_ADAPTER)
        for name, copy in copies.items():
            original = name.replace(f".{SNAPSHOT_ADAPTER}", f".{REASONING_ADAPTER}")
            assert torch.equal(copy, before[original]), name


def test_the_scorer_is_frozen_although_the_policy_moved(records: RecordSet, tmp_path: Path) -> None:
    for interface in ("reencode", "kv_detach", "shared_prefill"):
        model = small_model(interface=interface)
        trainer = make_trainer(model, records, tmp_path / interface)
        thought = model.completion_ids("<think> camel left </think>", add_eos=True)
        before = trainer.scorer.columns([0, 1], [thought, thought])
        trainer.train()
        assert trainer.scorer.columns([0, 1], [thought, thought]) == before


@sharing_pictures
def test_a_scorer_that_shares_the_prefill_pays_for_thoughts_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records").mkdir()
    records = mixed_records(tmp_path / "records")
    model = small_model(interface="shared_prefill")
    trainer = make_trainer(model, records, tmp_path, max_steps=1)
    columns = trainer.scorer.columns
    scored: list[tuple[Any, ...]] = []
    thought = model.completion_ids("<think> camel left </think>", add_eos=True)

    def watch(indices, completion_ids, read):
        prefix, places = read
        assert len(prefix) == len(set(indices)) < len(indices) == len(places)  # once a group
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(model, "prepare", None)  # to read prompts here would raise
            scored.append((indices, columns(indices, [thought] * len(indices), read)))
            return columns(indices, completion_ids, read)

    monkeypatch.setattr(trainer.scorer, "columns", watch)
    trainer.train()
    (indices, with_thoughts), *_ = scored
    alone = columns(indices, [thought] * len(indices))
    names = ("positive_similarity", "no_think_positive_similarity", "negative_similarities")
    for name in names:
        torch.testing.assert_close(
            torch.tensor(with_thoughts[name]), torch.tensor(alone[name]), atol=1e-5, rtol=0
        )
    assert with_thoughts["positive_similarity"] != with_thoughts["no_think_positive_similarity"]
    assert trainer.prompts_read is None


@pytest.mark.parametrize("interface", ["reencode", "shared_prefill"])
def test_log_probabilities_of_picture_prompts_are_those_of_plain_forwards(
    tmp_path: Path, interface: str
) -> None:
    (tmp_path / "records").mkdir()
    records = mixed_records(tmp_path / "records")
    assert_logps_are_plain(partial(small_model, interface=interface), records, tmp_path)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size = 2, expected 1"),
        ({"vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode = True, expected False"),
        ({"vllm_structured_outputs_regex": "a"}, "vllm_structured_outputs_regex is set"),
        ({"loss_type": "vespo"}, "vllm_importance_sampling_mode = sequence_mask"),
    ],
)
def test_what_vllm_rollouts_do_not_do_is_refused(settings: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        EmbedGRPOConfig(use_vllm=True, **settings)


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_vllm_rollouts_without_vllm_are_refused_before_anything_is_built() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"use_vllm = True, .* twn-rl\[vllm\]"):
        check_vllm(EmbedGRPOConfig(use_vllm=True))


@pytest.mark.parametrize("name", ["use_transformers_continuous_batching", "use_vllm"])
def test_other_writers_are_refused_where_the_policy_acts_late(
    records: RecordSet, tmp_path: Path, name: str
) -> None:
    settings: dict[str, Any] = {name: True}
    with pytest.raises(ValueError, match=f"{name} = True with interface = 'shared_prefill'"):
        make_trainer(small_model(interface="shared_prefill"), records, tmp_path, **settings)


@pytest.mark.parametrize("is_limited", [False, True])
def test_trl_reads_the_prompts_that_the_model_embeds(
    records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_limited: bool
) -> None:
    model = small_model()
    if is_limited:
        whole = model.collate([record.query for record in records])["attention_mask"].sum(1)
        model.config.max_length, model.config.max_image_pixels = int(whole.min()) - 1, 300
    trainer = make_trainer(model, records, tmp_path, max_steps=1)
    seen: list[tuple[list[int], dict[str, torch.Tensor]]] = []
    inner = trainer._calculate_rewards
    outer = trainer._generate_and_score_completions
    indices: list[int] = []

    def calculate(inputs, *rest):
        indices.extend(example["record_index"] for example in inputs)
        return inner(inputs, *rest)

    def generate(inputs):
        output = outer(inputs)
        seen.append((list(indices), output))
        return output

    monkeypatch.setattr(trainer, "_calculate_rewards", calculate)
    monkeypatch.setattr(trainer, "_generate_and_score_completions", generate)
    trainer.train()
    rows, output = seen[0]
    assert len(rows) == 4
    for row, index in enumerate(rows):
        expected = model.collate([records[index].query])
        mask = output["prompt_mask"][row].bool()
        assert output["prompt_ids"][row][mask].tolist() == expected["input_ids"][0].tolist()
    pixels = model.collate([records[index].query for index in rows])["pixel_values"]
    torch.testing.assert_close(output["pixel_values"].view_as(pixels), pixels)
    counts = model.limits.counts.totals()
    assert bool(counts["cut_texts"]) == bool(counts["resized_pictures"]) == is_limited


def test_rollouts_see_every_column_in_their_own_row(records: RecordSet, tmp_path: Path) -> None:
    calls: list[dict[str, Any]] = []

    def recording(
        completions: list,
        *,
        record_index: list[int],
        record_id: list[str],
        hops: list[int],
        positive_similarity: list[float],
        completion_ids: list[list[int]],
        **kwargs: Any,
    ) -> list[float | None]:
        calls.append(
            {
                "index": record_index,
                "id": record_id,
                "hops": hops,
                "similarity": positive_similarity,
                "ids": completion_ids,
                "others": kwargs,
            }
        )
        return [0.0] * len(completions)

    trainer = make_trainer(small_model(), records, tmp_path, reward=recording, max_steps=1)
    trainer.train()
    (call,) = calls
    assert call["id"] == [records[i].id for i in call["index"]]
    assert call["hops"] == [records[i].metadata["hops"] for i in call["index"]]
    assert call["index"][0] == call["index"][1] != call["index"][2]  # groups of two
    again = trainer.scorer.columns(call["index"], call["ids"])
    # The policy moved on, the scorer did not.
    torch.testing.assert_close(
        torch.tensor(call["similarity"]), torch.tensor(again["positive_similarity"])
    )
    assert set(SCORING_COLUMNS) - {"positive_similarity"} <= set(call["others"])


def test_a_random_policy_that_writes_long_never_writes_a_placeholder(
    records: RecordSet, tmp_path: Path
) -> None:
    model = small_model()
    written: list[int] = []

    def watching(completions: list, *, completion_ids: list, **kwargs: Any) -> list[float | None]:
        written.extend(token for ids in completion_ids for token in ids)
        return [0.0 for _ in completions]

    trainer = make_trainer(
        model,
        records,
        tmp_path,
        reward=watching,
        max_steps=4,
        max_completion_length=120,
        per_device_train_batch_size=8,
        temperature=5.0,
    )
    trainer.train()
    forbidden = set(model.suppressed_token_ids)
    assert len(written) > 500
    assert not forbidden & set(written)
    names = set(model.tokenizer.convert_ids_to_tokens(sorted(set(written))))
    assert {"<think>", "</think>", model.tokenizer.eos_token} <= names  # these stay allowed
    assert trainer.generation_config.suppress_tokens == model.suppressed_token_ids


def test_generation_settings_of_the_user_are_kept(records: RecordSet, tmp_path: Path) -> None:
    model = small_model()
    trainer = make_trainer(model, records, tmp_path, generation_kwargs={"min_new_tokens": 3})
    assert trainer.generation_config.min_new_tokens == 3
    assert trainer.generation_config.suppress_tokens == model.suppressed_token_ids


def test_a_killed_and_resumed_run_is_the_run_that_was_not(
    records: RecordSet, tmp_path: Path
) -> None:
    settings = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    whole = small_model()
    make_trainer(whole, records, tmp_path / "whole", **settings).train()
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-2", tmp_path / "killed" / "checkpoint-2")
    resumed = small_model()
    trainer = make_trainer(resumed, records, tmp_path / "killed", **settings)
    trainer.train(resume_from_checkpoint=checkpoint_to_resume(tmp_path / "killed", "true"))
    assert trainer.state.global_step == 4
    after = weights(resumed)
    for name, weight in weights(whole).items():
        torch.testing.assert_close(after[name], weight, rtol=0, atol=1e-6, msg=name)


def test_the_saved_policy_is_a_whole_model(records: RecordSet, tmp_path: Path) -> None:
    model = small_model()
    trainer = make_trainer(model, records, tmp_path)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = DualLoraModel.from_pretrained(tmp_path / "saved", backbone=make_idefics3())
    for name, weight in weights(model).items():
        assert torch.equal(weights(again)[name], weight), name


def test_a_reward_that_raises_stops_the_run_with_its_name(
    records: RecordSet, tmp_path: Path
) -> None:
    def broken(completions: list, *, target_rank: list[int], **kwargs: Any) -> list[float | None]:
        return [1 / (rank - rank) for rank in target_rank]

    trainer = make_trainer(small_model(), records, tmp_path, reward=broken)
    with pytest.raises(RewardError, match=r"broken.*ZeroDivisionError.*target_rank = "):
        trainer.train()


# `adaptive` reads a column of another trainer: see test_adaptive.py.
@pytest.mark.parametrize("name", sorted(set(REWARDS) - {"adaptive"}))
def test_every_built_in_reward_runs_in_the_trainer(
    records: RecordSet, tmp_path: Path, name: str
) -> None:
    trainer = make_trainer(small_model(), records, tmp_path, reward=REWARDS[name], max_steps=1)
    trainer.train()
    entry = next(e for e in trainer.state.log_history if f"rewards/{name}/mean" in e)
    assert {"rollouts/hit@1", "rollouts/incomplete_ratio", "embedding_variance"} <= set(entry)


def test_rollout_rows_open_their_pictures_on_access(records: RecordSet) -> None:
    dataset = rollout_dataset(small_model(), records)
    assert len(dataset) == len(records)
    for index in (0, 3):
        row = dataset[index]
        assert row["record_index"] == index
        assert row["record_id"] == records[index].id
        content = row["prompt"][-1]["content"]
        assert [part["type"] for part in content] == ["image", "text"]
        (image,) = row["images"]
        assert image.mode == "RGB"


def test_the_trainer_stays_thin() -> None:
    """Generation, advantages and the loss are TRL's, its hooks in `trl_hooks`; these are HF's."""
    classes = (EmbedGRPOTrainer, AdaptiveGRPOTrainer, AdapterCheckpoints, EngineTrainer)
    own = {name for each in classes for name in vars(each)}
    overridden = {name for name in own if hasattr(GRPOTrainer, name)}
    overridden -= {"__doc__", "__module__", "__init__", "__firstlineno__", "__static_attributes__"}
    overridden -= {"__annotations__", "__dict__", "__weakref__"}
    assert overridden == {
        "_load_best_model",
        "_push_from_checkpoint",
        "_save",
        "_save_checkpoint",
        "push_to_hub",
        "train",
        "training_step",
        "_load_from_checkpoint",
        "_prepare_for_training",
        "_save_optimizer_and_scheduler",
        "create_accelerator_and_postprocess",
        "evaluate",
        "save_model",
        "set_initial_training_values",
    }


def test_a_picture_is_decoded_once_for_its_rollouts_and_their_scoring(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "records").mkdir()
    records = mixed_records(tmp_path / "records")
    trainer = grpo_trainer(small_model(), records, tmp_path)
    decoded: list[str] = []

    def counting(source: Any, *args: Any) -> Any:
        if isinstance(source, str):
            decoded.append(source)
        return open_image(source, *args)

    monkeypatch.setattr(limits, "open_image", counting)
    trainer.train()  # eight groups, TRL asks for each query several times, the scorer once
    sources = [
        str(source)
        for record in records
        for name, source in record.sources()
        if name.startswith("query")
    ]
    assert sorted(decoded) == sorted(sources)
