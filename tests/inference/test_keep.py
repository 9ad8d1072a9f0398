"""`keep="better"`: a thought that the judge finds implausible leaves the no-think vector."""

import logging

import numpy as np
import pytest
from judged_model import LEVEL, TAUGHT, judged_model

from twn_rl.inference.chooser import make_chooser
from twn_rl.inference.continuous import ContinuousPass
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.encode_file import fingerprints
from twn_rl.inference.inputs import parse_input
from twn_rl.inference.job import Job
from twn_rl.inference.options import EncodeOptions
from twn_rl.modeling.gate import DOCUMENT_SIDE, QUERY_SIDE

NEAR = {"rtol": 0, "atol": 1e-5}


@pytest.fixture
def embedder(make_model) -> ThinkingEmbedder:
    return ThinkingEmbedder(judged_model(make_model))


def test_an_implausible_thought_leaves_the_no_think_vector(
    embedder: ThinkingEmbedder, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    texts = list(TAUGHT)
    never = embedder.encode_query(texts, think="never")
    used = embedder.encode_query(texts, think="always", return_details=True)
    assert sorted(p for row in used.plausibilities[:4] for p in row) == [0.25, 0.5, 0.75, 1.0]
    assert used.plausibilities[4] == [None]
    assert used.problems[:4] == [[None]] * 4
    caplog.clear()
    kept = embedder.encode_query(texts, think="always", keep="better", return_details=True)
    assert "2 of 5 thoughts were implausible and left out" in caplog.text
    assert kept.plausibilities == used.plausibilities
    for row in range(4):
        is_refused = used.plausibilities[row][0] <= LEVEL
        expected = never[row] if is_refused else used.embeddings[row]
        np.testing.assert_allclose(kept.embeddings[row], expected, **NEAR)
        assert kept.problems[row] == (["implausible"] if is_refused else [None])
        assert (row in kept.fallbacks) == is_refused
        assert not np.allclose(never[row], used.embeddings[row], **NEAR)
    # Thoughts are paid for and shown, whether they are kept or not.
    assert (kept.thoughts, kept.think_tokens) == (used.thoughts, used.think_tokens)
    assert sum(kept.has_thought) == 2


def test_it_is_the_same_alone_under_auto_and_with_given_thoughts(
    embedder: ThinkingEmbedder,
) -> None:
    texts = list(TAUGHT)[:4]
    batch = embedder.encode_query(texts, think="always", keep="better")
    alone = [embedder.encode_query(text, think="always", keep="better") for text in texts]
    np.testing.assert_allclose(np.stack(alone), batch, **NEAR)
    small = embedder.encode_query(texts, keep="better", batch_size=2)
    np.testing.assert_allclose(small, batch, **NEAR)
    rate = embedder.encode_query(texts, keep="better", think_rate=1.0)
    np.testing.assert_allclose(rate, batch, **NEAR)
    nobody = embedder.encode_query(texts, keep="better", think_threshold=1.0)
    np.testing.assert_allclose(nobody, embedder.encode_query(texts, think="never"), **NEAR)
    thoughts = [TAUGHT[text].split(">")[1].split("<")[0].strip() for text in texts]
    given = embedder.encode_query(texts, think=thoughts, keep="better")
    np.testing.assert_allclose(given, batch, **NEAR)


def test_of_several_thoughts_the_plausible_ones_are_averaged(embedder: ThinkingEmbedder) -> None:
    sampling = {"think": "always", "do_sample": True, "num_thoughts": 6, "temperature": 3.0}
    texts, seen = list(TAUGHT)[:3], 0
    every = embedder.encode_query(texts, **sampling, return_details=True)
    kept = embedder.encode_query(texts, **sampling, keep="better", return_details=True)
    never = embedder.encode_query(texts, think="never")
    for row in range(3):
        said = every.plausibilities[row]
        good = [place for place, p in enumerate(said) if p is not None and p > LEVEL]
        seen += len(good) < sum(p is not None for p in said)
        mean = every.thought_embeddings[row][good].mean(0) if good else never[row]
        np.testing.assert_allclose(kept.embeddings[row], mean / np.linalg.norm(mean), **NEAR)
    assert seen


def test_without_a_judge_or_without_thoughts_it_is_refused(embedder: ThinkingEmbedder) -> None:
    with pytest.raises(ValueError, match=r"no judge of document thoughts.*gate_embed\.py"):
        embedder.encode_document(["camel"], think="always", keep="better")
    with pytest.raises(ValueError, match="keep = 'better' where nothing is written"):
        embedder.encode_query(["camel"], think="never", keep="better")
    with pytest.raises(ValueError, match="keep = 'best'"):
        embedder.encode_query(["camel"], keep="best")  # pyright: ignore[reportArgumentType]
    assert embedder.model.judge(DOCUMENT_SIDE) is None
    assert embedder.model.judge(QUERY_SIDE) is not None


def test_vectors_in_files_depend_on_the_judge_only_if_it_is_asked(
    embedder: ThinkingEmbedder,
) -> None:
    model = embedder.model
    before = [fingerprints(model, "query", "always", is_judged=judged) for judged in (False, True)]
    judge = model.judge(QUERY_SIDE)
    assert judge is not None
    judge.level.fill_(0.1)
    after = [fingerprints(model, "query", "always", is_judged=judged) for judged in (False, True)]
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_inputs_that_come_and_go_are_judged_as_those_of_one_call(
    embedder: ThinkingEmbedder,
) -> None:
    texts, model = list(TAUGHT), embedder.model
    chooser = make_chooser(model, "query", EncodeOptions(think="auto", keep="better"), 1)
    jobs = [Job(parse_input(text, 0, embedder.input_rules()), chooser) for text in texts]
    work = ContinuousPass(model, embedder.prompt_limits, places=2)
    work.inbox.extend(jobs)
    while not work.is_idle:
        work.step()
    found = embedder.encode_query(texts, keep="better", return_details=True)
    states = np.stack([job.state for job in jobs if job.state is not None])
    lengths = np.linalg.norm(states, axis=1, keepdims=True)
    np.testing.assert_allclose(states / lengths, found.embeddings, **NEAR)
    thoughts = [job.thought for job in jobs if job.thought is not None]
    assert [[thought.problem] for thought in thoughts] == found.problems
    assert [[thought.plausibility] for thought in thoughts] == found.plausibilities
