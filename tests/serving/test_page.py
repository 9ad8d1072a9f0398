"""The page of `twn-rl ui` in a browser: a real model is asked, and its texts stay texts."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from browser import browser, cut_off
from serving_process import TEXTS, Server, data_uri, picture_bytes, save_thinking_model

from twn_rl.cli import main
from twn_rl.evaluation.gate_threshold import gate_curve
from twn_rl.evaluation.threshold_files import write_curves
from twn_rl.serving.page import read_curve, read_samples

NONE = "\N{EN DASH}"
HOSTILE = "<img src=x onerror=document.title='owned'><b>bold</b>"
CURVE = gate_curve([0.9, 0.6, 0.3], [0.0, 0.0, 1.0], [1.0, 1.0, 0.0], [10, 20, 30])


def write_curve(folder: Path) -> None:
    chosen = CURVE.points[1]
    write_curves(folder, "curve", {"query": (CURVE, chosen)}, key="side", metric="hit@1")
    (folder / "metrics.json").write_text('{"metric": "hit@1"}')


def write_records(folder: Path) -> Path:
    """Write five records: scenes, texts, a hostile one, and one whose answer repeats."""
    (folder / "scene.png").write_bytes(picture_bytes())
    (folder / "answer.png").write_bytes(picture_bytes(2))
    rows = [
        ({"text": TEXTS[2], "images": ["scene.png"]}, {"text": "camel"}),
        ({"text": TEXTS[3]}, {"images": ["answer.png"]}),
        ({"text": HOSTILE}, {"text": HOSTILE}),
        ({"text": TEXTS[7]}, {"text": "camel"}),
        ({"text": TEXTS[5]}, {"text": "owl north"}),
    ]
    lines = [
        json.dumps({"id": str(n), "source": "test", "query": query, "positive": positive}) + "\n"
        for n, (query, positive) in enumerate(rows)
    ]
    (folder / "records.jsonl").write_text("".join(lines))
    return folder / "records.jsonl"


def test_samples_name_the_row_where_their_answer_first_is(tmp_path: Path):
    data = write_records(tmp_path)
    made = read_samples(data, data_root=None, limit=None, is_indexed=True)
    assert [sample.target_row for sample in made] == [0, 1, 2, 0, 4]
    assert made[0].query.images == (str(tmp_path / "scene.png"),)
    elsewhere = read_samples(data, data_root=None, limit=2, is_indexed=False)
    assert [sample.target_row for sample in elsewhere] == [None, None]


def test_the_curve_is_the_one_that_was_written_or_a_reason(tmp_path: Path):
    assert "no gate/curve.csv" in str(read_curve(tmp_path / "gate").problem)
    (tmp_path / "gate").mkdir()
    write_curve(tmp_path / "gate")
    found = read_curve(tmp_path / "gate")
    assert (found.metric, found.problem) == ("hit@1", None)
    assert [(p["threshold"], p["quality"]) for p in found.points] == [
        (p.threshold, p.quality) for p in CURVE.points
    ]
    (tmp_path / "gate" / "curve.csv").write_text("side,name\nquery,curve\n")
    assert "cannot be read" in str(read_curve(tmp_path / "gate").problem)


def test_a_page_with_nothing_to_search_or_with_a_key_is_refused(tmp_path: Path, caplog):
    assert main(["ui", "--model", str(tmp_path / "model"), "--port", "0"]) == 2
    assert "nothing to search" in caplog.text
    assert main(["ui", "--model", str(tmp_path), "--port", "0", "--api_key", "secret"]) == 2
    assert "page does not send" in caplog.text


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("page")
    model = save_thinking_model(folder / "model")
    (model / "gate").mkdir()
    write_curve(model / "gate")
    flags = ["--device", "cpu", "--data", str(write_records(folder))]
    started = Server(model, *flags, log=folder / "log", name="ui")
    yield started
    assert started.end() == 0, started.log.read_text()[-2000:]


@pytest.fixture(scope="module", params=[(1280, 900), (400, 800)], ids=["wide", "phone"])
def window(request) -> tuple[int, int]:
    return request.param


@pytest.fixture(scope="module")
def driver(page: Server, window, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    with browser(tmp_path_factory.mktemp("browser"), *window) as opened:
        yield opened


def wait_for(driver: Any, script: str) -> Any:
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(driver, 20, 0.05).until(lambda d: d.execute_script(f"return {script}"))


def opened(driver: Any, page: Server) -> None:
    driver.get(page.url)
    wait_for(driver, "document.querySelectorAll('#samples button').length == 5")


def answer(driver: Any) -> dict[str, Any]:
    """Return what is shown once the question is answered."""
    wait_for(
        driver, "!$('thought').className && ($('with').children.length || !$('problem').hidden)"
    )
    return driver.execute_script(
        "const o = {}; for (const id of ['verdict', 'thought', 'tokens', 'readms', 'thoughtms',"
        "'same', 'problem', 'target', 'curvetext']) o[id] = $(id).textContent;"
        "for (const id of ['with', 'without'])"
        "o[id] = [...$(id).children].map(e => (e.querySelector('div') || {}).textContent || null);"
        "return o"
    )


def expected(page: Server, text: str, threshold: float) -> dict[str, Any]:
    body = {"query": text, "think_threshold": threshold, "top_k": 6, "without_thought": True}
    body["return_thoughts"] = True
    return httpx2.post(f"{page.url}/search", json=body, timeout=60).json()


def set_threshold(driver: Any, value: float) -> None:
    driver.execute_script(
        f"$('threshold').value = {value}; $('threshold').dispatchEvent(new Event('input'))"
    )


def ask(driver: Any, text: str) -> dict[str, Any]:
    box = driver.find_element("id", "question")
    box.clear()
    box.send_keys(text)
    driver.find_element("id", "ask").click()
    return answer(driver)


@pytest.mark.distributed
def test_a_question_is_thought_about_in_sight_and_found_both_ways(driver, page: Server):
    opened(driver, page)
    driver.execute_script(
        "window.seen = new Set(); new MutationObserver(() => seen.add($('thought').textContent))"
        ".observe($('thought'), {childList: true, subtree: true, characterData: true})"
    )
    set_threshold(driver, 0)
    shown, told = ask(driver, TEXTS[3]), expected(page, TEXTS[3], 0)
    assert shown["problem"] == ""
    assert shown["thought"] == told["thought"] != ""
    assert int(shown["tokens"]) == told["think_tokens"] > 1
    assert f"{told['gate_probability']:.3f}" in shown["verdict"]
    assert "it thinks" in shown["verdict"]
    assert shown["with"] == [hit["text"] for hit in told["hits"]]
    assert shown["without"] == [hit["text"] for hit in told["hits_without_thought"]]
    assert float(shown["thoughtms"]) >= float(shown["readms"]) > 0
    pieces = [text for text in driver.execute_script("return [...seen]") if text]
    assert len(pieces) > 1  # it grew
    assert all(told["thought"].strip().startswith(text.strip()) for text in pieces)
    set_threshold(driver, 1)
    assert "does not think" in driver.find_element("id", "verdict").text
    quiet = ask(driver, TEXTS[3])
    assert (quiet["thought"], quiet["tokens"], quiet["thoughtms"]) == ("", "0", NONE)
    assert "did not think" in quiet["same"]
    assert quiet["with"] == quiet["without"] == shown["without"]


@pytest.mark.distributed
def test_the_slider_moves_along_the_curve(driver, page: Server):
    opened(driver, page)
    places = []
    for point in CURVE.points:
        set_threshold(driver, point.threshold or 0)
        text = driver.find_element("id", "curvetext").text
        assert f"{100 * point.think_rate:.1f} % of queries think" in text
        assert f"hit@1 {100 * point.quality:.1f} %" in text
        circle = driver.find_element("css selector", "#chart circle")
        places.append(float(circle.get_attribute("cx")))
    assert places == sorted(set(places))


@pytest.mark.distributed
def test_samples_pictures_and_hostile_texts_are_shown_as_what_they_are(
    driver, page: Server, tmp_path: Path
):
    opened(driver, page)
    buttons = driver.find_elements("css selector", "#samples button")
    buttons[0].click()
    shown = answer(driver)
    assert (shown["problem"], shown["target"]) == ("", "right answer: camel")
    right = driver.find_elements("css selector", "#with li.right")
    assert [each.text.split("\n")[0] for each in right] == ["camel"]
    buttons[2].click()
    assert HOSTILE in answer(driver)["with"]
    (tmp_path / "own.png").write_bytes(picture_bytes(3))
    driver.find_element("id", "file").send_keys(str(tmp_path / "own.png"))
    wait_for(driver, "$('preview').querySelector('img')?.src.startsWith('data:image/png')")
    shown = ask(driver, TEXTS[2])
    assert (shown["problem"], shown["target"], len(shown["with"])) == ("", "", 4)
    loaded = driver.execute_script(
        "return [...document.images].every(e => e.complete && e.naturalWidth)"
    )
    assert loaded
    assert driver.title == "See it think"
    assert driver.find_elements("css selector", "b[id]") == driver.find_elements(
        "css selector", "b"
    )


@pytest.mark.distributed
def test_a_picture_that_is_dragged_onto_the_page_is_asked_about(
    driver, page: Server, tmp_path: Path
):
    opened(driver, page)
    (tmp_path / "own.png").write_bytes(picture_bytes(3))
    box = driver.execute_script("return $('drop').getBoundingClientRect().toJSON()")
    place = {"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] / 2}
    files = {"items": [], "files": [str(tmp_path / "own.png")], "dragOperationsMask": 1}
    over = []
    for kind in ("dragEnter", "dragOver", "drop"):
        driver.execute_cdp_cmd("Input.dispatchDragEvent", {"type": kind, "data": files, **place})
        over.append(driver.execute_script("return $('drop').classList.contains('over')"))
    assert over[1:] == [True, False]
    wait_for(driver, "$('preview').querySelector('img')?.src.startsWith('data:image/png')")
    shown = ask(driver, TEXTS[2])
    uri = data_uri(picture_bytes(3))
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": TEXTS[2]},
    ]
    body = {"messages": [{"role": "user", "content": parts}], "think": "never", "top_k": 6}
    told = httpx2.post(f"{page.url}/search", json=body, timeout=60).json()
    assert shown["problem"] == ""
    assert shown["without"] == [hit["text"] for hit in told["hits"]]


@pytest.mark.distributed
def test_a_single_picture_that_is_gone_spoils_nothing_else(driver, page: Server):
    scene = page.log.parent / "scene.png"
    content = scene.read_bytes()
    scene.unlink()
    driver.execute_cdp_cmd("Network.clearBrowserCache", {})
    try:
        driver.get(page.url)
        wait_for(driver, "$('samples').textContent.includes('picture cannot be read')")
        # Not by the mouse: the page is still scrolling to the answer when the second one comes.
        press = "$('samples').children[arguments[0]].click()"
        driver.execute_script(press, 0)
        assert "picture 0 of sample 0 cannot be read" in answer(driver)["problem"]
        driver.execute_script(press, 3)
        assert answer(driver)["problem"] == ""
    finally:
        scene.write_bytes(content)
    driver.get_log("browser")  # the 404s


@pytest.mark.slow
@pytest.mark.distributed
def test_a_policy_that_decides_is_shown_as_what_it_is(
    driver, page: Server, tmp_path: Path, window: tuple[int, int]
):
    if window[0] < 1000:
        pytest.skip("one window is enough")
    folder = page.log.parent
    shutil.copytree(folder / "model", tmp_path / "model")
    config = tmp_path / "model" / "twn_config.json"
    settings = json.loads(config.read_text()) | {"thinking_decision": "policy"}
    config.write_text(json.dumps(settings | {"policy_threshold": 0.25}))
    flags = ["--device", "cpu", "--data", str(folder / "records.jsonl")]
    adaptive = Server(tmp_path / "model", *flags, log=tmp_path / "log", name="ui")
    try:
        opened(driver, adaptive)
        told = expected(adaptive, TEXTS[3], 0)
        set_threshold(driver, 0)
        shown = ask(driver, TEXTS[3])
        assert (shown["problem"], shown["thought"]) == ("", told["thought"])
        said = f"the policy begins a thought {told['gate_probability']:.3f}, threshold 0.000"
        assert said in shown["verdict"]
        assert "no policy/curve.csv" in shown["curvetext"]
        set_threshold(driver, 1)
        assert ask(driver, TEXTS[3])["thought"] == ""
    finally:
        assert adaptive.end() == 0


@pytest.mark.distributed
def test_nothing_scrolls_sideways_and_no_request_leaves_the_host(driver, page: Server, window):
    opened(driver, page)
    driver.find_elements("css selector", "#samples button")[1].click()
    answer(driver)
    widths = "return [innerWidth, document.documentElement.scrollWidth]"  # both grow with a page
    assert driver.execute_script(widths) == [window[0]] * 2
    assert cut_off(driver) == []
    names = driver.execute_script("return performance.getEntries().map(e => [e.entryType, e.name])")
    fetched = [name for kind, name in names if kind in ("navigation", "resource")]
    assert any(name.endswith("/search") for name in fetched)
    assert all(name.startswith((page.url, "data:")) for name in fetched)
    assert not driver.get_log("browser")


@pytest.mark.distributed
def test_an_error_is_told_and_the_policy_lets_only_the_page_itself_run(driver, page: Server):
    opened(driver, page)
    assert "expected" in ask(driver, " ")["problem"]
    driver.execute_script(
        "const e = document.createElement('script'); e.textContent = 'document.title = 1';"
        "document.body.append(e)"
    )
    assert driver.title == "See it think"
    assert "Content Security Policy" in driver.get_log("browser")[-1]["message"]
    policy = httpx2.get(page.url).headers["content-security-policy"]
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert httpx2.get(f"{page.url}/page/samples/1/0").status_code == 404
    picture = httpx2.get(f"{page.url}/page/samples/0/0")
    assert (picture.status_code, picture.headers["content-type"]) == (200, "image/png")
