"""ThinkingEmbedder: vectors belong to their inputs, thoughts to vectors, counts to the truth."""

import inspect
import logging
import subprocess
import sys
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from made_records import picture
from torch import nn
from torch.nn.functional import normalize

from twn_rl.data.record import Item
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.thought_pool import mean_vector
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.vision import encode_images

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
THOUGHTS = [
    "<think> camel </think>",
    "pizza zebra",  # malformed: never opened
    "<think> zebra above the tree </think>",
    "<think> row two </think>",
    "<think> below it is a pizza </think>",
]
NEAR = {"rtol": 0, "atol": 1e-5}


class Gate(nn.Module):
    """The contract of a gate: states (N, D) to probabilities (N,)."""

    def __init__(self, width):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.direction = nn.Parameter(torch.randn(width, generator=generator))

    def probability(self, states):
        return (normalize(states, dim=-1) @ self.direction).sigmoid()


def thoughts_for(items):
    return [THOUGHTS[row % len(THOUGHTS)] for row in range(len(items))]


def teach(model, items, steps=400):
    """Train the reasoning adapter until it writes the thought of each item, the end included."""
    completions = [model.completion_ids(text, add_eos=True) for text in thoughts_for(items)]
    plain = model.collate(items, completions)
    batch = encode_images(model.backbone, plain)
    with torch.no_grad():  # a random head is almost flat, and no adapter could sharpen it
        model.backbone.model.get_decoder().norm.weight.mul_(60)
    parameters = list(adapter_parameters(model.peft_model, REASONING_ADAPTER).values())
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(steps):
        if step % 10 == 0 and model.reason(plain, max_think_tokens=9) == completions:
            return
        optimizer.zero_grad()
        model.token_nll(batch)[0].sum().backward()
        optimizer.step()
    raise AssertionError("the tiny model did not learn its thoughts")


_TAUGHT = {}


@pytest.fixture
def taught(make_model, make_items):
    """Return name -> (embedder whose model writes `THOUGHTS`, items); each is taught once."""

    def get(name="idefics3"):
        items = make_items(name)
        if name not in _TAUGHT:
            settings = {"reasoning_lora": LoraSettings(r=8, alpha=16), "max_think_tokens": 9}
            model = make_model(name, **settings, gate_threshold=0.5)
            teach(model, items)
            model.gates["query"] = Gate(model.hidden_size)
            _TAUGHT[name] = model.requires_grad_(False)
        return ThinkingEmbedder(_TAUGHT[name]), items

    return get


def is_malformed(row):
    return not THOUGHTS[row % len(THOUGHTS)].startswith("<think>")


def by_hand(model, items):
    """Return no-think and think vectors of plain passes; malformed thoughts count as none."""
    completions = [None if is_malformed(i) else text for i, text in enumerate(thoughts_for(items))]
    with torch.no_grad():
        return [
            model.embed(model.collate(items)).numpy(),
            model.embed(model.collate(items, completions)).numpy(),
        ]


@pytest.mark.parametrize("name", FAMILIES)
def test_vectors_are_those_of_plain_passes_in_every_mode(taught, name):
    embedder, items = taught(name)
    never, always = by_hand(embedder.model, items)
    mask = [row % 2 == 0 for row in range(len(items))]
    chosen = np.where(np.array(mask)[:, None], always, never)
    np.testing.assert_allclose(embedder.encode_document(items), never, **NEAR)
    np.testing.assert_allclose(embedder.encode_query(items, think="always"), always, **NEAR)
    np.testing.assert_allclose(embedder.encode_query(items, think=mask), chosen, **NEAR)
    assert np.abs(always - never).max() > 0.05


@pytest.mark.parametrize("name", FAMILIES)
def test_a_vector_does_not_depend_on_its_batch_mates(taught, name):
    embedder, items = taught(name)
    padding = Item(text="which object is in the top row and left of the zebra " * 3)
    sampling = {"do_sample": True, "num_thoughts": 2, "temperature": 1.5, "seed": 4}
    for options in ({"think": "never"}, {"think": "always"}, {"think": "always", **sampling}):
        alone = np.stack([embedder.encode_query(item, **options) for item in items])
        backwards = embedder.encode_query(items[::-1], batch_size=2, **options)[::-1]
        padded = embedder.encode_query([padding, *items], batch_size=8, **options)[1:]
        np.testing.assert_allclose(backwards, alone, **NEAR)
        np.testing.assert_allclose(padded, alone, **NEAR)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_gate_decides_who_thinks(taught, name):
    embedder, items = taught(name)
    never, always = by_hand(embedder.model, items)
    probabilities = embedder.model.gates["query"].probability(torch.from_numpy(never)).tolist()
    threshold = sorted(probabilities)[len(items) // 2]
    details = embedder.encode_query(items, think_threshold=threshold, return_details=True)
    thinks = np.array(probabilities) > threshold + 1e-6
    assert 0 < thinks.sum() < len(items)
    np.testing.assert_allclose(details.gate_probabilities, probabilities, **NEAR)
    asked = [p > threshold for p in details.gate_probabilities]
    np.testing.assert_allclose(
        details.embeddings, np.where(np.array(asked)[:, None], always, never), **NEAR
    )
    assert [bool(row) for row in details.thoughts] == asked
    stored = embedder.encode_query(items, return_details=True)
    assert [bool(row) for row in stored.thoughts] == [p > 0.5 for p in probabilities]


@pytest.mark.parametrize(("gib", "rereads"), [(2.0, 0), (1e-5, 1), (0.0, 2)])
def test_a_think_rate_takes_the_top_share_however_little_memory_there_is(taught, gib, rereads):
    embedder, items = taught("qwen3_vl")
    _, always = by_hand(embedder.model, items)
    never = embedder.encode(items, return_details=False)
    details = embedder.encode_query(
        items, think_rate=0.4, prefix_cache_gib=gib, batch_size=2, return_details=True
    )
    order = np.argsort(details.gate_probabilities)[::-1]
    expected = never.copy()
    expected[order[:2]] = always[order[:2]]
    np.testing.assert_allclose(details.embeddings, expected, **NEAR)
    assert sorted(order[:2]) == [row for row, texts in enumerate(details.thoughts) if texts]
    assert details.rereads == rereads
    nobody = embedder.encode_query(items, think_rate=0.0)
    np.testing.assert_allclose(nobody, never, **NEAR)


def test_details_tell_what_was_thought_and_what_was_left_out(taught, caplog):
    embedder, items = taught()
    with caplog.at_level(logging.WARNING):
        details = embedder.encode_query(items, think="always", return_details=True)
    texts = [text.replace("<think> ", "").replace(" </think>", "") for text in THOUGHTS]
    assert [row[0] for i, row in enumerate(details.thoughts) if i != 1] == texts[:1] + texts[2:]
    assert details.problems == [[None], ["no_open"], [None], [None], [None]]
    assert details.has_thought == [True, False, True, True, True]
    assert details.think_tokens == [len(text.split()) for text in THOUGHTS]
    assert details.fallbacks == [1]
    assert details.gate_probabilities == [None] * 5
    assert details.timings.keys() == {"preprocess", "read", "write", "read_out", "total"}
    assert sum("left out" in record.message for record in caplog.records) == 1
    assert "most thoughts do" not in caplog.text
    cut = embedder.encode_query(items, think="always", max_think_tokens=3, return_details=True)
    assert cut.problems[2] == ["truncated"]
    assert "raise max_think_tokens, or, if these inputs are of another kind" in caplog.text
    np.testing.assert_allclose(cut.embeddings[2], embedder.encode(items[2]), **NEAR)


def test_thoughts_are_written_together_across_batches(taught, monkeypatch):
    embedder, items = taught("qwen2_5_vl")
    model, sizes = embedder.model, []
    reason = model.reason

    def counted(prompts, *args, **kwargs):
        sizes.append(len(prompts))
        return reason(prompts, *args, **kwargs)

    monkeypatch.setattr(model, "reason", counted)
    mask = [row % 4 == 0 for row in range(20)]
    embedder.encode_query(items * 4, think=mask, batch_size=4)
    assert sizes == [4, 1]


@pytest.mark.parametrize("options", [{"think": "always"}, {"think_rate": 0.4}])
def test_prompts_that_cannot_be_told_apart_think_batch_by_batch(taught, monkeypatch, options):
    embedder, items = taught("idefics3")
    expected = embedder.encode_query(items, batch_size=3, **options)
    prepare = embedder.model.prepare
    monkeypatch.setattr(
        embedder.model, "prepare", lambda batch: replace(prepare(batch), image_tokens=None)
    )
    details = embedder.encode_query(items, batch_size=3, return_details=True, **options)
    np.testing.assert_allclose(details.embeddings, expected, **NEAR)
    assert details.rereads == (2 if "think_rate" in options else 0)


def test_pictures_are_encoded_and_prompts_preprocessed_once(taught, monkeypatch):
    embedder, items = taught("qwen3_vl")
    tower, processor = embedder.model.backbone.inner_model, embedder.model.processor
    encoded, processed = [], []
    get_features, images = tower.get_image_features, processor.image_processor

    def features(**kwargs):
        encoded.append(len(kwargs["image_grid_thw"]))
        return get_features(**kwargs)

    class Counting:
        def __call__(self, *, images: list, **kwargs):
            processed.append(len(images))
            return original(images=images, **kwargs)

        def __getattr__(self, name: str):
            return getattr(original, name)

    original = images
    features.__signature__ = inspect.signature(get_features)  # type: ignore[attr-defined]
    monkeypatch.setattr(tower, "get_image_features", features)
    monkeypatch.setattr(processor, "image_processor", Counting())
    pictures = sum(len(item.images) + len(item.video) for item in items)
    embedder.encode_query(items, think="always", batch_size=2, num_thoughts=2, do_sample=True)
    assert sum(encoded) == pictures
    assert sum(processed) == pictures


def test_several_thoughts_give_the_mean_of_their_vectors(taught):
    embedder, items = taught("llama")
    model = embedder.model
    options = {"do_sample": True, "num_thoughts": 5, "temperature": 2.0, "return_details": True}

    def sampled(seed):
        return embedder.encode_query(items, think="always", seed=seed, **options)

    def is_mixed(details):  # which thoughts a seed draws differs between processors
        usable = [details.problems[row].count(None) for row in range(len(items))]
        return max(usable) > 1 and sum(usable) < 5 * len(items)

    seed, details = next((seed, found) for seed in range(50) if is_mixed(found := sampled(seed)))
    prefix = model.read(model.prepare(model.collate(items)))
    close = model.tokenizer.convert_tokens_to_ids("</think>")
    assert [len(row) for row in details.problems] == [5] * len(items)
    for row in range(len(items)):
        rows = list(zip(details.thought_ids[row], details.problems[row], strict=True))
        usable = [ids for ids, problem in rows if problem is None]
        assert all(ids.index(close) == len(ids) - 1 for ids in usable), "embeds what came after it"
        states = model.read_out(prefix.select([row] * max(1, len(usable))), usable or None)
        expected = normalize(normalize(states, dim=-1).mean(0), dim=0)
        np.testing.assert_allclose(details.embeddings[row], expected, **NEAR)
        alone = model.read_out(prefix.select([row] * 5), [i if p is None else [] for i, p in rows])
        single = details.thought_embeddings[row]
        np.testing.assert_allclose(single, normalize(alone, dim=-1), **NEAR)
    assert sampled(seed).thoughts == details.thoughts
    assert sampled(seed + 1).thoughts != details.thoughts


def test_one_seed_per_input_decides_by_itself(taught):
    embedder, items = taught("llama")
    options = {"do_sample": True, "temperature": 3.0, "think": "always", "return_details": True}
    same = [items[0]] * 4
    details = embedder.encode_query(same, seed=[5, 6, 7, 5], **options)
    assert details.thoughts[0] == details.thoughts[3]
    assert len({str(thoughts) for thoughts in details.thoughts}) > 1
    again = embedder.encode_query(same[:2], seed=[7, 6], batch_size=1, **options)
    assert again.thoughts == [details.thoughts[2], details.thoughts[1]]
    with pytest.raises(ValueError, match="seed has 2 values for 4 inputs"):
        embedder.encode_query(same, seed=[5, 6], **options)


@pytest.mark.parametrize("name", FAMILIES[:3])
def test_given_thoughts_are_embedded_and_nothing_is_written(taught, monkeypatch, name):
    embedder, items = taught(name)
    model, written = (
        embedder.model,
        embedder.encode_query(items, think="always", return_details=True),
    )
    monkeypatch.setattr(model, "reason", lambda *_, **__: pytest.fail("nothing is to be written"))
    behind = model.completion_ids("pizza one")  # nobody embeds what stands behind a thought
    given = ["zebra left", None, "", [*written.thought_ids[3][0], *behind], False]
    details = embedder.encode_query(items, think=given, return_details=True, batch_size=2)
    texts = ["<think> zebra left </think>", None, "<think> </think>", THOUGHTS[3], None]
    with torch.no_grad():
        expected = model.embed(model.collate(items, texts)).numpy()
    np.testing.assert_allclose(details.embeddings, expected, **NEAR)
    assert details.thoughts == [["zebra left"], [], [""], ["row two"], []]
    assert details.has_thought == [True, False, True, True, False]
    assert details.think_tokens == [0] * 5
    eos = model.tokenizer.eos_token
    for thought, found in (("</think>", "</think>"), (f"a{eos}b", eos), ("a\ud800", "U+D800")):
        with pytest.raises(InputError, match=r"input 1: field think: think holds") as error:
            embedder.encode_query(items, think=["camel", thought, None, None, None])
        assert found in str(error.value)
    with pytest.raises(ValueError, match=r"3\.5.*expected one bool or thought per input"):
        embedder.encode_query(items, think=[True, None, "a", 3.5, [1, 2]])


@pytest.mark.parametrize("name", ["qwen3_vl", "llama"])
def test_several_ways_read_once_and_agree_with_each_alone(taught, monkeypatch, name):
    embedder, items = taught(name)
    common = {"batch_size": 2, "return_details": True}
    ways = {
        "never": EncodeOptions(**common),
        "always": EncodeOptions(think="always", **common),
        "auto": EncodeOptions(think="auto", **common),
        "few": EncodeOptions(think="auto", think_rate=0.4, **common),
        "asked": EncodeOptions(think="auto", think_threshold=1.0, **common),
        "sampled": EncodeOptions(think="always", do_sample=True, num_thoughts=2, **common),
        "given": EncodeOptions(think=["camel"] * len(items), **common),
    }
    alone = {way: embedder.encode(items, **vars(options)) for way, options in ways.items()}
    read, calls = embedder.model.prepare, []
    monkeypatch.setattr(embedder.model, "prepare", lambda batch: calls.append(1) or read(batch))
    together = embedder.encode_ways(items, ways)
    assert len(calls) == -(-len(items) // 2)
    for way, details in together.items():
        np.testing.assert_allclose(details.embeddings, alone[way].embeddings, **NEAR)
        assert details.thoughts == alone[way].thoughts, way
        assert details.fallbacks == alone[way].fallbacks
        assert (details.gate_probabilities[0] is None) == (way not in ("auto", "few", "asked"))
        assert min(details.seconds) > 0
    assert not any(together["asked"].thoughts)
    np.testing.assert_array_equal(together["asked"].embeddings, together["never"].embeddings)
    with pytest.raises(ValueError, match=r"batch_size by way = \{'a': 32, 'b': 2\}"):
        embedder.encode_ways(items, {"a": EncodeOptions(), "b": EncodeOptions(batch_size=2)})


def test_every_option_is_a_keyword_with_its_type_and_default():
    options = inspect.signature(EncodeOptions).parameters
    for method, own in (
        (ThinkingEmbedder.encode, {"side": "query"}),
        (ThinkingEmbedder.encode_query, {"think": "auto"}),
        (ThinkingEmbedder.encode_document, {}),
    ):
        keywords = dict(list(inspect.signature(method).parameters.items())[2:])
        assert keywords.keys() == {*options, *own}
        defaults = {name: keyword.default for name, keyword in keywords.items()}
        assert defaults == {name: p.default for name, p in options.items()} | own


def test_the_mean_of_one_state_is_that_state():
    states = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    torch.testing.assert_close(mean_vector(states[:1]), states[0])
    expected = (torch.tensor([0.6, 0.8]) + torch.tensor([0.0, 1.0])) / 2 * 3.5
    torch.testing.assert_close(mean_vector(states), expected)


def test_thoughts_on_disk_are_found_by_content_adapter_and_settings(taught, tmp_path, monkeypatch):
    model, items = taught()[0].model, taught()[1]
    first = ThinkingEmbedder(model, cot_cache_dir=tmp_path)
    written = first.encode_query(items, think="always", return_details=True)
    assert written.cot_cache_hits == 0
    second = ThinkingEmbedder(model, cot_cache_dir=tmp_path)
    read = second.encode_query(items[::-1], think="always", batch_size=2, return_details=True)
    assert (read.cot_cache_hits, "write" in read.timings) == (5, False)
    np.testing.assert_allclose(read.embeddings[::-1], written.embeddings, **NEAR)
    assert read.fallbacks == [3]
    assert read.think_tokens[::-1] == written.think_tokens
    options = {"think": "always", "return_details": True}
    half = second.encode_query([*items[:2], Item(text="zebra")], **options)
    assert half.cot_cache_hits == 2
    assert second.encode_query(items, max_think_tokens=4, **options).cot_cache_hits == 0
    assert second.encode_query(items, do_sample=True, **options).cot_cache_hits == 0
    assert second.encode_query(items, do_sample=True, seed=1, **options).cot_cache_hits == 0
    assert second.encode_query(items, do_sample=True, **options).cot_cache_hits == 5
    parameter = next(iter(adapter_parameters(model.peft_model, REASONING_ADAPTER).values()))
    monkeypatch.setattr(parameter, "data", parameter.data + 1e-3)
    third = ThinkingEmbedder(model, cot_cache_dir=tmp_path)
    assert third.encode_query(items, **options).cot_cache_hits == 0


def test_a_model_without_a_gate_says_where_to_get_one(make_model, make_items):
    embedder = ThinkingEmbedder(make_model("llama"))
    with pytest.raises(ValueError, match=r"no query gate .*recipes/gate_embed\.py"):
        embedder.encode_query(make_items("llama"))
    embedder.model.gates["query"] = Gate(embedder.model.hidden_size)
    with pytest.raises(ValueError, match=r"gate_threshold = None.*recipes/gate_embed\.py"):
        embedder.encode_query(make_items("llama"))
    embedder.encode_query(make_items("llama"), think_threshold=0.5)
    with pytest.raises(ValueError, match="no document gate"):
        embedder.encode_document(make_items("llama"), think="auto")


def test_shapes_and_types_are_those_of_sentence_transformers(make_model):
    embedder = ThinkingEmbedder(make_model("llama"))
    width = embedder.get_embedding_dimension()
    one, many = embedder.encode("camel"), embedder.encode(["camel", "pizza"])
    assert (one.shape, many.shape, many.dtype) == ((width,), (2, width), np.float32)
    np.testing.assert_allclose(one, many[0], **NEAR)
    np.testing.assert_allclose(np.linalg.norm(many, axis=1), 1, rtol=1e-5)
    assert embedder.encode([]).shape == (0, width)
    assert embedder.encode([], think="always", convert_to_tensor=True).shape == (0, width)
    tensor = embedder.encode(["camel"], convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    assert [row.shape for row in embedder.encode(["camel"], convert_to_numpy=False)] == [(width,)]
    short = embedder.encode(["camel"], truncate_dim=5)
    np.testing.assert_allclose(short[0], many[0, :5] / np.linalg.norm(many[0, :5]), **NEAR)
    raw = embedder.encode(["camel"], normalize_embeddings=False)
    assert abs(np.linalg.norm(raw) - 1) > 0.1
    np.testing.assert_allclose(raw / np.linalg.norm(raw), many[:1], **NEAR)
    assert embedder.modalities == ["text", "message"]
    assert not embedder.supports("image")


@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_quantised_vectors_belong_to_their_input_alone(make_model, precision):
    embedder = ThinkingEmbedder(make_model("llama"))
    texts = ["camel", "pizza zebra", "tree"]
    exact = embedder.encode(texts)
    rows = embedder.encode(texts, precision=precision)
    np.testing.assert_array_equal(rows[1], embedder.encode(texts[1], precision=precision))
    assert rows.dtype == (np.uint8 if precision.startswith("u") else np.int8)
    if precision.endswith("int8"):
        back = rows.astype(np.float32) - (128 if precision == "uint8" else 0)
        cosines = embedder.similarity_pairwise(back, exact)
        assert cosines.min() > 0.999
    else:
        bits = np.unpackbits((rows.astype(np.int16) + (precision == "binary") * 128).astype("u1"))
        np.testing.assert_array_equal(bits.reshape(3, -1).astype(bool), exact > 0)
    with pytest.raises(TypeError, match="expected floating point"):
        embedder.similarity(rows, rows)


def test_similarity_is_the_cosine_of_all_pairs_or_of_pairs(make_model):
    embedder = ThinkingEmbedder(make_model("llama"))
    left, right = np.array([[2.0, 0.0], [3.0, 3.0]]), [[0.0, 5.0], [1.0, 0.0]]
    root = 0.5**0.5
    torch.testing.assert_close(
        embedder.similarity(left, right), torch.tensor([[0.0, 1.0], [root, root]])
    )
    torch.testing.assert_close(embedder.similarity_pairwise(left, right), torch.tensor([0.0, root]))
    rows = embedder.encode(["camel", "pizza"], convert_to_numpy=False)
    assert embedder.similarity(rows[0], rows).shape == (1, 2)
    with pytest.raises(ValueError, match="2 queries and 1 documents"):
        embedder.similarity_pairwise(left, left[:1])


def test_bad_inputs_raise_with_their_position_or_are_skipped_and_named(
    make_model, tmp_path, caplog
):
    embedder = ThinkingEmbedder(make_model())
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    inputs = ["camel", broken, picture(1), None, "\x00 pizza", "tree"]
    with pytest.raises(InputError, match="input 3: value = None"):
        embedder.encode(inputs)
    with pytest.raises(InputError, match=r"input 1: .*cannot be decoded"):
        embedder.encode(inputs[:3])
    with caplog.at_level(logging.WARNING):
        details = embedder.encode(inputs, think="always", on_bad_input="skip", return_details=True)
    assert sorted(details.errors) == [1, 3, 4]
    assert "cannot be decoded" in details.errors[1]
    np.testing.assert_array_equal(details.embeddings[[1, 3, 4]], 0)
    expected = embedder.encode(["camel", picture(1), "tree"], think="always")
    np.testing.assert_allclose(details.embeddings[[0, 2, 5]], expected, **NEAR)
    assert sum("3 inputs were skipped" in record.message for record in caplog.records) == 1
    nothing = embedder.encode([None], on_bad_input="skip", precision="int8")
    np.testing.assert_array_equal(nothing, 0)


def test_a_vector_that_is_not_finite_is_an_error_and_never_returned(make_model):
    model = make_model("llama")
    embedder = ThinkingEmbedder(model)
    table = model.backbone.model.get_input_embeddings()
    zebra = model.tokenizer.convert_tokens_to_ids("zebra")
    weight = next(p for n, p in table.named_parameters() if n.endswith("weight"))
    with torch.no_grad():
        weight[zebra] = float("nan")
    with pytest.raises(InputError, match="input 1: its vector holds NaN"):
        embedder.encode(["camel", "zebra"], batch_size=1)
    details = embedder.encode(["zebra", "camel"], on_bad_input="skip", return_details=True)
    assert list(details.errors) == [0]
    assert np.isfinite(details.embeddings).all()


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_long_texts_are_cut_at_their_end_and_counted(make_model, caplog, name):
    embedder = ThinkingEmbedder(make_model(name))
    images = (picture(1),) if name == "idefics3" else ()
    words = "camel pizza zebra tree " * 20
    long, short = Item(instruction="find it", text=words, images=images), Item(text="pizza")
    assert embedder.max_seq_length == 512 - 8 - 3
    batch = embedder.model.collate([long])
    embedder.max_seq_length = batch["input_ids"].shape[1] - 75
    with caplog.at_level(logging.WARNING):
        details = embedder.encode([short, long], return_details=True)
    assert details.truncated == [1]
    assert sum("cut to max_seq_length" in record.message for record in caplog.records) == 1
    kept = Item(instruction="find it", text=" ".join(words.split()[:5]), images=images)
    expected = embedder.encode([short, kept], return_details=True)
    assert expected.truncated == []
    np.testing.assert_allclose(details.embeddings, expected.embeddings, **NEAR)
    embedder.max_seq_length = 3
    with pytest.raises(InputError, match=r"input \d: prompt has .* no more text to cut"):
        embedder.encode([short, long])
    with pytest.raises(ValueError, match="leaves no room"):
        embedder.encode(short, max_think_tokens=600)
    with pytest.raises(ValueError, match="max_seq_length = 0"):
        embedder.max_seq_length = 0


def test_every_problem_of_the_options_is_named_at_once(make_model):
    encode: Any = ThinkingEmbedder(make_model("llama")).encode
    with pytest.raises(ValueError, match=r"(?s)batch_size = 0.*") as caught:
        encode(["camel"], think="sometimes", batch_size=0, num_thoughts=3, top_p=2.0)
    for part in ("think = 'sometimes'", "top_p = 2.0", "do_sample=True", "batch_size = 0"):
        assert part in str(caught.value)
    with pytest.raises(TypeError, match=r"unknown arguments \['trunkate_dim'\]"):
        encode(["camel"], trunkate_dim=3)
    with pytest.raises(ValueError, match=r"2 values\) for 1 inputs"):
        encode(["camel"], think=[True, False])
    with pytest.raises(ValueError, match="without a gate"):
        encode(["camel"], think="always", think_rate=0.5)
    with pytest.raises(ValueError, match="truncate_dim = 1000"):
        encode(["camel"], truncate_dim=1000)
    with pytest.raises(ValueError, match="side = 'target'"):
        encode(["camel"], side="target")


def test_a_stored_model_is_served_and_the_package_stays_light(make_model, make_backbone, tmp_path):
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    embedder = ThinkingEmbedder.from_pretrained(
        tmp_path, backbone=make_backbone("llama"), device="cpu", cot_cache_dir=tmp_path / "cots"
    )
    expected = ThinkingEmbedder(model).encode(["camel"])
    np.testing.assert_allclose(embedder.encode(["camel"]), expected, **NEAR)
    assert embedder.device == torch.device("cpu")
    code = (
        "import sys, twn_rl; assert 'torch' not in sys.modules; "
        "from twn_rl import ThinkingEmbedder; assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
