"""Over-long texts and large pictures are cut and scaled alike wherever a prompt is made."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from made_records import picture
from PIL import Image
from tiny_backbones import BACKBONES, make_llama
from torch.utils.data import DataLoader

from twn_rl.data.chat import Renderer
from twn_rl.data.images import shrink_image
from twn_rl.data.inspection import inspect_records
from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import load_records, write_records
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.launch.arguments import ModelArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling import collator as batching
from twn_rl.modeling.backbone import load_backbone
from twn_rl.modeling.config import CONFIG_FILE, MAX_IMAGE_PIXELS, MAX_LENGTH, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.limits import PromptLimits, settle_limits
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.token_lengths import TokenCounter, add_token_lengths
from twn_rl.training.grpo import rollout_dataset
from twn_rl.training.pair_batches import SftCollator
from twn_rl.training.rollout_scorer import embed_items
from twn_rl.training.target_bank import TargetBank

LONG = "camel pizza zebra tree " * 40
VLMS = ["idefics3", "qwen3_vl", "qwen2_5_vl"]


def long_item(name: str, folder: Path) -> Item:
    picture(1, 96, 96).save(folder / "picture.png")
    return Item("find it", LONG, () if name == "llama" else (str(folder / "picture.png"),))


def rendered_by_trl(model: DualLoraModel, records: list[Record], row: int) -> list[int]:
    """Return the ids TRL makes of a row: its own template call, then its own processor call."""
    example: dict[str, Any] = rollout_dataset(model, records)[row]
    text = model.processor.apply_chat_template(
        example["prompt"], tokenize=False, add_generation_prompt=True
    )
    if not example.get("images"):
        return model.tokenizer(text, add_special_tokens=False)["input_ids"]
    batch = model.processor(text=[text], images=[example["images"]], return_tensors="pt")
    return batch["input_ids"][0].tolist()


@pytest.mark.parametrize("name", BACKBONES)
def test_a_long_text_gives_the_same_ids_in_training_rollouts_targets_and_serving(
    make_model: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    model: DualLoraModel = make_model(name, max_length=60, max_image_pixels=3000)
    item = long_item(name, tmp_path)
    record = Record("a", "test", query=item, positive=item)
    batch = SftCollator(model, num_hard_negatives=0)([record])
    expected = batch["query"]["input_ids"][0].tolist()
    assert len(expected) == 60
    assert batch["target"]["input_ids"][0].tolist() == expected
    assert rendered_by_trl(model, [record], 0) == expected
    embedded: list[list[int]] = []
    embed = DualLoraModel.embed

    def spy(self: Any, batch: Any, **options: Any) -> Any:
        embedded.extend(batch["input_ids"].tolist())
        return embed(self, batch, **options)

    monkeypatch.setattr(DualLoraModel, "embed", spy)
    bank = TargetBank(tmp_path / "bank").build(
        [item], lambda items: embed_items(model, items), fingerprint="a", batch_size=1
    )
    vector = ThinkingEmbedder(model).encode(item)
    assert embedded == [expected, expected]
    np.testing.assert_allclose(vector, bank.embeddings[0], atol=1e-5)
    assert model.completion_ids("tree")[0] in expected, "the beginning of the text is kept"


@pytest.mark.parametrize("name", VLMS)
def test_a_large_picture_is_scaled_before_the_processor_sees_it(
    make_model: Any, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    model: DualLoraModel = make_model(name)
    photo = picture(1, 4000, 3000)
    small = shrink_image(photo, MAX_IMAGE_PIXELS)
    assert small.size == (1182, 886)
    if name != "idefics3":  # whose processor scales every picture to one size
        model.processor.image_processor.size = {"shortest_edge": 4096, "longest_edge": 1 << 30}
        model.config.max_length = None
    item = Item("which object is it", images=(photo,))
    with caplog.at_level(logging.WARNING):
        batch, again = model.collate([item]), model.collate([item])
    expected = batching.collate_prompts(
        model.backbone, model.renderer, [replace(item, images=(small,))]
    )
    assert batch.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(batch[key], value), key
        assert torch.equal(again[key], value), key
    if name != "idefics3":
        image_token = model.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        side = model.backbone.model.config.vision_config.patch_size * 2
        tokens = int((batch["input_ids"] == image_token).sum())
        assert tokens == pytest.approx(MAX_IMAGE_PIXELS / side**2, rel=0.03)
    assert model.limits.counts.totals()["resized_pictures"] == 2
    assert sum("4000 x 3000" in record.message for record in caplog.records) == 1


def test_every_frame_of_a_video_and_pictures_of_rollouts_and_serving_are_scaled(
    make_model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: DualLoraModel = make_model("idefics3", max_image_pixels=500)
    frames = [str(tmp_path / f"{i}.png") for i in range(3)]
    for i, name in enumerate(frames):
        picture(i, 40, 30).save(name)
    item = Item("which object", images=(frames[0],), video=tuple(frames[1:]))
    shown: list[list[tuple[int, int]]] = []
    process = batching._process

    def spy(backbone: Any, texts: Any, images: Any) -> Any:
        shown.extend([image.size for image in row] for row in images)
        return process(backbone, texts, images)

    monkeypatch.setattr(batching, "_process", spy)
    model.collate([item])
    ThinkingEmbedder(model).encode(item)
    dataset = rollout_dataset(model, [Record("a", "test", query=item, positive=item)])
    for _ in range(2):  # the second time nothing is measured any more
        row: Any = dataset[0]
        shown.append([image.size for image in row["images"]])
    assert shown == [[(25, 19)] * 3] * 5


@pytest.mark.parametrize("name", BACKBONES)
def test_nothing_changes_below_the_limits(make_model: Any, make_items: Any, name: str) -> None:
    model, items = make_model(name), make_items(name)
    assert model.config.max_image_pixels == MAX_IMAGE_PIXELS
    limited = model.collate(items)
    plain = batching.collate_prompts(model.backbone, model.renderer, items)
    assert limited.keys() == plain.keys()
    assert all(torch.equal(limited[key], plain[key]) for key in plain)
    totals = model.limits.counts.totals()
    assert (totals["prompts"], totals["cut_texts"], totals["resized_pictures"]) == (
        len(items),
        0,
        0,
    )


def test_no_limits_means_nothing_is_cut_or_scaled(make_model: Any) -> None:
    model = make_model("qwen3_vl", max_length=None, max_image_pixels=None)
    item = Item(text="camel " * 900, images=(picture(1, 2000, 1000),))
    assert model.collate([item])["input_ids"].shape[1] > 900
    assert model.limits.open(item).images[0].size == (2000, 1000)


@pytest.mark.parametrize("name", VLMS)
def test_pictures_that_do_not_fit_by_themselves_are_refused_by_name(
    make_model: Any, tmp_path: Path, name: str
) -> None:
    model: DualLoraModel = make_model(name, max_length=12)
    picture(1, 64, 64).save(tmp_path / "big.png")
    item = Item("find it", LONG, (str(tmp_path / "big.png"),) * 3)
    message = r"prompt of item 1 .*3 pictures, first .*big.png.* has \d+ tokens and no more text"
    with pytest.raises(ValueError, match=message + r".*max_length = 12; lower max_image_pixels"):
        model.collate([Item(text="camel"), item])
    with pytest.raises(ValueError, match=r"big\.png"):
        rollout_dataset(model, [Record("a", "test", query=item, positive=item)])[0]
    with pytest.raises(InputError, match=r"input 0: prompt has .* no more text to cut"):
        ThinkingEmbedder(model).encode(item)


def test_a_text_that_is_cut_to_nothing_goes_if_there_is_a_picture(make_model: Any) -> None:
    model: DualLoraModel = make_model("idefics3")
    item = Item("find it", LONG, (picture(1),))
    bare = model.collate([replace(item, text=None)])["input_ids"]
    cut = model.collate([item], max_length=bare.shape[1])["input_ids"]
    assert torch.equal(cut, bare)
    alone = Item("find it", LONG)
    room = model.collate([replace(alone, text=None)])["input_ids"].shape[1]
    with pytest.raises(ValueError, match="no more text to cut"):
        model.collate([alone], max_length=room)


LLAMA = make_llama()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=5), st.integers(12, 30))
def test_as_much_is_kept_as_fits_whatever_else_is_in_the_batch(
    words: list[int], max_length: int
) -> None:
    items = [Item("find it", " ".join(["camel"] * count)) for count in words]
    limits = PromptLimits(max_length)
    batch = batching.collate_prompts(LLAMA, Renderer(), items, limits=limits)
    whole = batching.collate_prompts(LLAMA, Renderer(), items)
    lengths = batch["attention_mask"].sum(1)
    assert torch.equal(lengths, whole["attention_mask"].sum(1).clamp(max=max_length))
    for row, item in enumerate(items):
        alone = batching.collate_prompts(LLAMA, Renderer(), [item], limits=limits)["input_ids"][0]
        assert torch.equal(batch["input_ids"][row, -len(alone) :], alone)
    assert limits.counts.totals()["prompts"] == 2 * len(items)


def test_characters_of_several_tokens_are_kept_whole() -> None:
    backbone = load_backbone(BACKBONE_DIR, with_weights=False)
    text = "🐪 the camel 🍕 beside the zebra 🦓 " * 30
    for max_length in range(40, 60):
        limits = PromptLimits(max_length)
        item = batching.fit_item(backbone, Renderer(), Item("find it", text), limits)
        assert item.text is not None
        assert text.startswith(item.text)
        batch = batching.collate_prompts(backbone, Renderer(), [item])
        assert max_length - 8 <= batch["input_ids"].shape[1] <= max_length
        again = batching.fit_item(backbone, Renderer(), item, limits)
        assert again == item


def test_a_tokenizer_without_offsets_cuts_too() -> None:
    class Slow:
        """The fixture's tokenizer as one in Python, which knows no offsets."""

        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(LLAMA.tokenizer, name)

        def __len__(self) -> int:
            return len(LLAMA.tokenizer)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            assert "return_offsets_mapping" not in kwargs
            return LLAMA.tokenizer(*args, **kwargs)

    slow = replace(LLAMA, tokenizer=Slow())
    item = batching.fit_item(slow, Renderer(), Item("find it", LONG), PromptLimits(20))
    fast = batching.fit_item(LLAMA, Renderer(), Item("find it", LONG), PromptLimits(20))
    assert item == fast


def test_keys_are_those_of_the_uncut_item(make_model: Any) -> None:
    model: DualLoraModel = make_model("llama", max_length=20)
    items = [Item(text=LONG + end) for end in ("camel", "zebra")]
    records = [Record(e.text or "", "test", query=e, positive=e) for e in items]
    batch = SftCollator(model, num_hard_negatives=0)(records)
    assert torch.equal(*batch["query"]["input_ids"])
    assert len(set(batch["query_keys"].tolist())) == len(set(batch["target_keys"].tolist())) == 2


# What is stored


def test_an_old_config_is_unlimited_and_a_new_one_is_not(tmp_path: Path) -> None:
    assert (TwnConfig().max_length, TwnConfig().max_image_pixels) == (MAX_LENGTH, MAX_IMAGE_PIXELS)
    stored = TwnConfig().to_dict()
    del stored["max_length"], stored["max_image_pixels"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(stored))
    old = TwnConfig.load(tmp_path)
    assert (old.max_length, old.max_image_pixels) == (None, None)
    assert old.limit_settings == {}
    for config in (TwnConfig(max_length=77, max_image_pixels=None), TwnConfig()):
        config.save(tmp_path)
        assert TwnConfig.load(tmp_path) == config
    with pytest.raises(ValueError, match=r"max_length = 0.*max_image_pixels = -1"):
        TwnConfig(max_length=0, max_image_pixels=-1)


def test_an_old_checkpoint_embeds_as_it_did(
    make_model: Any, make_backbone: Any, tmp_path: Path
) -> None:
    model: DualLoraModel = make_model("llama")
    model.save_pretrained(tmp_path)
    assert TwnConfig.load(tmp_path).max_length == 512 - 8 - 3
    stored = json.loads((tmp_path / CONFIG_FILE).read_text())
    del stored["max_length"], stored["max_image_pixels"]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(stored))
    old = DualLoraModel.from_pretrained(tmp_path, backbone=make_backbone("llama"))
    item = Item(text="camel " * 505)
    assert old.limits == PromptLimits()
    assert old.collate([item])["input_ids"].shape[1] > 505
    assert ThinkingEmbedder(old).max_seq_length == 512 - 8 - 3, "serving was limited before"
    assert model.collate([item])["input_ids"].shape[1] == 512 - 8 - 3


def test_limits_are_fingerprinted_only_where_there_are_some(make_model: Any) -> None:
    def fingerprints(**settings: Any) -> list[str]:
        found = Fingerprints(make_model("llama", **settings))
        return [found.vectors, found.thoughts, found.gate_origin["embedding"]]

    off: dict[str, Any] = {"max_length": None, "max_image_pixels": None}
    assert TwnConfig(**off).limit_settings == {}, "what was stored before there were limits fits"
    plain = fingerprints(**off)
    assert plain == fingerprints(**off)
    for change in ({"max_length": 40}, {"max_image_pixels": 40}):
        assert all(a != b for a, b in zip(plain, fingerprints(**{**off, **change}), strict=True))


def test_the_context_lowers_the_length_once_and_for_good(make_backbone: Any) -> None:
    backbone = make_backbone("llama")
    settled = settle_limits(backbone, TwnConfig(max_think_tokens=100))
    assert settled.max_length == 512 - 100 - 4
    assert settle_limits(backbone, settled) is settled
    assert settle_limits(backbone, replace(settled, max_think_tokens=50)).max_length == 408
    with pytest.raises(ValueError, match="max_think_tokens = 600 in a context of 512 tokens"):
        settle_limits(backbone, TwnConfig(max_think_tokens=600))
    assert settle_limits(backbone, TwnConfig(max_length=None, max_think_tokens=600))


def test_serving_is_limited_as_training_unless_told_otherwise(make_model: Any) -> None:
    model: DualLoraModel = make_model("llama", max_length=30)
    embedder, words = ThinkingEmbedder(model), "camel " * 100
    assert embedder.max_seq_length == 30
    assert embedder.encode([words], return_details=True).truncated == [0]
    assert model.limits.counts.totals()["cut_texts"] == 1
    embedder.max_seq_length = 200
    assert embedder.encode([words], return_details=True).truncated == []
    embedder.max_seq_length = None
    assert embedder.max_seq_length == 30


def test_flags_set_both_limits_and_zero_is_off(tmp_path: Path) -> None:
    assert ModelArguments().config().limit_settings == TwnConfig().limit_settings

    def parsed(*flags: str) -> TwnConfig:
        (arguments,) = parse_arguments([ModelArguments], arguments=flags)
        return arguments.config()

    config = parsed("--max_length", "512", "--max_image_pixels", "0")
    assert (config.max_length, config.max_image_pixels) == (512, None)
    (tmp_path / "off.yaml").write_text("max_length: null\nmax_image_pixels: 1000\n")
    config = parsed("--config", str(tmp_path / "off.yaml"))
    assert (config.max_length, config.max_image_pixels) == (None, 1000)


# What is counted


def test_cuts_are_counted_and_the_first_of_each_kind_is_logged(
    make_model: Any, caplog: pytest.LogCaptureFixture
) -> None:
    model: DualLoraModel = make_model("idefics3", max_length=50, max_image_pixels=600)
    items = [Item(text="pizza"), Item(text=LONG), Item("it", images=(picture(1), picture(2, 9, 9)))]
    counts = model.limits.counts
    with caplog.at_level(logging.WARNING):
        model.collate(items)
        model.collate(items)
    totals = {"prompts": 6, "cut_texts": 2, "pictures": 4, "resized_pictures": 2}
    assert counts.totals() == totals
    assert [r.message.split(" ")[:2] for r in caplog.records] == [["a", "picture"], ["the", "text"]]
    assert counts.take_ratios() == {"cut_texts_ratio": 1 / 3, "resized_pictures_ratio": 0.5}
    assert counts.take_ratios() == {"cut_texts_ratio": 0.0, "resized_pictures_ratio": 0.0}
    model.collate(items[:2])
    assert counts.take_ratios()["cut_texts_ratio"] == 0.5
    assert counts.totals()["prompts"] == 8


def test_workers_of_a_data_loader_count_into_the_same_numbers(make_model: Any) -> None:
    model: DualLoraModel = make_model("llama", max_length=20)
    loader: Any = DataLoader(
        [Item(text=LONG), Item(text="camel")] * 2,  # pyright: ignore[reportArgumentType]
        batch_size=2,
        collate_fn=model.collate,
        num_workers=1,
    )
    assert len(list(loader)) == 2
    assert model.limits.counts.totals()["cut_texts"] == 2


def test_check_data_tells_how_much_is_cut(tmp_path: Path) -> None:
    def record(name: str, text: str) -> Record:
        return Record(name, "test", query=Item(text=text), positive=Item(text="tree"))

    records = [record("short", "camel"), record("long", "camel " * 100)]
    counter = TokenCounter(make_llama(), TwnConfig(max_length=30))
    write_records(tmp_path / "records.jsonl", records)
    report = inspect_records(load_records(tmp_path / "records.jsonl"), "records.jsonl")
    add_token_lengths(report, records, counter)
    assert report.tokens["query prompt"].maximum == 30
    cut = report.tokens["cut off prompts"]
    whole = TokenCounter(make_llama(), TwnConfig(max_length=None)).prompt(records[1].query)
    assert (cut.count, cut.maximum) == (1, whole - 30)
    assert report.problems == []


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 20_000))
def test_a_scaled_picture_fits_and_keeps_its_aspect(width: int, height: int, limit: int) -> None:
    image = Image.new("RGB", (width, height))
    small = shrink_image(image, limit)
    assert shrink_image(image, None) is image
    if width * height <= limit:
        assert small is image
        return
    assert small.width * small.height <= limit
    assert shrink_image(small, limit) is small
    if min(small.size) > 1:
        scale = (limit / (width * height)) ** 0.5
        assert width * scale - 1.001 <= small.width <= width * scale + 0.001
        assert height * scale - 1.001 <= small.height <= height * scale + 0.001


def test_a_strip_is_scaled_to_the_limit() -> None:
    for size in ((1, 5000), (5000, 1)):
        small = shrink_image(Image.new("RGB", size), 1000)
        assert (max(small.size), min(small.size)) == (1000, 1)


def test_the_dataset_of_rollouts_names_itself_without_the_weights(make_model: Any) -> None:
    model = make_model("idefics3")
    model.backbone.model.__reduce_ex__ = lambda *_: pytest.fail("the weights were pickled")
    record = Record("a", "test", query=Item(text="camel"), positive=Item(text="tree"))
    assert len(rollout_dataset(model, [record])) == 1
