"""Mixtures: settings that cannot work are named, batches have one source, order survives a kill."""

import itertools
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from made_records import picture_records
from short_runs import small_model, weights
from test_grpo import make_trainer
from test_sft import small_config
from torch.utils.data import DataLoader

from twn_rl.data.mixture import Mixture, MixtureSampler, load_mixture
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import write_records
from twn_rl.launch.arguments import DataArguments
from twn_rl.training.sft import SftTrainer


def write_source(folder: Path, name: str, count: int) -> None:
    rows = [
        Record(f"{name}{i}", name, Item(text=f"{name} {i}"), Item(text=f"target {i}"))
        for i in range(count)
    ]
    write_records(folder / f"{name}.jsonl", rows)


def write_mixture(folder: Path, *sources: Any, **settings: Any) -> Path:
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump({"sources": list(sources), **settings}), encoding="utf-8")
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three sources of 40, 25 and 3 records."""
    for name, count in (("big", 40), ("mid", 25), ("tiny", 3)):
        write_source(tmp_path, name, count)
    return tmp_path


BIG, MID = {"path": "big.jsonl", "weight": 3}, {"path": "mid.jsonl", "weight": 1}


# Settings


def test_a_mixture_is_the_records_of_its_sources_one_after_the_other(folder: Path) -> None:
    tiny = {"path": str(folder / "tiny.jsonl"), "name": "small", "limit": 2}
    mixture = load_mixture(write_mixture(folder, {**BIG, "limit": 10}, MID, tiny))
    expected = [f"big{i}" for i in range(10)] + [f"mid{i}" for i in range(25)] + ["tiny0", "tiny1"]
    assert len(mixture) == 37
    assert [record.id for record in mixture] == expected
    assert [record.id for record in mixture[8:12]] == expected[8:12]
    assert [mixture[i].id for i in (-1, 9, 10, 35)] == ["tiny1", "big9", "mid0", "tiny0"]
    assert mixture.names == ["big", "mid", "small"]
    assert mixture.weights == [3, 1, 1]
    assert mixture.one_source_per_batch
    for index in (37, -38):
        with pytest.raises(IndexError):
            mixture[index]


def test_each_source_has_its_own_data_root(folder: Path) -> None:
    (folder / "pictures").mkdir()
    picture_records(folder / "pictures")
    (folder / "lists").mkdir()
    (folder / "pictures" / "records.jsonl").rename(folder / "lists" / "seen.jsonl")
    source = {"path": "lists/seen.jsonl", "data_root": "pictures"}
    mixture = load_mixture(write_mixture(folder, BIG, source))
    assert mixture[40].query.images == (str(folder / "pictures" / "scene0.png"),)


BAD: dict[str, tuple[Any, str]] = {
    "missing file": ({"path": "absent.jsonl"}, r"sources\[1\]\.path = 'absent\.jsonl'"),
    "no path": ({"weight": 1}, r"sources\[1\]\.path: path is missing"),
    "weight 0": ({**MID, "weight": 0}, r"weight: value = 0 of type int; expected `float` > 0"),
    "negative weight": ({**MID, "weight": -1.5}, r"weight: value = -1\.5"),
    "NaN weight": ({**MID, "weight": float("nan")}, r"weight: value = nan"),
    "word as weight": ({**MID, "weight": "much"}, r"weight: value = 'much'"),
    "true as weight": ({**MID, "weight": True}, r"weight: value = True"),
    "limit 0": ({**MID, "limit": 0}, r"limit: value = 0"),
    "unknown key": ({**MID, "wieght": 2}, r"sources\[1\]\.wieght: unknown key"),
    "number as name": ({**MID, "name": 3}, r"name: value = 3"),
    "a bare path": ("mid.jsonl", r"sources\[1\]: value = 'mid\.jsonl'"),
    "same name": ({"path": "big.jsonl"}, r"name = \['big'\] are used twice"),
    "a mixture": ({"path": "mixture.yaml"}, r"not another mixture"),
}


@pytest.mark.parametrize("kind", BAD)
def test_settings_that_cannot_work_are_named(folder: Path, kind: str) -> None:
    source, message = BAD[kind]
    with pytest.raises(ValueError, match=message) as raised:
        load_mixture(write_mixture(folder, BIG, source))
    for part in ("mixture.yaml", "expected", "; change"):
        assert part in str(raised.value)


def test_all_problems_of_a_mixture_are_named_together(folder: Path) -> None:
    path = write_mixture(folder, {"path": "no.jsonl"}, {**MID, "weight": 0}, one_source="yes")
    with pytest.raises(ValueError, match=r"unknown key 'one_source'.*no\.jsonl.*value = 0"):
        load_mixture(path)
    with pytest.raises(ValueError, match=r"one_source_per_batch: value = 'x'.*expected `bool`"):
        load_mixture(write_mixture(folder, BIG, one_source_per_batch="x"))
    with pytest.raises(ValueError, match=r"sources: value = \[\].*expected `array` of length >= 1"):
        load_mixture(write_mixture(folder))
    for content in ("- a", "sources: 3", "", "a: [", "sources: {path: a}"):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"mixture .*expected sources: \["):
            load_mixture(path)
    with pytest.raises(FileNotFoundError):
        load_mixture(folder / "none.yaml")


def test_an_empty_source_is_named(folder: Path) -> None:
    (folder / "empty.jsonl").touch()
    with pytest.raises(RecordError, match=r"empty\.jsonl.*usable records = 0.*expected.*; correct"):
        load_mixture(write_mixture(folder, BIG, {"path": "empty.jsonl"}))


def test_data_arguments_read_a_mixture(folder: Path) -> None:
    data = DataArguments(train_file=str(write_mixture(folder, BIG, MID)))
    records = data.load("train")
    assert isinstance(records, Mixture)
    assert len(records) == len(data.load("rl")) == 65


# Order


def drawn(mixture: Mixture, batch_size: int, **settings: Any) -> Iterator[list[int]]:
    positions = iter(MixtureSampler(mixture, batch_size=batch_size, **{"seed": 0, **settings}))
    return iter(lambda: list(itertools.islice(positions, batch_size)), [])


def epochs(mixture: Mixture, batch_size: int, count: int) -> list[list[int]]:
    return [
        batch
        for epoch in range(count)
        for batch in drawn(mixture, batch_size, epoch=lambda epoch=epoch: epoch)
    ]


def test_batches_have_one_source_and_sources_come_by_weight(folder: Path) -> None:
    mixture = load_mixture(write_mixture(folder, BIG, MID))
    batches = epochs(mixture, 8, 200)
    assert len(batches) == 200 * (65 // 8)
    sources = [{mixture.source_of(position) for position in batch} for batch in batches]
    assert all(len(source) == 1 for source in sources)
    assert all(len(set(batch)) == 8 for batch in batches), "no record twice in a batch"
    share = sum(source == {0} for source in sources) / len(sources)
    assert share == pytest.approx(0.75, abs=0.04)
    seen = Counter(position for batch in batches for position in batch)
    assert set(seen) == set(range(65)), "also the rest that fills no batch has its turn"


def test_without_one_source_per_batch_each_record_is_drawn_by_weight(folder: Path) -> None:
    mixture = load_mixture(write_mixture(folder, BIG, MID, one_source_per_batch=False))
    batches = epochs(mixture, 8, 100)
    sources = [mixture.source_of(position) for batch in batches for position in batch]
    assert sources.count(0) / len(sources) == pytest.approx(0.75, abs=0.03)
    assert any(len({mixture.source_of(p) for p in batch}) == 2 for batch in batches)


@pytest.mark.parametrize("one_source", [True, False])
def test_a_record_comes_again_only_after_the_others_of_its_source(
    folder: Path, one_source: bool
) -> None:
    settings = {"one_source_per_batch": one_source}
    mixture = load_mixture(write_mixture(folder, {**MID, "weight": 1000}, BIG, **settings))
    first = [p for batch in drawn(mixture, 5) for p in batch if mixture.source_of(p) == 0][:25]
    assert sorted(first) == list(range(25))
    assert first != sorted(first)


def test_the_order_depends_on_seed_and_epoch_only(folder: Path) -> None:
    mixture = load_mixture(write_mixture(folder, BIG, MID))
    order = list(drawn(mixture, 8))
    assert order == list(drawn(load_mixture(folder / "mixture.yaml"), 8))
    assert order != list(drawn(mixture, 8, seed=1))
    assert order != list(drawn(mixture, 8, epoch=lambda: 1))


def test_a_source_smaller_than_a_batch_repeats_evenly_and_is_logged(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    mixture = load_mixture(write_mixture(folder, {"path": "tiny.jsonl"}))
    (batch,) = drawn(mixture, 8)
    assert sorted(Counter(batch).values()) == [2, 3, 3]
    assert "source tiny has 3 records, fewer than a batch of 8" in caplog.text


@pytest.mark.parametrize("split_batches", [False, True])
def test_processes_share_the_global_batches_of_one(folder: Path, split_batches: bool) -> None:
    """As HF's Trainer and accelerate cut them: also after a resume, nothing else is drawn."""
    mixture = load_mixture(write_mixture(folder, BIG, MID))
    whole = list(drawn(mixture, 8, epoch=lambda: 1))

    def part(process: int, skipped: int) -> list[list[int]]:
        loader = prepare_data_loader(
            DataLoader(
                range(len(mixture)),  # pyright: ignore[reportArgumentType]
                sampler=MixtureSampler(mixture, batch_size=8, seed=0, epoch=lambda: 1),
                batch_size=8 if split_batches else 4,
            ),
            num_processes=2,
            process_index=process,
            split_batches=split_batches,
            put_on_device=False,
        )
        batches: Any = skip_first_batches(loader, skipped)
        return [batch.tolist() for batch in batches]

    halves = [part(process, 0) for process in (0, 1)]
    assert [a + b for a, b in zip(*halves, strict=True)] == whole
    assert [part(process, 3) for process in (0, 1)] == [half[3:] for half in halves]


# Trainers


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A mixture of two sources with pictures, six and seven records."""
    for name, count in (("left", 6), ("right", 7)):
        (tmp_path / name).mkdir()
        picture_records(tmp_path / name, count)
    left = {"path": "left/records.jsonl", "name": "left", "weight": 2}
    return write_mixture(tmp_path, left, {"path": "right/records.jsonl", "name": "right"})


def test_the_warm_start_draws_a_mixture_in_its_order(pictures: Path, tmp_path: Path) -> None:
    mixture = load_mixture(pictures)
    config = small_config(tmp_path, num_train_epochs=3, max_steps=-1, seed=5)
    trainer = SftTrainer(small_model(), config, mixture)
    seen: list[list[str]] = []
    collate = trainer.data_collator
    trainer.data_collator = lambda records: (  # pyright: ignore[reportAttributeAccessIssue]
        seen.append([record.query.images[0] for record in records]) or collate(records)
    )
    trainer.train()
    expected = [
        [mixture[position].query.images[0] for position in batch]
        for epoch in range(3)
        for batch in drawn(mixture, 2, seed=5, epoch=lambda epoch=epoch: epoch)
    ]
    assert seen == expected
    assert len(seen) == 3 * 6


def test_a_killed_and_resumed_run_on_a_mixture_is_the_run_that_was_not(
    pictures: Path, tmp_path: Path
) -> None:
    def train(folder: str, checkpoint: Path | None = None) -> Any:
        settings = {"save_strategy": "steps", "save_steps": 8, "max_steps": 11}
        model = small_model(0 if checkpoint is None else 7)
        trainer = SftTrainer(
            model, small_config(tmp_path / folder, **settings), load_mixture(pictures)
        )
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        return weights(model)

    whole = train("whole")
    # Step 8 is in the second epoch of six steps.
    shutil.copytree(tmp_path / "whole" / "checkpoint-8", tmp_path / "killed" / "checkpoint-8")
    for name, weight in train("killed", tmp_path / "killed" / "checkpoint-8").items():
        torch.testing.assert_close(whole[name], weight, rtol=0, atol=1e-6, msg=name)


def test_rollouts_repeat_the_prompts_of_a_mixture(pictures: Path, tmp_path: Path) -> None:
    mixture = load_mixture(pictures)
    trainer = make_trainer(small_model(), mixture, tmp_path, num_generations=2)  # pyright: ignore
    positions = list(trainer._get_train_sampler())
    order = [p for batch in drawn(mixture, 2, seed=trainer.args.seed) for p in batch]
    assert positions == [p for p in order for _ in range(2)]
    assert len(positions) == len(trainer._get_train_sampler())
