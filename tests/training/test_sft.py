"""The warm start: batches, which losses run when, two processes = one, resumed = uninterrupted."""

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from made_records import picture_records
from short_runs import SHORT_RUN, moved, small_model, weights
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from twn_rl.data.record import Record
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.launch.run_folder import checkpoint_to_resume
from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    adapter_parameters,
    set_trainable,
)
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.losses import false_negative_mask, info_nce, key_ids
from twn_rl.training.pair_batches import SftCollator, content_key
from twn_rl.training.sft import SftConfig, SftTrainer

NUM_NEGATIVES = 2


def small_config(folder: Path, **settings: Any) -> SftConfig:
    settings = {
        "temperature": 0.1,
        "num_hard_negatives": NUM_NEGATIVES,
        "self_written_from": 1.0,
        "per_device_train_batch_size": 2,
        "max_steps": 6,
        **SHORT_RUN,
        **settings,
    }
    return SftConfig(output_dir=str(folder), **settings)


def short_thoughts(seed: int = 0, **settings: Any) -> DualLoraModel:
    return small_model(seed, **{"max_think_tokens": 6, **settings})


def with_target_cots(records: RecordSet) -> list[Record]:
    return [
        Record(**{**vars(r), "positive_cot": "it is one" if i % 2 else None})
        for i, r in enumerate(records)
    ]


def without_cots(records: Sequence[Record]) -> list[Record]:
    return [Record(**{**vars(record), "query_cot": None}) for record in records]


# The batch


def test_target_rows_point_at_the_right_content(records: RecordSet) -> None:
    model = short_thoughts()
    batch = SftCollator(model, num_hard_negatives=NUM_NEGATIVES)(list(records))
    rows, keys = batch["target_rows"], batch["target_keys"]
    count = len(records)
    assert rows.shape == keys.shape == (count * (1 + NUM_NEGATIVES),)
    assert torch.equal(keys[:count], key_ids([r.positive.content_key() for r in records]))
    assert torch.equal(batch["query_keys"], key_ids([r.query.content_key() for r in records]))
    with torch.no_grad():
        vectors = model.embed(batch["target"])[rows]
        for i, record in enumerate(records):
            alone = model.embed(model.collate([record.positive]))[0]
            torch.testing.assert_close(vectors[i], alone, atol=1e-5, rtol=0)
            listed = record.negatives or (record.positive,)
            mine = keys[count + i * NUM_NEGATIVES :][:NUM_NEGATIVES].tolist()
            assert set(mine) <= set(key_ids([n.content_key() for n in listed]).tolist())
            assert len(set(mine)) == min(NUM_NEGATIVES, len(listed))


def test_every_distinct_target_is_encoded_once(records: RecordSet) -> None:
    batch = SftCollator(short_thoughts(), num_hard_negatives=NUM_NEGATIVES)(list(records))
    encoded = len(batch["target"]["input_ids"])
    assert encoded == len(set(batch["target_keys"].tolist()))
    assert encoded < len(batch["target_rows"])
    assert batch["target_rows"][0] == batch["target_rows"][len(records) - 1]  # a shared positive


def test_taught_thoughts_end_the_turn_and_embedded_ones_do_not(records: RecordSet) -> None:
    model = short_thoughts()
    chosen = [records[0], Record(**{**vars(records[1]), "query_cot": None})]
    batch = SftCollator(model, num_hard_negatives=0)(chosen)
    thought = model.completion_ids(model.renderer.completion(records[0].query_cot or ""))
    ids, mask = batch["taught"]["completion_ids"], batch["taught"]["completion_mask"].bool()
    assert ids[0][mask[0]].tolist() == [*thought, model.backbone.eos_token_id]
    assert not mask[1].any(), "a record without a CoT must not teach the end of the turn"
    ids, mask = batch["think"]["completion_ids"], batch["think"]["completion_mask"].bool()
    assert ids[0][mask[0]].tolist() == thought
    assert not mask[1].any()
    assert batch["target_rows"].shape == (2,)


def test_content_keys_of_files_are_read_once(records: RecordSet) -> None:
    item = records[0].query
    assert content_key(item) == item.content_key()
    hits = content_key.cache_info().hits
    content_key(item)
    assert content_key.cache_info().hits == hits + 1


# The loss


def losses(
    model: DualLoraModel, records: list[Record], folder: Path, *, step: int = 0, **settings: Any
) -> tuple[Tensor, dict[str, float]]:
    trainer = SftTrainer(model, small_config(folder, **settings), records)
    trainer.state.max_steps, trainer.state.global_step = 10, step
    loss = trainer.compute_loss(model, trainer.data_collator(records))
    return loss, {name: values[-1] for name, values in trainer._noted.items()}


@pytest.mark.parametrize("has_target_cots", [False, True])
def test_the_loss_is_the_sum_of_its_parts_computed_by_hand(
    records: RecordSet, tmp_path: Path, has_target_cots: bool
) -> None:
    model = short_thoughts()
    chosen = with_target_cots(records) if has_target_cots else list(records)
    collator = SftCollator(model, num_hard_negatives=NUM_NEGATIVES)
    chosen_weights: dict[str, Any] = {
        "think_weight": 0.5,
        "no_think_weight": 2.0,
        "cross_weight": 3.0,
    }
    loss, parts = losses(model, chosen, tmp_path, token_weight=0.25, **chosen_weights)
    batch = collator(chosen)
    index = torch.arange(len(chosen))
    mask = false_negative_mask(batch["query_keys"], batch["target_keys"], index)

    def nce(query: Tensor, target: Tensor) -> float:
        return float(info_nce(query, target, temperature=0.1, positive_index=index, mask=mask))

    with torch.no_grad():
        think = model.embed({**batch["query"], **batch["think"]})
        plain = model.embed(batch["query"])
        target = model.embed(batch["target"])[batch["target_rows"]]
        nll, tokens = model.token_nll({**batch["query"], **batch["taught"]})
    expected = {"token": float(nll.sum() / tokens.sum()), "no_think": nce(plain, target)}
    if has_target_cots:
        with torch.no_grad():
            slow = model.embed({**batch["target"], **batch["target_think"]})[batch["target_rows"]]
        expected["think"] = nce(think, slow)
        expected["cross"] = (nce(think, target) + nce(plain, slow)) / 2
    else:
        expected["think"] = nce(think, target)
    for name, value in expected.items():
        assert parts[f"loss_{name}"] == pytest.approx(value, rel=1e-4), name
    assert ("loss_cross" in parts) == has_target_cots
    factors = {"token": 0.25, "think": 0.5, "no_think": 2.0, "cross": 3.0}
    total = sum(factors[name] * value for name, value in expected.items())
    assert loss.item() == pytest.approx(total, rel=1e-4)


def test_a_record_without_a_cot_trains_the_direct_path_only(
    records: RecordSet, tmp_path: Path
) -> None:
    model, direct_only = short_thoughts(), [1, 4]
    chosen = list(records)
    for row in direct_only:
        chosen[row] = without_cots([chosen[row]])[0]
    _, parts = losses(model, chosen, tmp_path)
    batch = SftCollator(model, num_hard_negatives=NUM_NEGATIVES)(chosen)
    index = torch.tensor([row for row in range(len(chosen)) if row not in direct_only])
    positives = torch.arange(len(chosen))
    mask = false_negative_mask(batch["query_keys"], batch["target_keys"], positives)
    with torch.no_grad():
        think = model.embed({**batch["query"], **batch["think"]})
        plain = model.embed(batch["query"])
        target = model.embed(batch["target"])[batch["target_rows"]]
        nll, tokens = model.token_nll({**batch["query"], **batch["taught"]})
    thinking = info_nce(
        think[index], target, temperature=0.1, positive_index=index, mask=mask[index]
    )
    direct = info_nce(plain, target, temperature=0.1, positive_index=positives, mask=mask)
    assert parts["loss_think"] == pytest.approx(float(thinking), rel=1e-4)
    assert parts["loss_no_think"] == pytest.approx(float(direct), rel=1e-4)
    expected = float(nll[index].sum() / tokens[index].sum())
    assert parts["loss_token"] == pytest.approx(expected, rel=1e-4)
    assert parts["direct_only_ratio"] == pytest.approx(2 / 6)


@pytest.mark.parametrize("unasked", [False, True])
def test_a_thought_the_model_wrote_itself_trains_a_record_without_a_cot_if_asked_to(
    records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unasked: bool
) -> None:
    model, chosen = short_thoughts(), list(records)
    chosen[2] = without_cots([chosen[2]])[0]
    thoughts = {"of the third": "pizza", "of others": "camel left"}

    def reason(batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        words = ["of others"] * len(batch["input_ids"])
        words[2] = "of the third"
        return [
            model.completion_ids(f"<think> {thoughts[w]} </think>", add_eos=True) for w in words
        ]

    monkeypatch.setattr(model, "reason", reason)
    always: dict[str, Any] = {"self_written_from": 0.0, "self_written_share": 1.0}
    always["think_without_cot"] = unasked
    _, first = losses(model, chosen, tmp_path, **always)
    thoughts["of the third"] = "zebra tree"
    _, second = losses(model, chosen, tmp_path, **always)
    assert (second["loss_think"] == first["loss_think"]) == (not unasked)
    assert first["direct_only_ratio"] == pytest.approx(0 if unasked else 1 / len(chosen))
    assert second["loss_token"] == first["loss_token"], "its own thought was taught"
    # Where nobody writes it has none to read.
    later = {"think_without_cot": unasked, "self_written_from": 0.9}
    _, teachers = losses(model, chosen, tmp_path, **later)
    assert teachers["direct_only_ratio"] == pytest.approx(1 / len(chosen))
    thoughts["of others"] = "zebra tree"
    _, third = losses(model, chosen, tmp_path, **always)
    assert third["loss_think"] != first["loss_think"]


def test_a_batch_without_any_cot_has_no_think_loss_and_finite_gradients(
    records: RecordSet, tmp_path: Path
) -> None:
    loss, parts = losses(short_thoughts(), without_cots(records), tmp_path)
    assert parts["loss_token"] == 0.0
    assert "loss_think" not in parts  # nothing was embedded for it
    assert "in_batch_hit@1_think" not in parts
    assert loss.item() == pytest.approx(parts["loss_no_think"])
    loss.backward()


def test_contrastive_terms_join_after_their_share_of_the_steps(
    records: RecordSet, tmp_path: Path
) -> None:
    model, chosen = short_thoughts(), list(records)
    _, early = losses(model, chosen, tmp_path, step=4, contrastive_from=0.5)
    assert set(early) == {"loss_token"}
    _, late = losses(model, chosen, tmp_path, step=5, contrastive_from=0.5)
    assert {"loss_token", "loss_think", "loss_no_think", "in_batch_hit@1_think"} <= set(late)
    _, never = losses(model, chosen, tmp_path, step=9, contrastive_from=1.0)
    assert set(never) == {"loss_token"}


def test_without_a_token_weight_no_thought_is_taught(records: RecordSet, tmp_path: Path) -> None:
    model = short_thoughts()
    loss, parts = losses(model, list(records), tmp_path, token_weight=0.0)
    assert "loss_token" not in parts
    loss.backward()
    reasoning = adapter_parameters(model.peft_model, REASONING_ADAPTER)
    assert all(p.grad is None or not p.grad.any() for p in reasoning.values())


def test_steps_without_any_loss_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"contrastive_from = 0\.5.*token_weight = 0"):
        small_config(tmp_path, token_weight=0.0, contrastive_from=0.5)


@pytest.mark.parametrize("own", [{"self_written_share": 0.0}, {"self_written_from": 1.0}])
def test_thinking_without_a_cot_that_nobody_writes_is_refused(
    tmp_path: Path, own: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=r"think_without_cot.*expected steps with self-written"):
        small_config(tmp_path, think_without_cot=True, **own)


def test_self_written_thoughts_replace_the_teachers_for_a_share_of_later_steps(
    records: RecordSet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, chosen = short_thoughts(), list(records)
    written = model.completion_ids("<think> pizza </think>", add_eos=True)
    calls: list[int] = []

    def reason(batch: dict[str, Tensor], **options: Any) -> list[list[int]]:
        calls.append(len(batch["input_ids"]))
        return [written, *([written[:-1]] * (len(batch["input_ids"]) - 1))]  # one is complete

    monkeypatch.setattr(model, "reason", reason)
    switches: dict[str, Any] = {"self_written_from": 0.5, "self_written_share": 1.0}
    _, taught = losses(model, chosen, tmp_path, step=4, **switches)
    assert not calls
    assert "self_written_malformed_ratio" not in taught
    _, own = losses(model, chosen, tmp_path, step=5, **switches)
    assert calls == [len(chosen)]
    assert own["self_written_malformed_ratio"] == pytest.approx(5 / 6)
    assert own["loss_think"] != pytest.approx(taught["loss_think"], rel=1e-6)
    assert own["loss_token"] == pytest.approx(taught["loss_token"])
    losses(model, chosen, tmp_path, step=9, **{**switches, "self_written_share": 0.0})
    assert len(calls) == 1


def test_the_die_of_self_writing_depends_on_seed_and_step_only(
    records: RecordSet, tmp_path: Path
) -> None:
    settings = {"self_written_from": 0.0, "self_written_share": 0.3}

    def dice(seed: int) -> list[bool]:
        config = small_config(tmp_path, seed=seed, **settings)
        trainer = SftTrainer(short_thoughts(), config, list(records))
        thrown = []
        for step in range(200):
            trainer.state.global_step = step
            thrown.append(trainer._is_self_written(1.0))
        return thrown

    first = dice(0)
    assert first == dice(0) != dice(1)
    assert sum(first) / 200 == pytest.approx(0.3, abs=0.1)


def test_real_self_writing_runs_and_trains_on_what_was_written(
    records: RecordSet, tmp_path: Path
) -> None:
    model = short_thoughts()
    settings: dict[str, Any] = {"self_written_from": 0.0, "self_written_share": 1.0}
    loss, parts = losses(model, list(records), tmp_path, **settings)
    assert torch.isfinite(loss)
    assert 0.0 <= parts["self_written_malformed_ratio"] <= 1.0
    loss.backward()


# Several processes


def _rank(rank: int, port: int, folder: str, kind: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "ACCELERATE_USE_CPU": "true",
    }
    records, model = _half_and_model(Path(folder), kind)
    # Rank 0 holds the records with long CoTs and, if any, all target CoTs.
    half = records[rank * 2 : rank * 2 + 2]
    trainer = SftTrainer(model, small_config(Path(folder)), half)
    assert trainer.accelerator.num_processes == 2
    wrapped = DistributedDataParallel(model, find_unused_parameters=True)
    loss = trainer.compute_loss(wrapped, trainer.data_collator(half))
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    torch.save({"loss": loss.detach(), "grad": gradients}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def _half_and_model(folder: Path, kind: str) -> tuple[list[Record], DualLoraModel]:
    loaded = load_records(folder / "records.jsonl")
    # Records 1 and 3 have the longer CoTs, so that token counts differ between the halves.
    records = [loaded[i] for i in (1, 3, 0, 2)]
    if kind == "target_cots":
        records[0] = Record(**{**vars(records[0]), "positive_cot": "it is one"})
    if kind == "direct_only":  # one of rank 0's records, all of rank 1's
        records[1:] = without_cots(records[1:])
    return records, short_thoughts()


@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["plain", "target_cots", "direct_only"])
def test_two_processes_have_the_loss_and_gradient_of_one(tmp_path: Path, kind: str) -> None:
    picture_records(tmp_path)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_rank, args=(port, str(tmp_path), kind), nprocs=2)  # pyright: ignore
    records, model = _half_and_model(tmp_path, kind)
    trainer = SftTrainer(model, small_config(tmp_path), records)
    loss = trainer.compute_loss(model, trainer.data_collator(records))
    loss.backward()
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    # DDP's gradient is the mean over ranks, so is the loss it belongs to.
    mean = (ranks[0]["loss"] + ranks[1]["loss"]) / 2
    torch.testing.assert_close(mean, loss.detach(), rtol=1e-5, atol=1e-5)
    expected = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    for result in ranks:
        assert set(result["grad"]) == set(expected)
        for name, gradient in expected.items():
            torch.testing.assert_close(
                result["grad"][name], gradient, rtol=1e-4, atol=2e-6, msg=name
            )


def test_the_token_loss_does_not_depend_on_how_the_batch_is_split(
    records: RecordSet, tmp_path: Path
) -> None:
    """Long and short CoTs: a mean of the halves' means would differ."""
    model = short_thoughts().eval()
    trainer = SftTrainer(model, small_config(tmp_path, contrastive_from=1.0), list(records))
    halves = [[records[0], records[2]], [records[1], records[3]]]
    totals = torch.zeros(2)
    for half in halves:
        batch = trainer.data_collator(half)
        nll, count = model.token_nll({**batch["query"], **batch["taught"]})
        totals += torch.stack([nll.sum(), count.sum()]).detach()
    whole = trainer.compute_loss(model, trainer.data_collator([r for half in halves for r in half]))
    assert whole.item() == pytest.approx(float(totals[0] / totals[1]), rel=1e-5)


# Steps


@pytest.mark.parametrize(
    "trained", [(REASONING_ADAPTER, EMBEDDING_ADAPTER), (REASONING_ADAPTER,), (EMBEDDING_ADAPTER,)]
)
def test_training_moves_exactly_the_trainable_adapters(
    records: RecordSet, tmp_path: Path, trained: tuple[str, ...]
) -> None:
    model = short_thoughts()
    set_trainable(model.peft_model, trained)
    before = weights(model)
    trainer = SftTrainer(model, small_config(tmp_path, max_steps=3), records)
    trainer.train()
    expected = {
        name for adapter in trained for name in adapter_parameters(model.peft_model, adapter)
    }
    assert moved(before, weights(model)) == expected


def test_the_losses_fall_and_are_logged_by_part(records: RecordSet, tmp_path: Path) -> None:
    trainer = SftTrainer(
        short_thoughts(),
        small_config(tmp_path, max_steps=20, per_device_train_batch_size=6),
        records,
    )
    trainer.train()
    logged = [entry for entry in trainer.state.log_history if "loss_token" in entry]
    for name in ("loss_token", "loss_think", "loss_no_think"):
        assert logged[-1][name] < logged[0][name]


@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_a_run_that_was_killed_and_resumed_is_the_run_that_was_not(
    records: RecordSet, tmp_path: Path, interface: str
) -> None:
    def settings(folder: str, **more: Any) -> SftConfig:
        return small_config(
            tmp_path / folder,
            save_strategy="steps",
            save_steps=2,
            self_written_from=0.5,
            self_written_share=1.0,
            lr_scheduler_type="cosine",
            **more,
        )

    def new_model(seed: int) -> DualLoraModel:
        dropout = LoraSettings(r=2, alpha=4, dropout=0.1)
        return short_thoughts(seed, interface=interface, reasoning_lora=dropout)

    whole = new_model(0)
    SftTrainer(whole, settings("whole"), records).train()
    # The kill: everything after step 4 is lost, and the next process starts from other weights.
    (tmp_path / "killed").mkdir()
    shutil.copytree(tmp_path / "whole" / "checkpoint-4", tmp_path / "killed" / "checkpoint-4")
    resumed = new_model(7)
    trainer = SftTrainer(resumed, settings("killed"), records)
    last = checkpoint_to_resume(tmp_path / "killed", "true")
    assert Path(last or "").name == "checkpoint-4"
    trainer.train(resume_from_checkpoint=last)
    assert trainer.state.global_step == 6
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(resumed)[name], weight, rtol=0, atol=1e-6, msg=name)


def test_a_saved_model_embeds_as_the_trained_one(
    records: RecordSet, tmp_path: Path, make_backbone: Callable[[str], Any]
) -> None:
    model = short_thoughts()
    trainer = SftTrainer(model, small_config(tmp_path, max_steps=2), records)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    again = DualLoraModel.from_pretrained(tmp_path / "saved", backbone=make_backbone("idefics3"))
    batch = model.eval().collate([record.query for record in records])
    with torch.no_grad():
        torch.testing.assert_close(again.embed(batch), model.embed(batch))
