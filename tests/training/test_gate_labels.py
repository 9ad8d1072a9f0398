"""Gate labels: against a naive loop, shared by processes, kept over kills, cut into classes."""

import json
import math
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_backbones import BACKBONES, awaken

from twn_rl.data.record import Item, Record
from twn_rl.metrics.ranking import TIE_TOLERANCE
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.gate import DOCUMENT_SIDE, QUERY_SIDE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.gate_examples import choose_examples, gate_examples
from twn_rl.training.gate_labels import (
    IGNORED,
    SCHEMA,
    LabelsError,
    cut_labels,
    is_false_helpful,
    label_report,
    read_labels,
    report_table,
    soft_labels,
)
from twn_rl.training.measure_gains import LabelSettings, measure_gains

TEMPERATURE = 0.1
SETTINGS = LabelSettings(temperature=TEMPERATURE, batch_size=3, shard_size=4)
# What the reasoner was taught to write; None: it never closes the span.
TAUGHT = {"camel": "<think> tree </think>", "pizza": "<think> left above </think>", "zebra": None}


def text_record(index: int, query: str, positive: str, negatives=(), **metadata) -> Record:
    return Record(
        id=f"r{index}",
        source="words",
        query=Item(text=query),
        positive=Item(text=positive),
        negatives=tuple(Item(text=word) for word in negatives),
        metadata={"pool": "names", "task": "find", "hops": index % 2, **metadata},
    )


@pytest.fixture(scope="module")
def word_records() -> list[Record]:
    return [
        text_record(0, "camel", "top left", ["zebra"]),
        text_record(1, "pizza one", "row", ["column", "top left"]),
        text_record(2, "zebra two", "right"),
        text_record(3, "camel", "bottom"),  # a second target of the first query
        text_record(4, "camel two", "row"),  # a second query of a target
        text_record(5, "pizza", "tree", pool="things"),
        text_record(6, "zebra", "center", ["which"], pool="things"),
        text_record(7, "right", "bottom right"),  # the query is also somebody's target
        text_record(8, "pizza three", "object", task="other"),
    ]


@pytest.fixture(scope="module")
def model(word_records: list[Record]) -> DualLoraModel:
    """A model that closes its thoughts about camels and pizzas, and not those about zebras."""
    lora = LoraSettings(r=4, alpha=8)
    config = TwnConfig(
        reasoning_lora=lora, embedding_lora=lora, num_readout_tokens=2, max_think_tokens=6
    )
    model = DualLoraModel.from_backbone(BACKBONES["llama"](), config)
    awaken(model)
    items = [*(r.query for r in word_records), *(r.positive for r in word_records)]
    texts = [TAUGHT.get(str(item.text).split()[0], "<think> it </think>") for item in items]
    rows = [
        model.completion_ids("<think> one one one one one" if text is None else text)
        + ([] if text is None else [model.backbone.eos_token_id])
        for text in texts
    ]
    optimizer = torch.optim.Adam([p for n, p in model.named_parameters() if ".default" in n], 5e-3)
    for _ in range(120):
        nll, count = model.token_nll(model.collate(items, rows))
        (nll.sum() / count.sum()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def naive_row(model: DualLoraModel, records: list[Record], side: str, item: Item) -> dict:
    """One input, one partner, one rival at a time, straight from the definitions, in float64."""

    def vector(what: Item, completion: list[int]) -> torch.Tensor:
        return model.embed(model.collate([what], [completion]))[0].double()

    is_query = side == QUERY_SIDE
    pairs = [(r.query, r.positive) if is_query else (r.positive, r.query) for r in records]
    pools: dict[str, dict[str, Item]] = {}
    for record, (_, other) in zip(records, pairs, strict=True):
        pool = pools.setdefault(record.metadata["pool"], {})
        for rival in (other, *(record.negatives if is_query else ())):
            pool[rival.content_key()] = rival
    partners = {
        other.content_key(): record.metadata["pool"]
        for record, (own, other) in zip(records, pairs, strict=True)
        if own == item
    }
    (written,) = model.reason(model.collate([item]))
    row: dict = {}
    for mode, ids in (("no_think", []), ("think", model.completion_for_embedding(written))):
        own = vector(item, ids)
        losses, ranks = [], []
        for key, pool in partners.items():
            similarity = {k: float(own @ vector(rival, [])) for k, rival in pools[pool].items()}
            positive = similarity[key]
            rivals = [
                s for k, s in similarity.items() if k not in partners and k != item.content_key()
            ]
            total = sum(math.exp(s / TEMPERATURE) for s in [positive, *rivals])
            losses.append(math.log(total) - positive / TEMPERATURE)
            ranks.append(1 + sum(s >= positive - TIE_TOLERANCE for s in rivals))
        row[f"{mode}_loss"], row[f"{mode}_ranks"] = float(np.mean(losses)), ranks
    return row


def test_the_taught_reasoner_closes_most_thoughts_and_not_all(model, word_records, tmp_path):
    labels = measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    problems = {row["id"]: row["problem"] for row in labels.rows}
    assert problems["r0"] is None
    assert problems["r2"] is not None
    assert {row["id"]: row["cot"] for row in labels.rows}["r0"] == "tree"


@pytest.mark.parametrize("side", [QUERY_SIDE, DOCUMENT_SIDE])
def test_losses_and_ranks_are_those_of_a_naive_loop(model, word_records, tmp_path, side):
    labels = measure_gains(model, word_records, side, tmp_path, SETTINGS)
    examples = gate_examples(word_records, side)
    assert [row["id"] for row in labels.rows] == [example.id for example in examples]
    for row, example in zip(labels.rows, examples, strict=True):
        expected = naive_row(model, word_records, side, example.item)
        for name in ("no_think_loss", "think_loss"):
            assert row[name] == pytest.approx(expected[name], abs=2e-4), (row["id"], name)
        assert row["no_think_ranks"] == expected["no_think_ranks"]
        assert row["think_ranks"] == expected["think_ranks"]
        assert row["gain"] == row["no_think_loss"] - row["think_loss"]
        if row["problem"] is not None:
            assert row["gain"] == 0.0
    assert any(abs(gain) > 0.01 for gain in labels.gains)


def test_states_are_the_read_out_before_normalisation(model, word_records, tmp_path):
    labels = measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    examples = gate_examples(word_records, QUERY_SIDE)
    batch = model.collate([example.item for example in examples])
    expected = model.read_out(model.read(model.prepare(batch)))
    torch.testing.assert_close(torch.from_numpy(labels.states), expected, atol=1e-4, rtol=1e-4)
    is_unused = [row["problem"] is not None for row in labels.rows]
    assert (labels.states == labels.think_states).all(axis=1).tolist() == is_unused
    assert not np.allclose(np.linalg.norm(labels.states, axis=1), 1.0)


def test_equal_inputs_are_one_example_with_all_their_partners(word_records):
    queries = gate_examples(word_records, QUERY_SIDE)
    assert [example.id for example in queries] == ["r0", "r1", "r2", "r4", "r5", "r6", "r7", "r8"]
    assert len(queries[0].partners) == 2
    assert queries[0].hop is None  # its records differ
    documents = gate_examples(word_records, DOCUMENT_SIDE)
    assert [len(e.partners) for e in documents if e.item.text == "row"] == [2]
    with pytest.raises(ValueError, match="side = 'target'"):
        gate_examples(word_records, "target")


def test_a_draw_of_examples_keeps_their_order_and_follows_the_seed(word_records):
    examples = gate_examples(word_records, QUERY_SIDE)
    drawn = choose_examples(examples, 4, seed=1)
    assert drawn == choose_examples(examples, 4, seed=1) != choose_examples(examples, 4, seed=2)
    assert [examples.index(example) for example in drawn] == sorted(map(examples.index, drawn))
    assert choose_examples(examples, None) == choose_examples(examples, 99) == examples


def test_an_embedding_that_cannot_use_its_thoughts_gains_nothing(make_model, records, tmp_path):
    # Random reasoners never close a thought; every input then counts as not having thought.
    labels = measure_gains(make_model(), records, QUERY_SIDE, tmp_path, SETTINGS)
    assert {row["problem"] is None for row in labels.rows} == {False}
    assert labels.gains.tolist() == [0.0] * len(labels.rows)
    assert label_report(labels.rows, 0.1)["all"]["does_nothing"] == 1.0


def without_mtime(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}


def test_a_killed_pass_goes_on_with_the_shards_it_lacks(model, word_records, tmp_path):
    whole = measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    before = without_mtime(tmp_path)
    kept = tmp_path / "000000.parquet"
    modified = kept.stat().st_mtime_ns
    (tmp_path / "000001.parquet").write_bytes(b"PAR1 cut short")
    with pytest.raises(LabelsError, match=r"lacks shards \[1\]"):
        read_labels(tmp_path)
    again = measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    assert kept.stat().st_mtime_ns == modified
    assert again.rows == whole.rows
    assert without_mtime(tmp_path) == before
    assert read_labels(tmp_path).rows == whole.rows


def test_labels_of_something_else_are_refused_and_kept_unless_told_otherwise(
    model, word_records, tmp_path
):
    measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    (tmp_path / "notes.txt").write_text("mine")
    before = without_mtime(tmp_path)
    hotter = LabelSettings(temperature=0.5, batch_size=3, shard_size=4)
    with pytest.raises(LabelsError, match=r"temperature = 0\.1, now 0\.5; .*--rebuild_labels"):
        measure_gains(model, word_records, QUERY_SIDE, tmp_path, hotter)
    with pytest.raises(LabelsError, match="records = "):
        measure_gains(model, word_records[:-1], QUERY_SIDE, tmp_path, SETTINGS)
    with pytest.raises(LabelsError, match="side = query, now document"):
        measure_gains(model, word_records, DOCUMENT_SIDE, tmp_path, SETTINGS)
    weight = next(p for n, p in model.named_parameters() if "lora_B.default" in n)
    with torch.no_grad():
        weight += 1
    try:
        with pytest.raises(LabelsError, match="thoughts = "):
            measure_gains(model, word_records, QUERY_SIDE, tmp_path, SETTINGS)
    finally:
        with torch.no_grad():
            weight -= 1
    assert without_mtime(tmp_path) == before
    rebuilt = measure_gains(model, word_records, QUERY_SIDE, tmp_path, hotter, rebuild=True)
    assert json.loads((tmp_path / "plan.json").read_text())["temperature"] == 0.5
    assert len(rebuilt.rows) == 8
    assert (tmp_path / "notes.txt").read_text() == "mine"


class Crew:
    """Threads in place of processes: all wait for each other, as `PartialState` does."""

    def __init__(self, index: int, barrier: threading.Barrier) -> None:
        self.process_index, self.num_processes, self._barrier = index, barrier.parties, barrier

    def wait_for_everyone(self) -> None:
        self._barrier.wait(timeout=60)


def test_two_processes_share_the_shards_and_find_what_one_finds(model, word_records, tmp_path):
    alone = measure_gains(model, word_records, QUERY_SIDE, tmp_path / "one", SETTINGS)
    barrier, results, lock = threading.Barrier(2), {}, threading.Lock()

    class Locked(Crew):
        """Forward passes switch adapters of the one model: only one thread may compute."""

        def wait_for_everyone(self) -> None:
            lock.release()
            super().wait_for_everyone()
            lock.acquire()

    def work(index: int) -> None:
        with lock:
            results[index] = measure_gains(
                model,
                word_records,
                QUERY_SIDE,
                tmp_path / "two",
                SETTINGS,
                processes=Locked(index, barrier),
            )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index in range(2):
        assert results[index].rows == alone.rows
        assert np.array_equal(results[index].states, alone.states)


def test_gains_are_cut_into_classes_with_an_optional_dead_band():
    gains = np.array([2.0, 0.1, 0.099, 0.0, -0.1, -3.0])
    assert cut_labels(gains, 0.1).tolist() == [1, 0, 0, 0, 0, 0]
    assert cut_labels(gains, 0.1, lower_margin=-0.1).tolist() == [1, *[IGNORED] * 3, 0, 0]
    assert cut_labels(gains, 0.0).tolist() == [1, 1, 1, 0, 0, 0]
    with pytest.raises(ValueError, match=r"margin = 0\.1, lower_margin = 0\.2"):
        cut_labels(gains, 0.1, lower_margin=0.2)
    with pytest.raises(ValueError, match="1 gains not finite"):
        cut_labels(np.array([np.nan]), 0.1)


def test_soft_labels_rise_with_the_gain_and_are_even_at_the_margin():
    soft = soft_labels(np.array([-1e9, 0.0, 0.1, 0.2, 1e9]), 0.1, 0.05)
    assert soft[2] == 0.5
    assert (np.diff(soft) > 0).all()
    assert soft[0] < 1e-12
    assert soft[-1] == 1.0
    with pytest.raises(ValueError, match="temperature = 0"):
        soft_labels(np.zeros(1), 0.1, 0)


def row_of(**values) -> dict:
    empty = dict.fromkeys(SCHEMA.names)
    return {
        **empty,
        "task": "t",
        "gain": 0.0,
        "no_think_ranks": [1],
        "think_ranks": [1],
        "think_tokens": 4,
        "no_think_positive_similarity": 0.5,
        "think_positive_similarity": 0.5,
        **values,
    }


@pytest.mark.parametrize(
    ("positive", "negative", "is_false"), [(0.6, 0.5, True), (0.6, 0.3, False), (0.4, 0.9, False)]
)
def test_false_helpful_is_a_nearer_positive_with_a_still_nearer_negative(
    positive, negative, is_false
):
    row = row_of(
        think_positive_similarity=positive,
        no_think_hardest_negative=0.3,
        think_hardest_negative=negative,
    )
    assert is_false_helpful(row) == is_false
    assert not is_false_helpful(row_of(think_positive_similarity=0.9))  # a pool without negatives


def test_the_report_counts_by_task_and_hop():
    rows = [
        row_of(gain=1.0, hop="hop1", no_think_ranks=[2], think_ranks=[1]),
        row_of(gain=-1.0, hop="hop0", no_think_ranks=[1, 1], think_ranks=[1, 2]),
        row_of(gain=0.05, task="other", problem="truncated"),
    ]
    report = label_report(rows, 0.1)
    assert list(report) == ["all", "t", "hop1", "hop0", "other"]
    assert report["all"]["helps"] == report["all"]["hurts"] == pytest.approx(1 / 3)
    assert report["hop0"]["think_hit@1"] == 0.5
    assert report["hop1"]["no_think_hit@1"] == 0.0
    assert report["other"]["unusable_thoughts"] == 1.0
    assert "| hop1 | 1 | 1.000 |" in report_table(report)


def test_settings_collect_every_problem():
    with pytest.raises(ValueError, match=r"batch_size = 0.*temperature = 0"):
        LabelSettings(batch_size=0, temperature=0)
    assert LabelSettings(max_examples=None, max_think_tokens=None).max_examples is None
