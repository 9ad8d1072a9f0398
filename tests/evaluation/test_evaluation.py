"""Evaluation: closed forms of ranking, pools, thoughts and files; knows no reports."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from judged_model import TAUGHT, judged_model
from made_records import picture
from torch import nn

from twn_rl.data.record import Item, Record
from twn_rl.evaluation import (
    ABLATIONS,
    Evaluation,
    EvaluationSettings,
    evaluate,
    merge_evaluations,
)
from twn_rl.evaluation.modes import (
    Thought,
    borrowed_thoughts,
    gold_thoughts,
    truncated_thoughts,
)
from twn_rl.evaluation.results import query_values, summarize
from twn_rl.evaluation.retrieval_pools import CandidateScope, collect_candidates
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.model import DualLoraModel

WORDS = ("camel", "pizza", "zebra", "tree")
QUIET = EvaluationSettings(batch_size=3, max_think_tokens=4, show_progress_bar=False)


class SignGate(nn.Module):
    """The contract of a gate: states (N, D) to probabilities (N,)."""

    def probability(self, states: torch.Tensor) -> torch.Tensor:
        return (states[:, 0] > 0).float()


def make_records() -> list[Record]:
    return [
        Record(
            id=f"q{i}",
            source="demo",
            query=Item(instruction="find the picture", text=f"{WORDS[i % 4]} left", images=()),
            positive=Item(text=WORDS[i % 4]),
            negatives=(Item(text=WORDS[(i + 1) % 4]),),
            metadata={
                "task": "answer" if i < 4 else "other",
                "hops": i % 2 if i < 4 else None,
                "pool": "name",
                "gold_cot": f"{WORDS[i % 4]} above",
            },
        )
        for i in range(6)
    ]


def test_equal_targets_are_one_candidate_and_pools_do_not_mix() -> None:
    records = make_records()
    image_record = Record(
        id="p",
        source="demo",
        query=Item(text="tree"),
        positive=Item(images=(picture(1),)),
        negatives=(Item(images=(picture(1).copy(),)), Item(images=(picture(2),))),
        metadata={"pool": "picture"},
    )
    candidates = collect_candidates([*records, image_record])
    assert len(candidates.items) == len(WORDS) + 2
    assert sorted(candidates.competing(0)) == [0, 1, 2, 3]
    assert sorted(candidates.competing(6)) == [4, 5]
    assert candidates.positive[0] == candidates.positive[4]


def test_further_positives_of_a_query_and_the_query_itself_are_no_rivals() -> None:
    def record(index: int, query: str, positive: str, *negatives: str) -> Record:
        items = tuple(Item(text=text) for text in negatives)
        return Record(f"q{index}", "demo", Item(text=query), Item(text=positive), items)

    records = [
        record(0, "find", "camel"),
        record(1, "find", "pizza", "camel", "row"),
        record(2, "zebra", "tree", "zebra", "pizza"),
        record(3, "tree", "tree", "zebra"),  # its positive is its own content
    ]
    texts: dict[CandidateScope, list[set[str]]] = {
        "pool": [
            {"camel", "row", "tree", "zebra"},
            {"pizza", "row", "tree", "zebra"},
            {"camel", "pizza", "row", "tree"},
            {"camel", "pizza", "row", "tree", "zebra"},
        ],
        "local": [{"camel"}, {"pizza", "row"}, {"tree", "pizza"}, {"tree", "zebra"}],
    }
    for scope, expected in texts.items():
        candidates = collect_candidates(records, scope=scope)
        competing = [candidates.competing(index) for index in range(len(records))]
        found = [{candidates.items[i].text for i in rows} for rows in competing]
        assert found == expected, scope


def test_local_candidates_are_the_own_positive_and_negatives() -> None:
    candidates = collect_candidates(make_records(), scope="local")
    for index, positive in enumerate(candidates.positive):
        first, second = candidates.competing(index)
        assert first == positive != second


def test_shuffled_thoughts_stay_in_the_group_and_foreign_ones_leave_it() -> None:
    records = make_records()
    own = [Thought(content=(i,), text=str(i)) for i in range(6)]
    group = [(r.metadata["task"], r.metadata["hops"]) for r in records]
    shuffled = borrowed_thoughts(records, own, is_same_group=True, seed=1)
    foreign = borrowed_thoughts(records, own, is_same_group=False, seed=1)
    for i in range(6):
        near, far = shuffled[i], foreign[i]
        assert near is not None
        assert far is not None
        assert int(near.text) != i
        assert group[int(near.text)] == group[i]
        assert group[int(far.text)] != group[i]


def test_unusable_thoughts_are_never_lent() -> None:
    records = make_records()[4:]
    own = [Thought(content=(1,), text="fine"), Thought(problem="truncated")]
    assert borrowed_thoughts(records, own, is_same_group=True) == [None, own[0]]


def test_a_truncated_thought_is_the_first_half_of_a_usable_one() -> None:
    own = [
        Thought(content=(1,), text="camel left ; tree"),
        Thought(content=(1,), text="camel"),
        Thought(text="camel left", problem="truncated"),
    ]
    half, *rest = truncated_thoughts(own)
    assert half == Thought("camel left", "camel left")
    assert rest == [None, None]


def test_cosines_tell_whether_vectors_read_their_thoughts(
    make_model: Callable[..., DualLoraModel],
) -> None:
    model, records = make_model(), make_records()
    settings = dataclasses.replace(QUIET, modes=("always", "gold", "never"), max_think_tokens=1)
    metrics = evaluate(model, records, settings).metrics
    # No thought of this model is usable: its own vectors are no-think vectors.
    assert metrics["test/collapse/own_to_never/cosine_mean"] == pytest.approx(1, abs=1e-5)
    assert metrics["test/collapse/own_to_never/cosine_std"] == pytest.approx(0, abs=1e-5)
    with torch.no_grad():
        queries = [record.query for record in records]
        gold = [model.renderer.completion(record.metadata["gold_cot"]) for record in records]
        cosines = (
            model.embed(model.collate(queries)) * model.embed(model.collate(queries, gold))
        ).sum(1)
    assert metrics["test/collapse/own_to_gold/cosine_mean"] == pytest.approx(float(cosines.mean()))


def test_records_without_a_cot_have_no_gold_thought() -> None:
    record = Record(id="a", source="s", query=Item(text="a"), positive=Item(text="b"))
    assert gold_thoughts([record]) == [None]


def test_metrics_of_ranks_have_their_closed_form() -> None:
    base = {"task": "t", "hop": "hop2", "mode": "never", "think_tokens": [3], "problems": [None]}
    metrics = summarize([{**base, "ranks": [rank]} for rank in (1, 2, 4, 4)], split="test")
    assert metrics["test/hop2/never/hit@1"] == pytest.approx(0.25)
    assert metrics["test/all/never/mrr"] == pytest.approx((1 + 0.5 + 0.25 + 0.25) / 4)
    assert metrics["test/t/never/num_queries"] == 4
    assert metrics["test/t/never/hit@1_low"] <= 0.25 <= metrics["test/t/never/hit@1_high"]
    assert query_values({"ranks": [6], "think_tokens": [0], "problems": [None]})["ndcg@5"] == 0


def test_every_mode_runs_and_oracle_is_the_better_of_both(
    make_model: Callable[..., DualLoraModel], tmp_path: Path
) -> None:
    model = make_model().train()
    settings = dataclasses.replace(
        QUIET,
        modes=("never", "always", "oracle", "auto", "random", "sampled", *ABLATIONS),
        num_thoughts=2,
        gate_threshold=0.5,
    )
    records = make_records()
    model.gates["query"] = SignGate()
    result = evaluate(model, records, settings)
    assert model.training
    rank = {
        mode: {row["id"]: row["ranks"] for row in result.queries if row["mode"] == mode}
        for mode in settings.modes
    }
    chance = {r["id"]: r["gate_probability"] for r in result.queries if r["mode"] == "auto"}
    rate = sum(chance.values()) / len(records)
    assert 0 < rate < 1
    assert result.metrics["test/all/auto/think_rate"] == pytest.approx(rate)
    assert result.metrics["test/all/auto/gate_threshold"] == 0.5
    for metric in ("hit@1", "mrr", "think_tokens", "think_rate"):
        never, always, random = (
            result.metrics[f"test/all/{mode}/{metric}"] for mode in ("never", "always", "random")
        )
        assert random == pytest.approx((1 - rate) * never + rate * always)
    for record in records:
        both = rank["never"][record.id][0], rank["always"][record.id][0]
        assert rank["oracle"][record.id][0] == min(both)
        thinks = chance[record.id] > 0.5
        assert rank["auto"][record.id] == rank["always" if thinks else "never"][record.id]
        assert rank["random"][record.id] == list(both)
        seconds = {r["mode"]: r["seconds"] for r in result.queries if r["id"] == record.id}
        if thinks:  # the gate looks at the no-think vector first
            assert seconds["auto"] > seconds["always"]
        else:
            assert seconds["auto"] == seconds["never"]
        assert len(rank["sampled"][record.id]) == 2
    assert {row["hop"] for row in result.queries} == {"hop0", "hop1", None}
    assert all(row["positive"] in result.targets for row in result.queries)
    assert "test/collapse/targets/effective_rank" in result.metrics
    result.save(tmp_path)
    assert Evaluation.load(tmp_path) == result
    assert json.loads((tmp_path / "metrics.json").read_text()) == result.metrics


def test_ranks_agree_with_single_embeddings(make_model: Callable[..., DualLoraModel]) -> None:
    model = make_model()
    records = make_records()
    result = evaluate(model, records, dataclasses.replace(QUIET, modes=("never", "gold")))
    with torch.no_grad():
        targets = torch.cat([model.embed(model.collate([Item(text=word)])) for word in WORDS])
        for row in result.queries:
            record = next(r for r in records if r.id == row["id"])
            cot = record.metadata["gold_cot"] if row["mode"] == "gold" else None
            completion = None if cot is None else model.renderer.completion(cot)
            query = model.embed(model.collate([record.query], [completion]))
            scores = (query @ targets.T)[0]
            positive = scores[WORDS.index(str(record.positive.text))]
            expected = int((scores >= positive - 1e-6).sum())
            assert row["ranks"] == [expected]
            assert (row["nearest"][0] == row["positive"]) == (expected == 1)


def test_averaged_vectors_and_thinking_targets_have_their_closed_form(
    make_model: Callable[..., DualLoraModel],
) -> None:
    model, records = make_model(), make_records()
    # Every thought of this model is malformed, so that no vector can differ from no-think.
    modes = ("never", "sampled", "averaged", "never_to_thinking", "always_to_thinking")
    settings = dataclasses.replace(QUIET, modes=modes, num_thoughts=3, max_think_tokens=1)
    metrics = evaluate(model, records, settings).metrics
    for mode in ("averaged1", "averaged3", "never_to_thinking", "always_to_thinking"):
        assert metrics[f"test/all/{mode}/mrr"] == metrics["test/all/never/mrr"]
    assert metrics["test/all/averaged3/think_tokens"] == 3
    assert metrics["test/all/averaged1/think_tokens"] == 1


def test_a_mean_vector_is_that_of_the_usable_thoughts(
    make_model: Callable[..., DualLoraModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, records = make_model(), make_records()[:2]
    words = ["<think> camel </think>", "<think> never closed", "<think> tree </think>"]
    written = [model.completion_ids(text, add_eos=True) for text in words]
    monkeypatch.setattr(model, "reason", lambda prompts, rows, **_: written * len(rows))
    settings = dataclasses.replace(QUIET, modes=("averaged",), num_thoughts=3)
    rows = evaluate(model, records, settings).queries
    assert [row["mode"] for row in rows] == [f"averaged{n}" for n in (1, 1, 2, 2, 3, 3)]
    with torch.no_grad():
        targets = model.embed(model.collate([Item(text=word) for word in WORDS[:3]]))
        for index, record in enumerate(records):
            own = model.embed(model.collate([record.query] * 2, [words[0], words[2]]))
            for row, query in ((rows[2 + index], own[0]), (rows[4 + index], own.mean(0))):
                scores = targets @ torch.nn.functional.normalize(query, dim=0)
                assert row["ranks"] == [int((scores >= scores[index] - 1e-6).sum())]


def test_auto_without_a_gate_is_refused(make_model: Callable[..., DualLoraModel]) -> None:
    with pytest.raises(ValueError, match=r"without a threshold; .*gate_embed\.py"):
        evaluate(make_model(), make_records(), dataclasses.replace(QUIET, modes=("auto",)))
    settings = dataclasses.replace(QUIET, modes=("auto",), gate_threshold=0.5)
    with pytest.raises(ValueError, match=r"no query gate .*gate_embed\.py"):
        evaluate(make_model(), make_records(), settings)


def test_a_malformed_thought_is_counted_and_embedded_as_no_think(
    make_model: Callable[..., DualLoraModel],
) -> None:
    settings = dataclasses.replace(QUIET, modes=("never", "always"), max_think_tokens=1)
    result = evaluate(make_model(), make_records(), settings)
    assert result.metrics["test/all/always/malformed_ratio"] == 1
    assert result.metrics["test/all/always/mrr"] == result.metrics["test/all/never/mrr"]


def test_a_model_whose_vectors_are_all_equal_scores_nothing(
    make_model: Callable[..., DualLoraModel],
) -> None:
    model = make_model()
    with torch.no_grad():
        for name, parameter in model.backbone.model.named_parameters():
            if name.endswith("text_model.norm.weight"):
                parameter.zero_().view(-1)[0] = 1.0  # one live dimension: vectors are +-e_0
    result = evaluate(model, make_records(), dataclasses.replace(QUIET, modes=("never",)))
    assert result.metrics["test/collapse/targets/effective_rank"] < 1.5
    assert result.metrics["test/all/never/hit@1"] == 0


def test_non_finite_vectors_are_refused(make_model: Callable[..., DualLoraModel]) -> None:
    model = make_model()
    with torch.no_grad():
        model.backbone.model.get_input_embeddings().get_parameter("weight").fill_(float("nan"))
    with pytest.raises(ValueError, match=r"query of record 'q[0-9]': its vector holds NaN"):
        evaluate(model, make_records(), dataclasses.replace(QUIET, modes=("never",)))


def test_bad_settings_are_reported_together_and_missing_parts_by_name(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"modes = .*batch_size = 0"):
        EvaluationSettings(modes=("sometimes",), batch_size=0)
    with pytest.raises(ValueError, match=r"gate_threshold = 1\.5"):
        EvaluationSettings(gate_threshold=1.5)
    with pytest.raises(FileNotFoundError, match=r"metrics\.json"):
        Evaluation.load(tmp_path)


def test_merging_keeps_both_splits() -> None:
    parts = [Evaluation({f"{s}/all/never/mrr": 1.0}, [{"split": s}]) for s in ("test", "ood")]
    merged = merge_evaluations(parts)
    assert set(merged.metrics) == {"test/all/never/mrr", "ood/all/never/mrr"}
    assert [row["split"] for row in merged.queries] == ["test", "ood"]


def test_a_refused_thought_ranks_as_none_and_costs_as_one(
    make_model: Callable[..., DualLoraModel],
) -> None:
    model = judged_model(make_model)
    records = [
        dataclasses.replace(record, query=Item(text=text))
        for record, text in zip(make_records(), TAUGHT, strict=False)
    ]
    modes = ("never", "always", "auto", "auto_better")
    found = evaluate(model, records, dataclasses.replace(QUIET, modes=modes, max_think_tokens=None))
    rows = {mode: [row for row in found.queries if row["mode"] == mode] for mode in modes}
    refused = [row["refused_rate"] for row in rows["auto_better"]]
    assert refused[4] == 0.0, "what is no thought cannot be refused"
    assert sum(refused) == 2.0
    for judged, auto, never in zip(rows["auto_better"], rows["auto"], rows["never"], strict=True):
        like = never if judged["refused_rate"] else auto
        assert (judged["ranks"], judged["nearest"]) == (like["ranks"], like["nearest"])
        paid = ("think_tokens", "think_rate", "seconds", "cot", "gate_probability", "problems")
        assert [judged[name] for name in paid] == [auto[name] for name in paid]
    assert found.metrics["test/all/auto_better/refused_rate"] == 0.4
    # What is served is what is measured.
    served = ThinkingEmbedder(model).encode_query(
        [record.query for record in records], keep="better", return_details=True
    )
    assert [problems == ["implausible"] for problems in served.problems] == [
        r == 1 for r in refused
    ]

    # Somebody who does not think is not judged, and a gate without judge cannot be asked.
    nobody = dataclasses.replace(QUIET, modes=modes, max_think_tokens=None, gate_threshold=1.0)
    rows = evaluate(model, records, nobody).queries
    assert {row["refused_rate"] for row in rows if row["mode"] == "auto_better"} == {0.0}
    gate = model.gates["query"]
    assert isinstance(gate, Gate)
    gate.judge = None
    with pytest.raises(ValueError, match="without a judge"):
        evaluate(model, records, nobody)
