"""MMEB-V2's scores: the official formulas, nothing for a collapsed model, files that never mix."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twn_rl.data.record import Item
from twn_rl.evaluation.mmeb_v2.leaderboard import (
    OFFICIAL_KEYS,
    SCORES,
    MixedScoresError,
    leaderboard_metrics,
    read_score,
    read_scores,
    summarize,
    task_path,
    write_reports,
)
from twn_rl.evaluation.mmeb_v2.score_task import score_task
from twn_rl.evaluation.mmeb_v2.task_data import ItemTargets, TaskData, TaskQuery
from twn_rl.evaluation.mmeb_v2.tasks import load_tasks
from twn_rl.metrics.ranking import query_metrics

TASKS = load_tasks()
KS = (1, 5, 10)


def official_metrics(scores, gains, k: int) -> dict[str, float]:
    """Return the official metrics of one query from its sorted list of candidates."""
    ranked = np.argsort(-np.asarray(scores))
    top = [float(gains[i]) for i in ranked[:k]]
    found, relevant = sum(gain > 0 for gain in top), int((np.asarray(gains) > 0).sum())
    best = sorted((float(g) for g in gains if g > 0), reverse=True)[:k]

    def dcg(values, gain):
        return sum(gain(v) / np.log2(i + 2) for i, v in enumerate(values))

    precision, recall = found / k, found / relevant
    places = [i + 1 for i, gain in enumerate(top) if gain > 0]
    return {
        f"hit@{k}": float(found > 0),
        f"precision@{k}": precision,
        f"recall@{k}": recall,
        f"f1@{k}": 2 * precision * recall / (precision + recall) if found else 0.0,
        f"map@{k}": sum((n + 1) / p for n, p in enumerate(places)) / min(relevant, k),
        f"mrr@{k}": 1 / places[0] if places else 0.0,
        f"ndcg_linear@{k}": dcg(top, float) / dcg(best, float),
        f"ndcg_exponential@{k}": dcg(top, lambda g: 2**g - 1) / dcg(best, lambda g: 2**g - 1),
    }


def unit(rng, *shape) -> np.ndarray:
    vectors = rng.normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def make_data(relevants, num_targets: int, candidates=None) -> TaskData:
    targets = ItemTargets()
    for number in range(num_targets):
        targets.add(f"t{number}", Item(text=f"t{number}"))
    queries = [
        TaskQuery(str(i), Item(text="q"), relevant, None if candidates is None else candidates[i])
        for i, relevant in enumerate(relevants)
    ]
    return TaskData(queries, targets)


@pytest.mark.parametrize("is_local", [False, True])
@pytest.mark.parametrize("graded", [False, True])
def test_all_metrics_equal_the_official_formulas(is_local: bool, graded: bool) -> None:
    rng = np.random.default_rng(0)
    queries, targets = unit(rng, 70, 8), unit(rng, 40, 8)
    candidates = [rng.permutation(40)[:15] for _ in queries] if is_local else None
    relevants = []
    for i in range(len(queries)):
        among = candidates[i] if candidates is not None else np.arange(40)
        chosen = rng.choice(among, 3 if graded else 1, replace=False)
        relevants.append({int(n): float(rng.integers(1, 4)) if graded else 1.0 for n in chosen})
    data = make_data(relevants, 40, candidates)
    found = score_task(data, queries, targets, metric="ndcg_linear@5").metrics
    expected: dict[str, list[float]] = {}
    for i, query in enumerate(data.queries):
        numbers = np.arange(40) if query.candidates is None else query.candidates
        gains = [query.relevant.get(int(n), 0.0) for n in numbers]
        for k in KS:
            for name, value in official_metrics(queries[i] @ targets[numbers].T, gains, k).items():
                expected.setdefault(name, []).append(value)
    assert set(found) == set(expected)
    for name, values in expected.items():
        assert found[name] == pytest.approx(np.mean(values), abs=1e-6), name


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(0, 3), min_size=2, max_size=12).filter(any), st.randoms())
def test_the_order_of_candidates_changes_nothing_even_with_ties(gains, random) -> None:
    scores = [float(random.randint(0, 3)) for _ in gains]
    order = list(range(len(gains)))
    random.shuffle(order)
    shuffled = query_metrics([scores[i] for i in order], [gains[i] for i in order])
    assert shuffled == pytest.approx(query_metrics(scores, gains))


@pytest.mark.parametrize("num_candidates", [2, 4, 1000])
def test_a_constant_model_has_all_by_argsort_and_nothing_here(num_candidates: int) -> None:
    # The answer comes first among the candidates, as in the official rows.
    numbers = np.arange(num_candidates)
    data = make_data([{0: 1.0}] * 5, num_candidates, [numbers] * 5)
    vectors = np.full((num_candidates, 4), 0.5, np.float32)
    official = [int(np.argsort(-(vectors[numbers] @ vectors[0]), kind="stable")[0] == 0)] * 5
    assert np.mean(official) == 1.0
    scores = score_task(data, vectors[[0]].repeat(5, 0), vectors, metric="hit@1")
    assert scores.metrics["hit@1"] == 0.0
    assert scores.queries[0]["prediction"][0] != "t0"
    assert [
        w.startswith("all") and "mean pairwise cosine 1.0000" in w for w in scores.warnings
    ] == [
        True,
        True,
    ]


def test_vectors_that_are_nan_are_first_by_argsort_and_refused_here() -> None:
    data = make_data([{0: 1.0}], 4, [np.arange(4)])
    broken = np.full((4, 4), np.nan, np.float32)
    assert np.argsort(-(broken @ broken[0]))[0] == 0
    whole = np.eye(4, dtype=np.float32)
    for queries, targets in ((broken[:1], whole), (whole[:1], broken)):
        with pytest.raises(ValueError, match="non-finite rows"):
            score_task(data, queries, targets, metric="hit@1")


def test_equal_queries_and_nearly_equal_targets_are_warned_of_with_figures() -> None:
    rng = np.random.default_rng(0)
    data = make_data([{i: 1.0} for i in range(20)], 20)
    constant, spread = unit(rng, 1, 8).repeat(20, 0), unit(rng, 20, 8)
    near = constant + 0.01 * spread
    near /= np.linalg.norm(near, axis=1, keepdims=True)
    equal = score_task(data, constant, spread, metric="hit@1")
    assert equal.metrics["hit@1"] == pytest.approx(1 / 20), "chance, with a reason given"
    assert len(equal.warnings) == 1
    assert equal.warnings[0].startswith("all query vectors are equal (mean pairwise cosine 1.0")
    collapsed = score_task(data, spread, near.astype(np.float32), metric="hit@1").warnings
    assert collapsed[0].startswith("the document vectors have nearly collapsed (mean pairwise")
    assert score_task(data, spread, spread, metric="hit@1").warnings == []


PLAN = {"model": {"space": "a"}, "think": "auto", "labels": "page-fixed"}


def write_score(output: Path, name: str, value: float = 0.5, **changes) -> None:
    path = task_path(output, TASKS[name], SCORES)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = dict.fromkeys(OFFICIAL_KEYS, value)
    plan = {**PLAN, "task": TASKS[name].fingerprint(), **changes.pop("plan", {})}
    content |= {"label_set": "page-fixed", "think_rate": 0.25, "think_tokens": 3.0}
    path.write_text(json.dumps({**content, "warnings": [], "plan": plan, **changes}))


def test_the_mean_over_all_is_given_for_all_tasks_only(tmp_path: Path) -> None:
    for i, name in enumerate(TASKS):
        write_score(tmp_path, name, i / 100)
    tasks = list(TASKS.values())
    whole = summarize(read_scores(tmp_path, tasks), tasks)
    assert whole["overall"] == pytest.approx(np.mean([i / 100 for i in range(78)]), abs=1e-12)
    assert whole["means"]["visdoc"]["mean"] == pytest.approx(np.mean(np.arange(54, 78) / 100))
    assert whole["means"]["I-QA"]["mean"] == pytest.approx(np.mean(np.arange(10, 20) / 100))
    task_path(tmp_path, TASKS["MSVD"], SCORES).unlink()
    part = summarize(read_scores(tmp_path, tasks), tasks)
    assert part["overall"] is None
    assert part["means"]["V-RET"]["mean"] is None
    assert part["means"]["V-RET"]["mean_of_measured"] is not None
    assert part["means"]["image"]["mean"] == whole["means"]["image"]["mean"]


def test_a_damaged_score_file_counts_as_not_measured_and_is_named(tmp_path, caplog) -> None:
    write_score(tmp_path, "MSVD")
    path = task_path(tmp_path, TASKS["MSVD"], SCORES)
    path.write_text(path.read_text(encoding="utf-8")[:40], encoding="utf-8")
    assert read_scores(tmp_path, TASKS.values()) == {}
    assert f"{path} is damaged" in caplog.text


@pytest.mark.parametrize(
    "changes",
    [
        {"label_set": "original", "plan": {"labels": "original"}},
        {"label_set": "original"},
        {"plan": {"model": {"space": "b"}}},
        {"plan": {"think": "never"}},
    ],
)
def test_two_label_sets_models_or_ways_of_thinking_are_never_averaged(changes, tmp_path) -> None:
    write_score(tmp_path, "MSVD")
    write_score(tmp_path, "ViDoSeek-page", **changes)
    tasks = list(TASKS.values())
    with pytest.raises(MixedScoresError, match="MSVD and ViDoSeek-page"):
        write_reports(tmp_path, tasks, {})
    assert not (tmp_path / "summary.json").exists()
    if "plan" in changes:
        plan = {**PLAN, "task": TASKS["ViDoSeek-page"].fingerprint()}
        with pytest.raises(MixedScoresError, match="was made otherwise"):
            read_score(tmp_path, TASKS["ViDoSeek-page"], plan)


def test_the_leaderboard_file_has_the_official_shape(tmp_path: Path) -> None:
    write_score(tmp_path, "ViDoSeek-page", 0.75)
    write_score(tmp_path, "MSVD", 0.25)
    tasks = list(TASKS.values())
    summary = write_reports(tmp_path, tasks, {"model_name": "m", "url": None})
    board = json.loads((tmp_path / "leaderboard.json").read_text(encoding="utf-8"))
    assert set(board) == {"metadata", "metrics"}
    assert list(board["metrics"]) == ["image", "video", "visdoc"]
    assert {k: len(v) for k, v in board["metrics"].items()} == {
        "image": 36,
        "video": 18,
        "visdoc": 24,
    }
    assert set(board["metrics"]["video"]["MSVD"]) == set(OFFICIAL_KEYS)
    assert board["metrics"]["visdoc"]["ViDoSeek-page-fixed"]["ndcg_linear@5"] == 0.75
    assert board["metrics"]["image"]["OK-VQA"] == "FILE_N/A"
    assert board["metadata"]["label_set"] == summary["label_set"] == "page-fixed"
    assert board["metadata"]["model_name"] == "m"
    text = (tmp_path / "scores.md").read_text(encoding="utf-8")
    assert "| MSVD | hit@1 | 25.0 | 25 | 3.0 |" in text
    old = leaderboard_metrics(
        {"ViDoSeek-page": {**board["metrics"]["video"]["MSVD"], "label_set": "original"}}, tasks
    )
    assert "ViDoSeek-page" in old["visdoc"]
