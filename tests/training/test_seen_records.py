"""Resuming on other records, in another order or with another seed is noticed, in words."""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from made_records import picture, picture_records
from short_runs import SHORT_RUN, small_model

from twn_rl.data.mixture import Mixture
from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.training.seen_records import RECORDS_FILE, describe_records, what_changed
from twn_rl.training.sft import SftConfig, SftTrainer
from twn_rl.training.whole_checkpoints import damage_of


def words(count: int, *, word: str = "camel") -> list[Record]:
    return [
        Record(f"r{i}", "test", Item(text=f"{word} {i}"), Item(text=f"tree {i}"))
        for i in range(count)
    ]


def renamed(records: list[Record]) -> list[Record]:
    return [*records[:9], replace(records[9], id="other"), *records[10:]]


def reworded(records: list[Record]) -> list[Record]:
    return [*records[:600], replace(records[600], query_cot="a thought"), *records[601:]]


def swapped(records: list[Record]) -> list[Record]:
    return [*records[:4], records[5], records[4], *records[6:]]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (list, None),
        (swapped, "the same records in another order, from about record 3 on"),
        (renamed, "other records, from about record 9 on"),
        (reworded, "records of the same names with other content, from about record 600 on"),
        (lambda records: records[:-1], "700 records then, 699 now"),
    ],
)
def test_what_changed_is_said_and_where(
    change: Callable[[list[Record]], Sequence[Record]], said: str | None
) -> None:
    records = words(700)
    then, now = describe_records(records, 0), describe_records(change(records), 0)
    assert what_changed(json.loads(json.dumps(then)), now) == said
    assert len(json.dumps(then)) < 8192


def test_pictures_count_by_their_pixels_wherever_they_lie(tmp_path: Path) -> None:
    found = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        records = picture_records(tmp_path / name)
        found.append(describe_records(records, 0))
    assert what_changed(*found) is None
    picture(12345).save(tmp_path / "there" / "scene3.png")
    changed = describe_records(load_records(tmp_path / "there" / "records.jsonl"), 0)
    assert what_changed(found[0], changed) == (
        "records of the same names with other content, from record 3 on"
    )


def test_seed_and_weights_decide_what_comes_next(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", words(4))
    sources = [load_records(tmp_path / "a.jsonl")] * 2
    mixtures = [Mixture(sources, weights, names=["a", "b"]) for weights in ([1, 1], [1, 3])]
    then, now = (describe_records(mixture, 0) for mixture in mixtures)
    assert "'b': 3" in str(what_changed(then, now))
    reseeded = what_changed(then, describe_records(mixtures[0], 1))
    assert reseeded is not None
    assert reseeded.startswith("they were drawn by {'seed': 0, ")
    assert ", now by {'seed': 1, " in reseeded


def make_trainer(folder: Path, records: RecordSet, **settings: Any) -> Any:
    settings = {
        **SHORT_RUN,
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        **settings,
    }
    return SftTrainer(small_model(), SftConfig(output_dir=str(folder), **settings), records)


def test_a_run_is_not_resumed_on_other_records_unless_that_is_accepted(
    tmp_path: Path, records: RecordSet, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    make_trainer(run, records).train()
    checkpoint = run / "checkpoint-1"
    assert (checkpoint / RECORDS_FILE).is_file()
    assert damage_of(checkpoint) is None
    folder = tmp_path / "records"
    write_records(folder / "turned.jsonl", [records[i] for i in (5, 4, 3, 2, 1, 0)])
    turned = load_records(folder / "turned.jsonl")
    for start in (checkpoint, run / "checkpoint-2"):  # in the middle, and at the end
        with pytest.raises(ValueError, match="the same records in another order, from record 0 on"):
            make_trainer(run, turned).train(resume_from_checkpoint=str(start))
    with pytest.raises(ValueError, match=r"drawn by \{'seed': 42\}, now by \{'seed': 1\}"):
        make_trainer(run, records, seed=1).train(resume_from_checkpoint=str(checkpoint))
    caplog.set_level(logging.WARNING)
    trainer = make_trainer(run, turned, accept_other_records=True)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert "in another order, from record 0 on: accepted" in caplog.text
