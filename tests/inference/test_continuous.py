"""ContinuousPass: jobs that come and go get the vectors of a call of their own."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from test_encode import NEAR, taught  # noqa: F401 -- a fixture

from twn_rl.inference.chooser import make_chooser
from twn_rl.inference.continuous import ContinuousPass
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import parse_input
from twn_rl.inference.job import Job
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.vector_forms import normalize_rows

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]


def job(embedder: ThinkingEmbedder, value: Any, think: Any = "auto", **settings: Any) -> Job:
    chooser = make_chooser(embedder.model, "query", EncodeOptions(think=think), 1)
    return Job(parse_input(value, 0, embedder.input_rules()), chooser, **settings)


def make_pass(embedder: ThinkingEmbedder, **sizes: Any) -> ContinuousPass:
    return ContinuousPass(embedder.model, embedder.prompt_limits, **sizes)


def run(work: ContinuousPass, steps: int = 200) -> list[Job]:
    done: list[Job] = []
    for _ in range(steps):
        done += work.step()
        if work.is_idle:
            return done
    raise AssertionError("jobs are left")


def vectors(jobs: Sequence[Job]) -> np.ndarray:
    states = [job.state for job in jobs if job.state is not None]
    assert len(states) == len(jobs)
    return normalize_rows(np.stack(states))


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_the_embedder_whoever_arrives_in_between(taught, name):
    embedder, items = taught(name)
    modes = ["always", "never", "auto"]
    jobs = [job(embedder, item, modes[n % 3]) for n, item in enumerate(items * 3)]
    work = make_pass(embedder, places=3, batch_size=4)
    done: list[Job] = []
    for each in jobs:  # one more arrives before every token
        work.inbox.append(each)
        done += work.step(max_tokens=1)
    done += run(work)
    assert sorted(map(id, done)) == sorted(map(id, jobs))
    assert [each.error for each in jobs] == [None] * len(jobs)
    for think in modes:
        own = [(n, each) for n, each in enumerate(jobs) if modes[n % 3] == think]
        asked = [items[n % len(items)] for n, _ in own]
        found = embedder.encode_query(asked, think=think, return_details=True)
        np.testing.assert_allclose(vectors([each for _, each in own]), found.embeddings, **NEAR)
        assert [each.thought_ids for _, each in own] == [
            ids[0] if ids else [] for ids in found.thought_ids
        ]
        told = [each.thought and each.thought.problem for _, each in own]
        assert told == [p[0] if p else None for p in found.problems]
        if think == "auto":
            said: Any = [each.probability for _, each in own]
            np.testing.assert_allclose(said, found.gate_probabilities, **NEAR)
    assert {each.has_thought for each in jobs} == {True, False}


def test_one_who_does_not_think_is_done_at_the_next_step_beside_thoughts(taught):
    embedder, items = taught()
    work = make_pass(embedder)
    thinker, other = (job(embedder, items[2], think) for think in ("always", "never"))
    work.inbox.append(thinker)
    assert work.step(max_tokens=1) == []
    assert work.num_writing == 1
    work.inbox.append(other)
    assert work.step(max_tokens=1) == [other]
    assert work.num_writing == 1
    assert run(work) == [thinker]


def test_an_answer_is_given_out_before_the_step_goes_on_with_thoughts(taught):
    embedder, items = taught()
    log: list[Any] = []
    work = make_pass(embedder, note_batch=lambda kind, size: log.append(kind))
    thinker, first, later = (job(embedder, items[2], mode) for mode in ("always", "never", "never"))
    work.inbox.append(thinker)
    assert work.step(max_tokens=1, give_out=log.append) == []
    work.inbox.append(first)
    came = [later]

    def take_in() -> None:  # the other one comes while the step is under way
        if log[-1] == "write" and came:
            work.inbox.append(came.pop())

    log.clear()
    assert work.step(take_in, max_tokens=1, give_out=log.append) == []
    assert log == ["read", [first], "write", "read", [later]]
    assert run(work) == [thinker]


def test_places_are_never_exceeded_and_a_cancelled_job_frees_its_own(taught):
    embedder, items = taught()
    work = make_pass(embedder, places=2)
    jobs = [job(embedder, items[2], "always") for _ in range(6)]
    work.inbox.extend(jobs)
    work.step(max_tokens=1)
    assert (work.num_writing, work.num_waiting) == (2, 0)
    work.step(max_tokens=1)
    # What has been read of those who wait fills memory: no more than there are places.
    assert (work.num_writing, work.num_waiting, len(work.inbox)) == (2, 2, 2)
    for each in (jobs[0], jobs[2], jobs[5]):
        each.is_cancelled = True
    assert {id(each) for each in work.step(max_tokens=1)} == {
        id(each) for each in (jobs[0], jobs[2], jobs[5])
    }
    assert (work.num_writing, work.num_waiting) == (2, 1)
    assert len(run(work)) == 3
    texts = [each.thought and each.thought.text for each in jobs if not each.is_cancelled]
    assert texts == ["zebra above the tree"] * 3
    assert jobs[0].thought is None
    assert not work.decoding.rows


def test_an_error_ends_the_jobs_it_belongs_to_and_no_others(taught, monkeypatch):
    embedder, items = taught()
    work = make_pass(embedder)
    writing, reading = job(embedder, items[2], "always"), job(embedder, items[1], "never")
    work.inbox.append(writing)
    work.step(max_tokens=1)
    work.inbox.append(reading)
    with monkeypatch.context() as patch:
        patch.setattr(embedder.model, "embed", lambda *args, **kwargs: 1 / 0)
        assert work.step(max_tokens=1) == [reading]
    assert isinstance(reading.error, ZeroDivisionError)
    assert run(work) == [writing]
    assert writing.error is None
    again = job(embedder, items[2], "always")
    work.inbox.append(again)
    work.step(max_tokens=1)
    with monkeypatch.context() as patch:
        patch.setattr(work.decoding, "step", lambda: 1 / 0)
        assert work.step() == [again]
    assert isinstance(again.error, ZeroDivisionError)
    assert work.is_idle
    work.inbox.append(last := job(embedder, items[2], "always"))
    run(work)
    assert last.has_thought


def test_listeners_hear_the_decision_and_every_token(taught):
    embedder, items = taught()
    heard: list[object] = []
    work = make_pass(embedder)
    each = job(
        embedder,
        items[2],
        "always",
        on_read=lambda job, thinks: heard.append(thinks),
        on_token=lambda job, ids: heard.append(len(ids)),
    )
    work.inbox.append(each)
    run(work)
    # The end of turn is heard, too.
    assert heard == [True, *range(1, len(each.thought_ids) + 2)]


@pytest.mark.parametrize("name", ["gemma3_text", "qwen3_5_text"])
def test_caches_that_drop_keys_are_written_from_one_at_a_time(make_model, make_items, name):
    model, items = make_model(name), make_items("llama")
    embedder, work = ThinkingEmbedder(model), make_pass(ThinkingEmbedder(model))
    jobs = [job(embedder, item, "always") for item in items]
    work.inbox.extend(jobs)
    while not work.is_idle:
        work.step(max_tokens=1)
        assert work.num_writing <= 1
    eos = model.backbone.eos_token_id
    alone = [model.reason(model.collate([item]))[0] for item in items]
    assert [each.think_tokens for each in jobs] == [
        len([token for token in ids if token != eos]) for ids in alone
    ]
    assert [each.thought_ids for each in jobs if not each.has_thought] == [
        [token for token in ids if token != eos]
        for each, ids in zip(jobs, alone, strict=True)
        if not each.has_thought
    ]
    assert [each.error for each in jobs] == [None] * len(jobs)
