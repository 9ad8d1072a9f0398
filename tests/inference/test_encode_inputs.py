"""Inputs of any kind become the item they mean, or an error with their position."""

from pathlib import Path

import numpy as np
import pytest
from made_records import picture

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item
from twn_rl.inference.batches import collate_usable, in_batches
from twn_rl.inference.inputs import InputError, InputRules, as_list, is_single, parse_input
from twn_rl.inference.shortlist import Shortlist
from twn_rl.inference.thought_cache import CACHE_FILE, CotCache, cache_key
from twn_rl.modeling.limits import PromptLimits

RULES = InputRules()


@pytest.fixture
def png(tmp_path):
    path = tmp_path / "camel.png"
    picture(1).save(path)
    return path


def test_every_kind_of_input_becomes_the_item_it_means(png):
    image = picture(2)
    question = {"type": "text", "text": "what is it"}
    url = {"type": "image_url", "image_url": {"url": str(png)}}
    cases = [
        ("camel", Item(text="camel")),
        (np.str_("camel"), Item(text="camel")),
        (str(png), Item(text=str(png))),  # a string is text, whatever files there are
        (png, Item(images=(str(png),))),
        (image, Item(images=(image,))),
        (Item(text="camel"), Item(text="camel")),
        ({"text": "camel", "image": image}, Item(text="camel", images=(image,))),
        ({"image": str(png)}, Item(images=(str(png),))),
        ({"images": [png, image], "text": None}, Item(images=(str(png), image))),
        ({"video": [image, image]}, Item(video=(image, image))),
        ({"instruction": "find", "text": "it"}, Item(instruction="find", text="it")),
        ({"instruction": "find it"}, Item(instruction="find it")),
        ([{"role": "user", "content": "camel"}], Item(text="camel")),
        (
            [
                {"role": "system", "content": [{"type": "text", "text": "find"}]},
                {"role": "user", "content": [{"type": "image", "image": image}, question, url]},
            ],
            Item(instruction="find", text="what is it", images=(image, str(png))),
        ),
    ]
    for value, item in cases:
        assert parse_input(value, 0, RULES) == item


def test_a_conversation_is_one_input_and_a_list_of_them_several():
    chat = [{"role": "user", "content": "camel"}]
    for value in (chat, "camel", {"text": "camel"}, Path("camel.png"), picture(1), Item(text="a")):
        assert is_single(value)
        assert as_list(value) == [value]
    for values in ([chat, chat], ["camel"], (), np.array(["camel", "pizza"]), [chat, "camel"]):
        assert not is_single(values)
        assert len(as_list(values)) == len(values)
    for wrong in (None, 3, {"camel"}, (text for text in ["camel"])):
        with pytest.raises(TypeError, match=r"inputs is a .*; expected a string"):
            as_list(wrong)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "value = None of type NoneType"),
        (3.5, "value = 3.5 of type float"),
        (b"camel", "of type bytes"),
        ("  ", "expected non-blank text or a picture"),
        ({"text": "a", "txet": "b"}, r"unknown keys \['txet'\]"),
        ({"text": 3}, "text = 3 of type int"),
        ({"instruction": " ", "text": ""}, "without pictures"),
        ({"images": "camel.png"}, "expected a list of PIL images or paths"),
        ({"images": [None]}, r"images\[0\] = None"),
        ({"video": "film.mp4"}, "video = 'film.mp4'"),
        ({"image": picture(1), "images": [picture(1)]}, "both image and images"),
        ({"image": "https://example.org/camel.png"}, "is a URL"),
        ({"image": "data:image/png;base64,AAAA"}, "is a URL"),
        (Path("nowhere/camel.png"), "does not exist"),
        ({"image": "a" * 5000}, "File name too long|does not exist"),
        ("a \x00 b", r"holds U\+0000; expected text without NUL"),
        ({"text": "a", "instruction": "\ud800"}, r"holds U\+D800"),
        ([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "roles ="),
        ([{"role": "user", "content": "a"}, "b"], "roles ="),
        ([{"role": "system", "content": "a"}], "roles ="),
        ([{"role": "user", "content": None}], "expected only role and content"),
        ([{"role": "user", "content": "a", "name": "b"}], "expected only role and content"),
        ([{"role": "user", "content": [{"type": "audio", "audio": "a"}]}], "content part ="),
        ([{"role": "user", "content": [{"type": "text", "txt": "a"}]}], "content part ="),
        ([{"role": "user", "content": []}], "expected non-blank text or a picture"),
    ],
)
def test_what_cannot_be_embedded_is_refused_with_its_position(value, message):
    with pytest.raises(InputError, match=rf"(?s)input 7: .*({message})") as caught:
        parse_input(value, 7, RULES)
    assert caught.value.position == 7
    assert str(caught.value) == f"input 7: {caught.value.problem}"


def test_pictures_in_a_system_message_are_refused():
    system = {"role": "system", "content": [{"type": "image", "image": picture(1)}]}
    with pytest.raises(InputError, match="system message holds pictures"):
        parse_input([system, {"role": "user", "content": "a"}], 0, RULES)


def test_a_prompt_fills_in_only_where_an_input_brings_no_instruction():
    rules = InputRules(instruction="find the camel", is_multimodal=False)
    assert parse_input("pizza", 0, rules) == Item(instruction="find the camel", text="pizza")
    with pytest.raises(InputError, match="expected non-blank text"):
        parse_input("", 0, rules)
    own = {"text": "pizza", "instruction": "mine"}
    assert parse_input(own, 0, rules) == Item(instruction="mine", text="pizza")
    with pytest.raises(InputError, match="1 pictures for a backbone that reads text only"):
        parse_input(picture(1), 0, rules)


def test_batches_go_from_long_to_short_and_lose_nobody():
    items = [Item(text="a" * n) for n in (5, 50, 1)] + [None, Item(images=(picture(1),))]
    batches = [list(batch) for batch in in_batches(items, 2)]
    assert batches == [[4, 1], [0, 2]]


def test_a_picture_the_processor_refuses_is_named_and_the_others_stay(make_backbone):
    backbone = make_backbone("qwen3_vl")
    strip = Item(images=(picture(1, 4000, 2),))
    items = {3: Item(text="camel"), 5: strip, 9: Item(images=(picture(2, 64, 64),))}
    batch, kept, errors = collate_usable(backbone, Renderer(), items, PromptLimits())
    assert list(kept) == [3, 9]
    assert len(batch["input_ids"]) == 2
    assert kept[3] == items[3]
    assert [error.position for error in errors] == [5]
    assert "the processor refuses it" in errors[0].problem


def test_a_shortlist_keeps_the_best_in_any_order_and_within_its_memory():
    scores = [0.3, 0.9, 0.1, 0.9, 0.5, 0.7]
    for order in (range(6), reversed(range(6))):
        shortlist = Shortlist[str](3, max_bytes=20)
        for position in order:
            shortlist.offer(scores[position], position, lambda p=position: (f"kept {p}", 10))
            assert shortlist.kept_bytes <= 20
        assert shortlist.positions() == [1, 3, 5]
        assert [shortlist.pop(p) for p in (1, 3, 5)] == ["kept 1", "kept 3", None]
        assert shortlist.kept_bytes == 0
    empty = Shortlist[str](0, max_bytes=20)
    empty.offer(1.0, 0, lambda: ("never", 10))
    assert empty.positions() == []


def test_the_cache_gives_back_what_was_put_also_to_other_readers(tmp_path):
    cache, reader = CotCache(tmp_path), CotCache(tmp_path)
    thoughts = {f"key{n}": [[n, 2], []] for n in range(1200)}
    cache.put(thoughts)
    assert reader.get([*thoughts, "unknown", "key1"]) == thoughts
    assert len(reader) == 1200
    cache.put({"key1": [[7]]})  # what is known stays
    cache.close()
    assert cache.get(["key1"]) == {"key1": [[1, 2], []]}
    assert cache_key("a", "b", {"x": 1, "y": 2}) == cache_key("a", "b", {"y": 2, "x": 1})
    keys = {cache_key(*parts) for parts in (("a", "b", {}), ("b", "a", {}), ("a", "b", {"x": 1}))}
    assert len(keys) == 3


def test_a_file_that_is_no_cache_is_refused_and_left_alone(tmp_path):
    (tmp_path / CACHE_FILE).write_text("my notes, not a database, and long enough to be seen")
    with pytest.raises(ValueError, match=r"cannot be used .*choose another cot_cache_dir"):
        CotCache(tmp_path)
    assert (tmp_path / CACHE_FILE).read_text().startswith("my notes")


def test_a_cache_that_cannot_be_written_is_logged_and_costs_nothing(tmp_path, caplog):
    cache = CotCache(tmp_path)
    cache.put({"a": [[1]]})
    cache._connection.execute("PRAGMA query_only=ON")
    cache.put({"b": [[2]]})
    assert "1 thoughts could not be stored" in caplog.text
    assert cache.get(["a", "b"]) == {"a": [[1]]}
