"""Mined negatives agree with a naive loop: margins, ranks, pools; nothing equal is a negative."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_records import picture
from test_encode_files import TinyEmbedder, write_lines

from twn_rl.cli import main, model_arguments
from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import load_records, write_records
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.mine_negatives import mine_file
from twn_rl.inference.negative_choice import (
    MiningReport,
    MiningSettings,
    nearest_allowed,
    select_negatives,
)
from twn_rl.inference.vector_meta import VectorFileError

NEVER = EncodeSettings(think="never")


def naive_negatives(scores, positive_score, excluded, chosen):
    """Rank, then filter, one candidate at a time."""
    ranked = sorted(
        (c for c in range(len(scores)) if c not in excluded), key=lambda c: (-scores[c], c)
    )
    kept = []
    for rank, column in enumerate(ranked):
        score = float(scores[column])
        is_in_range = rank >= chosen.range_min
        is_in_range &= chosen.range_max is None or rank < chosen.range_max
        is_low = chosen.max_score is None or score <= chosen.max_score
        if chosen.absolute_margin is not None:
            is_low &= score <= positive_score - chosen.absolute_margin
        if chosen.relative_margin is not None:
            is_low &= score <= positive_score - abs(positive_score) * chosen.relative_margin
        if is_in_range and is_low:
            kept.append(column)
    return kept


# Multiples of 1/8 are exact in float32 and in float64, and make many ties.
eighths = st.integers(-8, 8).map(lambda n: n / 8)
margins = st.none() | st.sampled_from([0.0, 0.125, 0.5])


@st.composite
def cases(draw):
    scores = np.array(draw(st.lists(eighths, min_size=0, max_size=24)), dtype=np.float32)
    excluded = draw(st.sets(st.integers(0, max(len(scores) - 1, 0)))) if len(scores) else set()
    minimum, number = draw(st.integers(0, 4)), draw(st.integers(1, 5))
    chosen = MiningSettings(
        num_negatives=number,
        range_min=minimum,
        range_max=draw(st.none() | st.integers(minimum + number, 30)),
        max_score=draw(st.none() | eighths),
        absolute_margin=draw(margins),
        relative_margin=draw(margins),
        seed=draw(st.integers(0, 3)),
    )
    return scores, draw(eighths), excluded, chosen


@given(cases())
@settings(max_examples=300, deadline=None)
def test_top_negatives_are_those_of_a_naive_loop_and_every_candidate_is_accounted_for(case):
    scores, positive_score, excluded, chosen = case
    counts = MiningReport()
    reasons = {"positive": sorted(excluded)[:2], "known": sorted(excluded)}
    found = select_negatives(scores, positive_score, reasons, chosen, counts)
    expected = naive_negatives(scores, positive_score, excluded, chosen)
    assert found.tolist() == expected[: chosen.num_negatives]
    assert counts.candidates == len(scores) == counts.mined + sum(counts.dropped.values())
    assert all(count > 0 for count in counts.dropped.values())
    assert counts.short_queries == (len(found) < chosen.num_negatives)


@given(cases(), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_random_negatives_are_drawn_from_the_same_candidates(case, stream):
    scores, positive_score, excluded, top = case
    chosen = MiningSettings(**{**top.__dict__, "sampling": "random"})
    reasons = {"positive": excluded}
    draws = [
        select_negatives(
            scores, positive_score, reasons, chosen, MiningReport(), stream=stream
        ).tolist()
        for _ in range(2)
    ]
    kept = naive_negatives(scores, positive_score, excluded, chosen)
    assert draws[0] == draws[1]
    assert len(draws[0]) == min(len(kept), chosen.num_negatives)
    assert draws[0] == [column for column in kept if column in draws[0]]


def test_random_draws_differ_between_queries_and_reach_every_candidate():
    scores = np.linspace(0.5, -0.5, 10, dtype=np.float32)
    chosen = MiningSettings(num_negatives=2, sampling="random")
    draws = [
        tuple(select_negatives(scores, 0.9, {}, chosen, MiningReport(), stream=stream))
        for stream in range(100)
    ]
    assert len(set(draws)) > 20
    assert {column for draw in draws for column in draw} == set(range(10))


@given(st.lists(eighths, max_size=20), st.none() | st.integers(1, 22))
@settings(max_examples=100, deadline=None)
def test_ties_at_the_last_rank_go_to_the_lower_column(values, count):
    scores = np.array(values, dtype=np.float32)
    expected = sorted(range(len(values)), key=lambda c: (-values[c], c))[:count]
    assert nearest_allowed(scores, [], count).tolist() == expected


def test_a_relative_margin_works_for_negative_similarities_too():
    counts = MiningReport()
    scores = np.array([-0.49, -0.5, -0.52, -0.8], dtype=np.float32)
    chosen = MiningSettings(num_negatives=4, relative_margin=0.05)
    assert select_negatives(scores, -0.5, {}, chosen, counts).tolist() == [3]
    assert counts.dropped == {"relative_margin": 3}


def test_settings_that_cannot_be_met_are_refused_together():
    with pytest.raises(ValueError, match=r"range_max = 4, expected at least .* = 7; .*in \[0, 1\]"):
        MiningSettings(range_min=2, range_max=4, relative_margin=1.5)
    with pytest.raises(ValueError, match=r"num_negatives = 0.*sampling = 'worst'"):
        MiningSettings(num_negatives=0, sampling="worst")  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def embedder():
    """A model that remembers what it has embedded."""
    return TinyEmbedder()


WORDS = ["camel", "pizza", "zebra", "tree", "row", "column", "center", "top", "left", "right"]


def make_records(folder, *, pools=True):
    """Ten records: texts and pictures, two pools, one query with two positives, copies."""
    for i in range(4):
        picture(i).save(folder / f"{i}.png")
    picture(0).save(folder / "copy.png")
    items = [Item(images=(f"{i}.png",)) for i in range(4)]
    items += [Item(text=word) for word in WORDS[:6]]
    records = [
        Record(
            id=f"r{i}",
            source="test",
            query=Item("find the object", f"{WORDS[i]} above"),
            positive=item,
            negatives=(Item(text=WORDS[(i + 1) % 6]),) if i >= 8 else (),
            metadata={"pool": "ab"[i % 2]} if pools else {},
        )
        for i, item in enumerate(items)
    ]
    # Another positive of r4's query, in its pool, and an equal one with another instruction.
    for name, positive in (("x", Item(text=WORDS[4])), ("y", Item("name it", WORDS[0]))):
        records.append(
            Record(name, "test", records[4].query, positive, metadata=records[4].metadata)
        )
    write_records(folder / "in.jsonl", records)
    return folder / "in.jsonl"


def mine(embedder, source, chosen=None, **options):
    output = source.parent / "out" / "mined.jsonl"
    options = {"encoding": NEVER, "data_root": source.parent, **options}
    report = mine_file(embedder, source, output, chosen, show_progress_bar=False, **options)
    return report, load_records(output, data_root=source.parent)


def vector_of(embedder, item):
    return embedder.encode_document(
        [item], think="never", on_bad_input="skip", return_details=True
    ).embeddings[0]


def test_negatives_are_the_nearest_of_the_pool_that_are_not_positives(embedder, tmp_path):
    source = make_records(tmp_path)
    before = load_records(source)
    report, after = mine(embedder, source, MiningSettings(num_negatives=3))
    assert len(after) == len(before) == report.records == 12
    for old, new in zip(before, after, strict=True):
        pool = old.metadata["pool"]
        kept = new.negatives[: len(old.negatives)]
        assert (new.id, new.query, new.positive, kept) == (
            *(old.id, old.query, old.positive, old.negatives),
        )
        targets = {
            item.content_key(): item
            for record in before
            if record.metadata["pool"] == pool
            for item in (record.positive, *record.negatives)
        }
        own = [r.positive for r in before if r.query == old.query]
        barred = {(item.text, item.images) for item in (*own, *old.negatives)}
        candidates = [i for i in targets.values() if (i.text, i.images) not in barred]
        query = vector_of(embedder, old.query)
        candidates.sort(key=lambda item: -float(query @ vector_of(embedder, item)))
        assert [i.content_key() for i in new.negatives[len(old.negatives) :]] == [
            item.content_key() for item in candidates[:3]
        ]
    assert report.mined == sum(len(r.negatives) for r in after) - 2


def test_equal_content_is_no_negative_whatever_its_prompt_or_file_name(embedder, tmp_path):
    source = make_records(tmp_path, pools=False)
    rows = [
        {"id": "1", "text": "  pizza ", "instruction": "represent"},
        {"id": "2", "image": "copy.png"},
        {"id": "3", "text": "camel above"},
        {"id": "4", "text": "bottom"},
        {"id": "5", "text": "{"},
        "{",
        {"id": "7", "image": "none.png"},
    ]
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    report, after = mine(embedder, source, MiningSettings(num_negatives=9), corpus=corpus)
    found = {record.id: [(n.text, bool(n.images)) for n in record.negatives] for record in after}
    everything = {("  pizza ", False), (None, True), ("camel above", False), ("bottom", False)}
    everything |= {("{", False)}
    assert set(found["r0"]) == everything - {(None, True), ("camel above", False)}
    assert set(found["r5"]) == everything - {("  pizza ", False)}
    assert set(found["r1"]) == everything
    barred = report.dropped["equal to the query or a positive"]
    assert barred == 3


def test_pools_of_a_corpus_are_kept_apart(embedder, tmp_path):
    source = make_records(tmp_path)
    rows = [{"text": "bottom", "pool": "a"}, {"text": "in", "metadata": {"pool": "b"}}]
    corpus = write_lines(tmp_path / "corpus.jsonl", rows)
    _, after = mine(embedder, source, corpus=corpus)
    mined = {(r.metadata["pool"], n.text) for r in after for n in r.negatives}
    assert {pair for pair in mined if pair[1] in ("bottom", "in")} == {("a", "bottom"), ("b", "in")}


def test_a_margin_below_the_positive_holds_for_every_negative(embedder, tmp_path):
    source = make_records(tmp_path)
    margin = MiningSettings(num_negatives=3, absolute_margin=0.05)
    report, after = mine(embedder, source, margin)
    assert report.dropped["absolute_margin"] > 0
    assert 0 < report.mined < 36
    known = {record.id: len(record.negatives) for record in load_records(source)}
    for record in after:
        query = vector_of(embedder, record.query)
        limit = query @ vector_of(embedder, record.positive) - 0.05 + 1e-5
        for item in record.negatives[known[record.id] :]:
            assert query @ vector_of(embedder, item) <= limit
    text = "\n".join(report.lines())
    assert f"absolute_margin: {report.dropped['absolute_margin']}" in text
    assert "positive_scores: median" in text


def test_another_margin_costs_no_embedding_and_another_model_is_refused(tmp_path):
    source, embedder = make_records(tmp_path), TinyEmbedder()
    mine(embedder, source)
    embedded = len(embedder.seen)
    assert embedded == 10 + 11  # distinct queries; distinct positives and negatives
    report, _ = mine(embedder, source, MiningSettings(max_score=-1.0))
    assert len(embedder.seen) == embedded
    assert report.mined == 0
    with pytest.raises(VectorFileError, match=r"model\.space.*--overwrite"):
        mine(TinyEmbedder(seed=1), source)
    mine(TinyEmbedder(seed=1), source, overwrite=True)


def test_an_interrupted_run_keeps_what_it_embedded(tmp_path):
    source = make_records(tmp_path)
    shards = EncodeSettings(think="never", shard_size=2)
    with pytest.raises(KeyboardInterrupt):
        mine(TinyEmbedder(stop_after=14), source, encoding=shards)
    assert not (tmp_path / "out" / "mined.jsonl").exists()
    again = TinyEmbedder()
    report, after = mine(again, source, encoding=shards)
    assert len(again.seen) == 21 - 14
    whole = mine_file(
        TinyEmbedder(), source, tmp_path / "whole.jsonl", encoding=NEVER, show_progress_bar=False
    )
    assert report == whole
    assert [r.to_dict() for r in after] == [
        r.to_dict() for r in load_records(tmp_path / "whole.jsonl")
    ]


def test_a_record_without_a_vector_is_written_as_it_was(tmp_path):
    source, embedder = make_records(tmp_path), TinyEmbedder()
    encode_query = embedder.encode_query

    def failing(items, **options):
        result = encode_query(items, **options)
        result.errors[0] = "too long"
        return result

    embedder.encode_query = failing
    report, after = mine(embedder, source)
    assert report.failed_records == 1
    assert after[0].negatives == ()
    assert after[1].negatives


def test_the_command_writes_records_and_says_what_was_dropped(
    embedder, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    source = make_records(tmp_path)
    with source.open("a") as file:
        file.write("{\n")
    monkeypatch.setattr(model_arguments, "_load_embedder", lambda path, **options: embedder)
    # The model has nothing that decides, so that queries do not think unless they are told to.
    assert not embedder.model.gates
    words = ["mine-negatives", "--model", "tiny", "--input", str(source)]
    words += ["--output", str(tmp_path / "mined.jsonl"), "--num_negatives", "2"]
    assert main([*words, "--range_min", "1", "--range_max", "0", "--sampling", "random"]) == 0
    rows = [json.loads(line) for line in (tmp_path / "mined.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    assert len(rows[0]["negatives"]) == 2
    assert all(not path.startswith("/") for row in rows for path in row["positive"]["images"])
    assert "1 bad rows left out" in caplog.text
    assert "range_min: 12" in caplog.text
    assert main([*words, "--relative_margin", "3"]) == 2
    assert "relative_margin = 3.0, expected None or in [0, 1]" in caplog.text
