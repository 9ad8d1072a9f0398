"""Drafts, rows, evaluators, rule and report; every expected number is by hand."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from twn_rl.data.chat import Renderer
from twn_rl.data.record_files import RecordSet, load_records
from twn_rl.demo.dataset import SPLITS, DemoSettings, noisy_teachers, write_demo
from twn_rl.demo.questions import TeacherNoise
from twn_rl.modeling.adapters import active_adapter
from twn_rl.training.thought_selection.choosing import (
    SelectionRule,
    choose,
    report_text,
    selection_report,
)
from twn_rl.training.thought_selection.drafts import (
    Draft,
    RecordRows,
    SelectionError,
    collect_drafts,
    merge_drafts,
)
from twn_rl.training.thought_selection.worth import (
    MarginEvaluator,
    Match,
    YesNoEvaluator,
    answer_ids,
    judge,
    question_item,
)
from twn_rl.training.thought_selection.writers import AdapterWriter, ListedDrafts, read_draft_file


def scored(*worths: float | str) -> list[dict[str, Any]]:
    """Return drafts a, b, c ... with these worths, or these problems."""
    return [
        {"cot": chr(97 + n), "source": "s", "problem": w if isinstance(w, str) else None}
        | ({} if isinstance(w, str) else {"worth": w, "with_cot": w - 0.5, "without": -0.5})
        for n, w in enumerate(worths)
    ]


# The rule


def test_the_best_worth_above_the_threshold_is_chosen_and_every_other_fate_is_named() -> None:
    rows = scored(0.1, "truncated", 0.3, -0.2, "no_open", "timeout", "too_long")
    choice = choose("r", rows, SelectionRule(threshold=0.0))
    assert choice.chosen == [2]
    assert choice.fates == [
        "beaten",
        "truncated",
        "selected",
        "below_threshold",
        "malformed",
        "unanswered",
        "truncated",
    ]
    assert choose("r", rows, SelectionRule(threshold=0.3)).chosen == [None], "above, not at"


def test_a_copy_of_the_chosen_text_shares_its_fate() -> None:
    rows = scored(0.1, 0.3, 0.3)
    rows[2]["cot"] = rows[1]["cot"]
    assert choose("r", rows, SelectionRule()).fates == ["beaten", "selected", "selected"]


def test_a_match_that_the_thought_does_not_win_can_be_refused() -> None:
    rows = scored(0.2, 0.4)  # matches with the thought: -0.3 and -0.1
    assert choose("r", rows, SelectionRule()).chosen == [1]
    assert choose("r", rows, SelectionRule(min_match=-0.2)).chosen == [1]
    assert choose("r", rows, SelectionRule(min_match=0.0)).fates == ["below_threshold"] * 2


def test_sampling_follows_the_softmax_of_worth_among_those_that_pass() -> None:
    rows = scored(0.0, 0.1, -1.0)
    rule = SelectionRule(rule="sample", threshold=-0.5, temperature=0.1)
    drawn = Counter(choose(f"r{n}", rows, rule).chosen[0] for n in range(2000))
    assert set(drawn) == {0, 1}
    e = 2.718281828
    assert drawn[1] / 2000 == pytest.approx(e / (1 + e), abs=0.04)
    assert choose("r7", rows, rule) == choose("r7", rows, rule)


def test_all_takes_drafts_in_turn_and_random_one_a_record() -> None:
    rows = [
        {"cot": cot, "problem": problem}  # without a worth
        for cot, problem in ((" ", "empty"), ("b", None), ("c", None), ("d", None))
    ]
    every = choose("r", rows, SelectionRule(rule="all", copies=4))
    assert every.chosen == [1, 2, 3, 1]
    drawn = [choose(f"r{n}", rows, SelectionRule(rule="random", copies=3)) for n in range(200)]
    assert all(len(set(choice.chosen)) == 1 for choice in drawn)
    assert {choice.chosen[0] for choice in drawn} == {1, 2, 3}
    assert set(drawn[0].fates) == {"malformed", "selected", "not_drawn"}


def test_settings_that_cannot_work_are_named_together() -> None:
    with pytest.raises(ValueError, match=r"rule = 'x'.*temperature = 0.*copies = 0"):
        SelectionRule(rule="x", temperature=0, copies=0)


def test_the_report_counts_fates_and_measures_the_rejection_of_wrong_thoughts(
    records: RecordSet,
) -> None:
    two = [replace(r, metadata={**r.metadata, "gold_cot": "a"}) for r in list(records)[:2]]
    rows = [
        {"id": "r0", "drafts": scored(0.3, 0.1, -0.1)},  # a right and kept, b, c wrong
        {"id": "r1", "drafts": scored(-0.1, 0.2, "junk")},  # a right and lost, b wrong and kept
    ]
    choices = [choose(row["id"], row["drafts"], SelectionRule()) for row in rows]
    report = selection_report(two, rows, choices)
    assert report["fates"] == {
        "selected": 2,
        "beaten": 1,
        "below_threshold": 2,
        "unanswered": 1,
    }
    assert (report["records"], report["direct_only"], report["drafts"]) == (2, 0, 6)
    assert report["problems"] == {"junk": 1}
    noise = report["noise"]["all"]
    assert (noise["right"], noise["wrong"]) == (2, 4)
    assert noise["recall"] == 3 / 4
    assert noise["precision"] == 3 / 4
    assert noise["right_kept"] == 1 / 2
    assert noise["recall_at_threshold"] == 2 / 4
    assert noise["right_kept_at_threshold"] == 1 / 2
    assert {"find", "hop0", "hop1"} <= set(report["noise"])
    assert "| all | 2 | 4 | 75.0 | 75.0 | 50.0 | 50.0 | 50.0 |" in report_text(report)


def test_without_gold_thoughts_nothing_is_said_about_wrong_ones(records: RecordSet) -> None:
    rows = [{"id": records[0].id, "drafts": scored(0.3)}]
    choices = [choose("r0", rows[0]["drafts"], SelectionRule())]
    assert "noise" not in selection_report([records[0]], rows, choices)


# Files of drafts


def write_lines(path: Path, *rows: Any) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_a_file_gives_drafts_by_record_and_drops_duplicates(tmp_path: Path) -> None:
    one, two = {"id": "r1", "cot": "one"}, {"id": "r1", "cot": "two", "source": "gpt"}
    path = write_lines(tmp_path / "mine.jsonl", one, two, one, {"id": "r0", "cot": " "})
    cots, skipped = read_draft_file(path, ["r0", "r1", "r2"])
    assert cots == {"r1": [("mine", "one"), ("gpt", "two")], "r0": [("mine", " ")]}
    assert skipped == {"duplicate": 1}


def test_an_empty_thought_is_a_draft_with_a_problem(records: RecordSet) -> None:
    listed = ListedDrafts("f", {"r0": [("f", " "), ("f", "ok"), ("f", "</think>")]}, Renderer())
    first, second = listed.write(records[:2])
    assert [c.problem for c in first] == ["empty", None, "marker"]
    assert second == []


def test_ids_that_are_no_records_are_refused_or_counted(tmp_path: Path) -> None:
    stranger, known = {"id": "x9", "cot": "a"}, {"id": "r0", "cot": "b"}
    path = write_lines(tmp_path / "cots.jsonl", stranger, known)
    with pytest.raises(SelectionError, match=r"cots.jsonl.*no record: ids \['x9'\].*skip"):
        read_draft_file(path, ["r0"])
    cots, skipped = read_draft_file(path, ["r0"], on_bad_row="skip")
    assert (cots, skipped) == ({"r0": [("cots", "b")]}, {"unknown_id": 1})
    with pytest.raises(SelectionError, match="about no record"):
        read_draft_file(write_lines(tmp_path / "o.jsonl", stranger), ["r0"], on_bad_row="skip")


@pytest.mark.parametrize("bad", ["{", "[1]", {"id": "r0"}, {"id": 3, "cot": "a"}])
def test_a_damaged_row_is_named_or_counted(tmp_path: Path, bad: Any) -> None:
    path = write_lines(tmp_path / "cots.jsonl", {"id": "r0", "cot": "b"}, bad)
    with pytest.raises(SelectionError, match="line 2"):
        read_draft_file(path, ["r0"])
    assert read_draft_file(path, ["r0"], on_bad_row="skip")[1] == {"bad_row": 1}


# Shards


def test_a_killed_pass_makes_only_what_is_missing(tmp_path: Path) -> None:
    ids, made = [f"r{n}" for n in range(5)], []

    def make(positions: Sequence[int]) -> list[dict[str, Any]]:
        made.extend(positions)
        if len(made) == 4:
            raise KeyboardInterrupt
        return [{"value": n} for n in positions]

    shards = RecordRows(tmp_path / "s", ids, {"a": 1}, shard_size=2)
    with pytest.raises(KeyboardInterrupt):
        shards.fill(make, show_progress_bar=False)
    with pytest.raises(SelectionError, match="missing or damaged"):
        list(shards)
    shards.fill(make, show_progress_bar=False)
    assert made == [0, 1, 2, 3, 2, 3, 4]
    assert list(shards) == [{"id": f"r{n}", "value": n} for n in range(5)]
    # A shard that was cut short is made again, and rows that failed are, if asked for.
    path = tmp_path / "s" / "000001.jsonl"
    path.write_text(path.read_text(encoding="utf-8")[:-4], encoding="utf-8")
    made.clear()
    shards.fill(make, is_redone=lambda row: row["value"] == 0, show_progress_bar=False)
    assert made == [0, 2, 3]


def test_rows_of_other_records_or_settings_are_never_mixed_in(tmp_path: Path) -> None:
    def fill(ids: list[str], plan: dict[str, Any], **options: Any) -> list[dict[str, Any]]:
        shards = RecordRows(tmp_path / "s", ids, plan, shard_size=2)
        options |= {"show_progress_bar": False}
        shards.fill(lambda positions: [{"plan": plan} for _ in positions], **options)
        return list(shards)

    fill(["a", "b", "c"], {"seed": 1})
    with pytest.raises(SelectionError, match=r"seed = 1, now 2.*--rebuild"):
        fill(["a", "b", "c"], {"seed": 2})
    with pytest.raises(SelectionError, match="records = "):
        fill(["a", "b", "d"], {"seed": 1})
    assert [row["plan"] for row in fill(["a"], {"seed": 2}, rebuild=True)] == [{"seed": 2}]
    assert not (tmp_path / "s" / "000001.jsonl").exists()


# Sources


def test_the_adapter_writes_the_same_drafts_whatever_the_batch(
    make_model, records: RecordSet
) -> None:
    model = make_model()

    def written(batch_size: int, seed: int = 0) -> list[list[Draft]]:
        writer = AdapterWriter(
            model,
            "own",
            temperatures=[0.0, 1.0],
            num_thoughts=2,
            batch_size=batch_size,
            seed=seed,
        )
        return writer.write(records[:3])

    whole = written(3)
    assert [[c.source for c in row] for row in whole] == [["own@0", "own@1", "own@1"]] * 3
    assert whole == written(2)
    assert [row[0] for row in whole] == [row[0] for row in written(3, seed=1)]
    assert whole != written(3, seed=1)


def test_noisy_teachers_speak_about_the_records_of_the_split(tmp_path: Path) -> None:
    sizes = {f"num_{split}": 12 for split in SPLITS}
    settings = DemoSettings(noise=TeacherNoise(0, 0), **sizes)
    for split, path in write_demo(tmp_path / "data", settings).items():
        gold = {r.id: [r.metadata["gold_cot"]] * 2 for r in load_records(path)}
        assert noisy_teachers(split, settings, 2) == gold


def test_noisy_teachers_err_independently_and_as_often_as_asked() -> None:
    settings = DemoSettings(num_train=3000, noise=TeacherNoise(0.1, 0.55))
    gold = noisy_teachers("train", replace(settings, noise=TeacherNoise(0, 0)), 1)
    cots = noisy_teachers("train", settings, 4)
    wrong = Counter(sum(cot != gold[key][0] for cot in row) for key, row in cots.items())
    # 30 % of the 35 % of questions with hops.
    share = sum(n * count for n, count in wrong.items()) / 4 / 3000
    assert share == pytest.approx(0.105, abs=0.015)
    assert set(wrong) == {0, 1, 2, 3, 4}


# Evaluators


def test_the_margin_is_that_of_vectors_embedded_by_hand(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model, position, cot = make_model(), 3, "pizza below"
    evaluator = MarginEvaluator(model, records, tmp_path / "bank", num_negatives=2)
    [match] = evaluator.matches([(position, cot)])
    record = records[position]
    with torch.no_grad():
        targets = {
            item.content_key(): model.embed(model.collate([item]))[0]
            for r in records
            for item in (r.positive, *r.negatives)
        }
        completion = model.renderer.completion(cot)
        vectors = [
            model.embed(model.collate([record.query], [text]))[0] for text in (completion, None)
        ]
    margins = []
    for vector in vectors:
        key = record.positive.content_key()
        others = sorted(float(vector @ t) for k, t in targets.items() if k != key)
        margins.append(float(vector @ targets[key]) - sum(others[-2:]) / 2)
    assert match is not None
    assert match.with_cot == pytest.approx(margins[0], abs=1e-4)
    assert match.without == pytest.approx(margins[1], abs=1e-4)
    assert match.worth == pytest.approx(margins[0] - margins[1], abs=1e-4)


@pytest.fixture
def answering(make_model, monkeypatch: pytest.MonkeyPatch):
    """A model whose tokenizer can say yes and no: two words of the tests stand in."""
    model = make_model()
    words = {"yes": "one", "no": "two"}
    monkeypatch.setattr(
        "twn_rl.training.thought_selection.worth.answer_ids",
        lambda tokenizer, word: answer_ids(tokenizer, words[word]),
    )
    return model


def test_yes_minus_no_is_asked_of_the_bare_backbone_with_negatives_as_control(
    answering, records: RecordSet
) -> None:
    model, record, cot = answering, records[3], "pizza below"
    flags = [p.requires_grad for p in model.peft_model.parameters()]
    before = active_adapter(model.peft_model)
    [match] = YesNoEvaluator(model, records, num_negatives=2).matches([(3, cot)])
    assert active_adapter(model.peft_model) == before
    assert [p.requires_grad for p in model.peft_model.parameters()] == flags
    yes, no = (answer_ids(model.tokenizer, word) for word in ("one", "two"))
    logits = {}
    with torch.no_grad(), model.peft_model.disable_adapter():
        for target in (record.positive, *record.negatives[:2]):
            for text in (cot, None):
                batch = model.collate([question_item(record.query, target, text)])
                last = model.backbone.model(**batch).logits[0, -1]
                logits[target, text] = float(last[yes].logsumexp(0) - last[no].logsumexp(0))
    negatives = record.negatives[:2]
    expected = [
        logits[record.positive, text] - sum(logits[n, text] for n in negatives) / 2
        for text in (cot, None)
    ]
    assert match is not None
    assert [match.with_cot, match.without] == pytest.approx(expected, abs=1e-4)


def test_records_without_negatives_are_controlled_by_other_positives_of_their_pool(
    answering, records: RecordSet
) -> None:
    bare = [replace(record, negatives=()) for record in records]
    evaluator = YesNoEvaluator(answering, bare, num_negatives=1)
    for position, record in enumerate(bare):
        positive, *negatives = evaluator._targets(position)
        assert positive == record.positive
        assert len(negatives) == 1
        assert negatives[0] in [other.positive for other in bare]
        assert negatives[0] != positive


def test_the_control_of_yes_and_no_is_never_a_false_negative(answering, records: RecordSet) -> None:
    first, second, third, *_ = records
    pool = [
        replace(first, negatives=(second.positive, first.query, third.positive)),
        replace(second, query=first.query, negatives=()),
        replace(third, negatives=(third.positive,)),
    ]
    evaluator = YesNoEvaluator(answering, pool, num_negatives=2)
    assert evaluator._targets(0) == [first.positive, third.positive]
    assert evaluator._targets(1) == [second.positive, third.positive]
    assert evaluator._targets(2)[0] == third.positive
    assert third.positive not in evaluator._targets(2)[1:]
    assert evaluator.plan["false_negatives"]
    assert "false_negatives" not in YesNoEvaluator(answering, records).plan


def test_without_negatives_a_thought_is_not_judged(
    answering, records: RecordSet, tmp_path: Path
) -> None:
    # Two positives of one query alone in their pool, and a record that has a rival.
    alone = [
        replace(r, query=records[0].query, negatives=(), metadata={"pool": "alone"})
        for r in records[:2]
    ]
    pool = [*alone, *records[2:4]]
    pairs = [(0, "pizza below"), (2, "pizza below")]
    margin = MarginEvaluator(answering, pool, tmp_path / "bank")
    for evaluator in (margin, YesNoEvaluator(answering, pool)):
        unknown, known = evaluator.matches(pairs)
        assert unknown is None
        assert known is not None
        assert evaluator.plan["false_negatives"]
    [uncontrolled] = YesNoEvaluator(answering, pool, num_negatives=0).matches(pairs[:1])
    assert uncontrolled is not None

    rows = [{"id": r.id, "drafts": []} for r in pool]
    for position, cot in pairs:
        rows[position]["drafts"] = [asdict(Draft(cot, "s"))]
    shards = judge(rows, margin, answering, tmp_path / "scores", show_progress_bar=False)
    found = [row["drafts"] for row in shards]
    assert [c["problem"] for row in found for c in row] == ["no_negatives", None]
    assert "worth" not in found[0][0]
    assert choose(pool[0].id, found[0], SelectionRule()).fates == ["unjudged"]


def test_unlabelled_positives_can_be_left_out_of_the_margin(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model = make_model()
    plain = MarginEvaluator(model, records, tmp_path / "bank")
    strict = MarginEvaluator(model, records, tmp_path / "bank", max_negative_similarity=-0.999)
    assert "max_negative_similarity" not in plain.plan
    assert "false_negatives" not in plain.plan
    assert {**plain.plan, "max_negative_similarity": -0.999} == strict.plan
    assert strict.matches([(3, "pizza below")]) == [None]


def test_a_tokenizer_without_yes_is_refused(make_model, records: RecordSet) -> None:
    with pytest.raises(SelectionError, match=r"'yes'.*--evaluator margin"):
        YesNoEvaluator(make_model(), records)


# Judging


class Lengths:
    """Worth is the number of words; every batch is remembered."""

    def __init__(self) -> None:
        self.plan: dict[str, Any] = {"evaluator": "lengths"}
        self.seen: list[tuple[int, str]] = []

    def matches(self, pairs: Sequence[tuple[int, str]]) -> list[Match | None]:
        self.seen.extend(pairs)
        return [Match(float(len(cot.split())), 1.0) for _, cot in pairs]


def test_equal_thoughts_are_scored_once_and_what_is_too_long_is_not(
    make_model, records: RecordSet, tmp_path: Path
) -> None:
    model, ids = make_model(max_think_tokens=8), [record.id for record in records]
    cots = {
        "r0": [("a", "camel left"), ("b", "camel left"), ("b", " ")],
        "r1": [("a", "camel " * 9)],
    }
    listed = ListedDrafts("f", cots, model.renderer)
    collected = collect_drafts(listed, records, ids, tmp_path, show_progress_bar=False)
    rows, evaluator = merge_drafts([collected]), Lengths()
    options = {"batch_size": 1, "show_progress_bar": False}
    found = list(judge(rows, evaluator, model, tmp_path / "scores", **options))
    assert evaluator.seen == [(0, "camel left")]
    assert [c.get("worth") for c in found[0]["drafts"]] == [1.0, 1.0, None]
    assert [c["problem"] for c in found[1]["drafts"]] == ["too_long"]
    assert found[2] == {"id": "r2", "drafts": []}
    list(judge(rows, evaluator, model, tmp_path / "scores", **options))
    assert len(evaluator.seen) == 1, "finished scores are kept"
    rows[3]["drafts"] = [asdict(Draft("tree", "late"))]
    with pytest.raises(SelectionError, match="drafts = "):
        judge(rows, evaluator, model, tmp_path / "scores", **options)


def test_no_source_of_drafts_is_an_error() -> None:
    with pytest.raises(SelectionError, match="--own_temperatures"):
        merge_drafts([])
