"""The HTML report: self-contained, escaped, well formed; knows no models."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from browser import browser, cut_off
from made_records import picture

from twn_rl.evaluation.modes import choose
from twn_rl.evaluation.report.charts import draw_curves, read_curves
from twn_rl.evaluation.report.gallery import gallery
from twn_rl.evaluation.report.headline import headline
from twn_rl.evaluation.report.page import write_report
from twn_rl.evaluation.results import Evaluation, summarize
from twn_rl.evaluation.routing import CHOICES

VOID = {"meta", "img", "br", "link", "input", "hr"}
EVIL = "<script>alert('cot')</script> & left"
MODES = ("never", "always", "oracle", "gold", "shuffled", "foreign", "empty")


class Checker(HTMLParser):
    """Collects tags that do not nest, sources of pictures, and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.unbalanced: list[str] = []
        self.links: list[str] = []
        self.alts: list[str] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.tags.add(tag)
        self.links += [str(values[k]) for k in ("src", "href", "xlink:href") if k in values]
        if tag == "img":
            self.alts.append(str(values.get("alt") or ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.unbalanced.append(tag)


def make_evaluation(folder: Path, *, rank: int) -> Evaluation:
    scene, tile = folder / "scene.png", folder / "camel.png"
    picture(1).save(scene)
    picture(2).save(tile)
    rows = [
        {
            "split": "test",
            "id": f"q{i}",
            "task": "answer",
            "hop": "hop2",
            "mode": mode,
            "ranks": [1 if i else rank],
            "cot": "" if mode == "never" else EVIL,
            "think_tokens": [0 if mode == "never" else 7],
            "problems": [None],
            "nearest": ["k1", "k2"],
            "positive": "k1",
            "query": {"instruction": "find", "text": "a < b", "images": [str(scene)]},
        }
        for mode in MODES
        for i in range(3)
    ]
    targets = {
        "k1": {"instruction": None, "text": None, "images": [str(tile)]},
        "k2": {"instruction": None, "text": "pizza <b>", "images": []},
    }
    return Evaluation(summarize(rows, split="test"), rows, targets)


@pytest.fixture
def report(tmp_path: Path) -> str:
    log = tmp_path / "metrics.jsonl"
    lines = [
        {
            "step": s,
            "loss_think": 1 / s,
            "reward": s,
            "reward_std": "nan" if s == 2 else 0.1,
            "kl": 0.0,
        }
        for s in range(1, 6)
    ]
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = write_report(
        tmp_path / "out" / "report.html",
        make_evaluation(tmp_path, rank=1),
        before=make_evaluation(tmp_path, rank=3),
        curves={"GRPO": log},
        title="A & B",
        facts={"model": "outputs/<b>", "date": "today"},
        settings="seed: 0 # & more",
    )
    return path.read_text(encoding="utf-8")


def test_the_report_is_well_formed_and_every_picture_has_words(report: str) -> None:
    checker = Checker()
    checker.feed(report)
    checker.close()
    assert not checker.open
    assert not checker.unbalanced
    assert checker.alts
    assert all(checker.alts)


def test_the_report_needs_nothing_from_outside(report: str) -> None:
    checker = Checker()
    checker.feed(report)
    outside = [link for link in checker.links if not link.startswith(("data:image/", "#"))]
    assert not outside
    assert not re.search(r"url\(\s*['\"]?(?!#)|@import", report)
    # Names of the SVG vocabulary are no addresses that a browser fetches.
    addresses = set(re.findall(r"https?://[^\"' >]+", report))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_texts_are_escaped_and_no_script_is_in_the_page(report: str) -> None:
    checker = Checker()
    checker.feed(report)
    assert "script" not in checker.tags
    assert "&lt;script&gt;alert" in report
    assert "pizza &lt;b&gt;" in report
    assert "<title>A &amp; B</title>" in report


def test_both_evaluations_charts_and_the_right_target_are_shown(report: str) -> None:
    assert "own thoughts, earlier model" in report
    assert "own thoughts, this model" in report
    assert 'class="picture positive"' in report
    assert "rank 3" in report
    assert report.count("<svg") == 5  # ablation, loss, reward, reward_std, kl
    assert "prefers-color-scheme: dark" in report


def test_the_page_leads_with_one_sentence_three_numbers_and_the_cards(report: str) -> None:
    places = [
        report.index(mark)
        for mark in ("<h1>", 'class="numbers"', 'class="facts"', 'class="leads"', "<svg", "<table>")
    ]
    assert places == sorted(places)
    assert report.count('class="card lead"') == 3
    heading = re.sub("<[^>]+>", "", report.split("<h1>")[1].split("</h1>")[0])
    assert heading == (
        "Thinking makes no clear difference to the share of test queries whose right target comes "
        "first: from 100.0 % to 100.0 % (66.7 % before reinforcement learning)."
    )
    assert "of 3 queries reinforcement learning mended 1 and broke 0" in report.replace("Of", "of")
    assert "<dd>outputs/&lt;b&gt;</dd>" in report
    assert "seed: 0 # &amp; more" in report
    folded = report.split("<details")
    assert all("<table>" not in part.split("</details>")[-1] for part in folded[:1])
    assert 'title="Share of queries whose nearest target is the right one' in report


@pytest.mark.parametrize(
    ("never", "always", "words"),
    [(9, 1, "lifts the share"), (1, 9, "lowers the share"), (1, 1, "makes no clear difference")],
)
def test_the_sentence_says_what_the_intervals_say(
    tmp_path: Path, never: int, always: int, words: str
) -> None:
    evaluation = make_gated_evaluation(tmp_path)
    for row in evaluation.queries:
        row["ranks"] = [never if row["mode"] == "never" else always] * len(row["ranks"])
    after = Evaluation(summarize(evaluation.queries, split="test"), evaluation.queries, {})
    found = headline(after, None)
    assert words in found.sentence
    assert "The gate decides who thinks" in found.sentence
    labels = [number.label for number in found.numbers]
    assert labels == ["hit@1, no thinking", "hit@1, gate decides", "think tokens a query"]
    assert headline(Evaluation(), None).numbers == []


def test_the_last_leading_card_broke_if_any_did(tmp_path: Path) -> None:
    made, rows = make_evaluation(tmp_path, rank=1), []
    first = next(row for row in made.queries if row["mode"] == "never")
    for index in range(9):
        never = {**first, "id": f"q{index}", "ranks": [1 if index == 4 else 2]}
        rows += [never, {**never, "mode": "always", "ranks": [5 if index == 4 else 1]}]
    found = gallery(Evaluation({}, rows, made.targets), None, 9, num_leading=3)
    assert (found.queries, found.mended, found.broken) == (9, 8, 1)
    assert [example["id"] for example in found.examples[:3]] == ["q0", "q1", "q4"]
    assert len(found.examples) == 9


@pytest.mark.slow
@pytest.mark.parametrize(("width", "height"), [(1280, 900), (400, 800)])
def test_nothing_is_cut_off_and_the_result_is_in_the_first_window(
    report: str, tmp_path: Path, width: int, height: int
) -> None:
    page = tmp_path / "out" / "report.html"
    with browser(tmp_path, width, height) as driver:
        driver.get(page.as_uri())
        assert driver.execute_script("return innerWidth") == width
        for kind in ("h1", ".numbers"):
            box = driver.execute_script(
                f"const b = document.querySelector('{kind}').getBoundingClientRect();"
                "return [b.top, b.bottom, b.right]"
            )
            assert 0 <= box[0] < box[1] < height
            assert box[2] <= width
        driver.execute_script("document.querySelectorAll('details').forEach(e => e.open = true)")
        assert cut_off(driver) == []
        assert driver.execute_script("return document.documentElement.scrollWidth") == width
        assert not driver.get_log("browser")


def test_a_report_of_one_evaluation_without_curves_still_renders(tmp_path: Path) -> None:
    evaluation = make_evaluation(tmp_path, rank=1)
    evaluation.save(tmp_path / "eval")
    text = write_report(tmp_path / "r.html", tmp_path / "eval").read_text(encoding="utf-8")
    assert "earlier model" not in text


def make_gated_evaluation(folder: Path, mode: str = "auto") -> Evaluation:
    """Eight queries: a thought helps q0 to q3; decided is to think about q0, q1, q4 and q5."""
    plain = make_evaluation(folder, rank=1)
    first = next(row for row in plain.queries if row["mode"] == "always")
    rows: list[dict[str, Any]] = []
    for index in range(8):
        never = {
            **first,
            "id": f"g{index}",
            "task": EVIL if index % 2 else "answer",
            "mode": "never",
            "ranks": [2 if index < 4 else 1],
            "cot": "",
            "think_tokens": [0],
            "think_rate": 0.0,
            "seconds": 0.01,
        }
        always = {**first, "id": f"g{index}", "task": never["task"], "ranks": [1]}
        always |= {"think_rate": 1.0, "seconds": 0.03}
        thinks, helps = index in (0, 1, 4, 5), index < 4
        for name, share in {mode: thinks, "random": 0.5, "oracle": helps}.items():
            row = choose(name, never, always, share, probability=0.9 if thinks else 0.2)
            assert row is not None
            rows.append(row)
        rows += [never, always]
    return Evaluation(summarize(rows, split="test"), rows, plain.targets)


@pytest.mark.parametrize(("mode", "decider"), [("auto", "gate"), ("policy", "policy")])
def test_who_decides_gets_a_curve_a_table_and_its_right_and_wrong_choices(
    tmp_path: Path, mode: str, decider: str
) -> None:
    evaluation = make_gated_evaluation(tmp_path, mode)
    path = write_report(tmp_path / "r.html", evaluation, num_examples=0, num_routing_examples=1)
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(Does .*)</h2>", text) == [f"Does the {decider} think when it helps?"]
    checker = Checker()
    checker.feed(text)
    assert not checker.open
    assert not checker.unbalanced
    assert "script" not in checker.tags
    assert all(checker.alts)
    words = (
        "thinks about 50 % of 8 queries, writes 50 % of the tokens of always thinking (within 0.5 "
        "points of it, the best threshold of these queries writes 100 %), reaches"
    )
    plain = re.sub("<[^>]+>", "", text)
    assert words in plain
    assert "hit@1 of 0.75, 25.0 points below always thinking, and covers 0 % of the way" in plain
    assert text.count("<svg") == 1
    alt = re.search(r'aria-label="Quality for thinking: test,([^"]*)"', text)
    assert alt is not None
    for point in (
        "no thinking 0.500 at 0.0",
        "own thoughts 1.000 at 7.0",
        f"{decider} decides 0.750 at 3.5",
        "chance decides 0.750 at 3.5",
        "oracle 1.000 at 3.5",
    ):
        assert point in alt[1]
    assert "50 % think</small><small>3.5 tokens, 20.0 ms</small>" in text
    for choice in CHOICES.values():
        assert f"It {choice}: 2 queries, 25 %" in text
    assert text.count("<article") == len(CHOICES)
    assert plain.count(f"own thoughts, the {decider}&#39;s choice") == 2
    assert plain.count(f"no thinking, the {decider}&#39;s choice") == 2
    assert f"the {decider}: 0.90 for a thought" in text


def test_a_choice_that_never_happened_and_rows_without_seconds_still_render(tmp_path: Path) -> None:
    gated = make_gated_evaluation(tmp_path)
    rows = [
        {key: value for key, value in row.items() if key != "seconds"}
        for row in gated.queries
        if row["id"] in ("g0", "g6") and row["mode"] in ("never", "always", "auto")
    ]
    evaluation = Evaluation(summarize(rows, split="test"), rows, gated.targets)
    text = write_report(tmp_path / "r.html", evaluation).read_text(encoding="utf-8")
    assert f"It {CHOICES[True, False]}: 0 queries, 0 %" in text
    assert "chance decides</th>" not in text
    assert not re.search(r"[0-9.]+ ms", text)


def test_without_a_gate_there_is_no_section_on_it(report: str) -> None:
    assert "think when it helps?" not in report


def test_curves_skip_values_that_are_not_finite_and_name_a_broken_line(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": "nan"}\n{"step": 2, "loss": 0.5}\n')
    assert read_curves(log) == {"step": [(1.0, 1.0), (2.0, 2.0)], "loss": [(2.0, 0.5)]}
    assert not draw_curves(read_curves(log))
    log.write_text("broken\n")
    with pytest.raises(ValueError, match="row 1"):
        read_curves(log)
