"""The renderer and the think parser: exact strings, round trips, every malformed think."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from jinja2 import Environment
from PIL import Image

from twn_rl.data.chat import PLAIN_CHAT_TEMPLATE, Renderer, parse_think
from twn_rl.data.record import Item


def test_images_then_frames_come_before_instruction_and_text() -> None:
    item = Item(instruction="Find it.", text="a camel", images=("a.png",), video=("f0.png", "f1"))
    assert Renderer().messages(item) == [
        {
            "role": "user",
            "content": [
                {"type": "image"},
                {"type": "image"},
                {"type": "image"},
                {"type": "text", "text": "Find it.\na camel"},
            ],
        }
    ]
    assert Renderer().images(item) == ["a.png", "f0.png", "f1"]


def test_placeholders_and_images_agree_for_opened_images() -> None:
    item = Item(images=(Image.new("RGB", (2, 2)),))
    (message,) = Renderer().messages(item)
    assert message["content"] == [{"type": "image"}]
    assert len(Renderer().images(item)) == 1


def test_a_system_prompt_leads_in_both_forms() -> None:
    renderer, item = Renderer(system_prompt="Be brief."), Item(text="hi")
    plain = renderer.messages(item, is_multimodal=False)
    assert plain == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
    ]
    parts = renderer.messages(item)
    assert parts[0] == {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}


def test_items_a_prompt_cannot_hold_are_refused() -> None:
    with pytest.raises(ValueError, match="neither instruction"):
        Renderer().messages(Item())
    with pytest.raises(ValueError, match="reads text only"):
        Renderer().messages(Item(text="x", images=("a.png",)), is_multimodal=False)


def test_a_completion_has_one_exact_form() -> None:
    assert Renderer().completion(" up \n") == "<think> up </think>"
    with pytest.raises(ValueError, match="blank"):
        Renderer().completion("  ")
    with pytest.raises(ValueError, match="strip the markers"):
        Renderer().completion("<think> up </think>")


@given(cot=st.text(min_size=1, max_size=40).filter(lambda t: t.strip() and "think>" not in t))
def test_parsing_a_completion_gives_the_cot_back(cot: str) -> None:
    renderer = Renderer()
    think = parse_think(renderer.completion(cot), renderer)
    assert (think.text, think.is_complete, think.problem) == (cot.strip(), True, None)


@pytest.mark.parametrize(
    ("completion", "problem", "text"),
    [
        ("", "no_open", ""),
        ("the camel </think>", "no_open", ""),
        ("so: <think> a </think>", "no_open", ""),
        ("<think> a", "truncated", "a"),
        ("<think>", "truncated", ""),
        ("<think> a </thi", "truncated", "a </thi"),
        ("<think> </think>", "empty", ""),
        ("<think> a <think> b </think>", "nested", "a <think> b"),
        ("<think> a <think> b", "nested", "a <think> b"),
        ("<think> a </think> <think> b </think>", "nested", "a"),
        ("<think> a </think> </think>", "nested", "a"),
    ],
)
def test_every_malformed_think_is_named(completion: str, problem: str, text: str) -> None:
    think = parse_think(completion, Renderer())
    assert (think.problem, think.text, think.is_complete) == (problem, text, False)


def test_text_around_a_complete_think_is_tolerated() -> None:
    assert parse_think("\n<think>a</think> camel", Renderer()).is_complete


def test_other_markers_work_and_ambiguous_ones_are_refused() -> None:
    renderer = Renderer(think_open="[[", think_close="]]")
    assert parse_think(renderer.completion("a"), renderer).text == "a"
    with pytest.raises(ValueError, match="contain each other"):
        Renderer(think_open="|", think_close="|")
    with pytest.raises(ValueError, match="non-empty"):
        Renderer(think_open=" ")


def test_a_saved_renderer_comes_back_and_unknown_keys_raise() -> None:
    renderer = Renderer(system_prompt="s", think_open="<a>", think_close="<b>")
    assert Renderer.from_dict(renderer.to_dict()) == renderer
    with pytest.raises(ValueError, match=r"unknown keys \['colour'\]"):
        Renderer.from_dict({"colour": 1})


def test_the_plain_template_ends_ready_for_the_think_and_extends_its_own_prompt() -> None:
    template = Environment(autoescape=False).from_string(PLAIN_CHAT_TEMPLATE)
    messages = Renderer(system_prompt="s").messages(Item(text="hi"), is_multimodal=False)
    prompt = template.render(messages=messages, add_generation_prompt=True, bos_token=None)
    assert prompt == "System:\ns\nUser:\nhi\nAssistant:\n"
    answered = [*messages, {"role": "assistant", "content": "<think> a </think>"}]
    assert template.render(messages=answered, eos_token="<eos>").startswith(
        prompt + "<think> a </think><eos>"
    )
