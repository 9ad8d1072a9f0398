"""ThinkingEmbedder takes what sentence-transformers' own functions pass to a model."""

import inspect
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from made_records import picture
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import (
    BinaryClassificationEvaluator,
    EmbeddingSimilarityEvaluator,
    InformationRetrievalEvaluator,
    NanoBEIREvaluator,
    RerankingEvaluator,
    TripletEvaluator,
)
from sentence_transformers.util import mine_hard_negatives, paraphrase_mining, semantic_search

from twn_rl.data.record import Item
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.inputs import InputError, as_list

WORDS = ["camel", "pizza", "zebra", "tree", "left of the camel", "row above", "center column"]

# What they have and we do not, and why.
MISSING_METHODS = {
    "active_adapters": "PEFT's adapters are this model's two, and calls switch them",
    "add_adapter": "same",
    "delete_adapter": "same",
    "disable_adapters": "same",
    "enable_adapters": "same",
    "get_adapter_state_dict": "same",
    "load_adapter": "same",
    "set_adapter": "same",
    "active_adapter": "same",
    "check_peft_compatible_model": "same",
    "has_peft_compatible_model": "same",
    "clear_placement_cache": "accelerate's device maps are not supported",
    "config": "the backbone's is `model.backbone.model.config`",
    "dtype": "the backbone's is `model.backbone.model.dtype`",
    "encode_multi_process": "deprecated by them: `encode` takes the pool",
    "fit": "trained by recipes",
    "old_fit": "trained by recipes",
    "smart_batching_collate": "trained by recipes",
    "get_sentence_features": "deprecated by them",
    "get_sentence_embedding_dimension": "deprecated by them",
    "truncate_sentence_embeddings": "deprecated by them",
    "get_backend": "torch is the only one",
    "get_max_seq_length": "deprecated by them: `max_seq_length`",
    "get_model_kwargs": "the keywords of `encode` are in its signature",
    "gradient_checkpointing_enable": "trained by recipes",
    "is_singular_input": "internal to their `encode`",
    "load": "deprecated by them: `from_pretrained`",
    "merge": "of whole models; adapters do not average",
    "preprocess": "items are rendered inside: what a prompt holds depends on who thinks",
    "tokenize": "deprecated by them, and as `preprocess`",
    "save": "`save_pretrained`",
    "save_to_hub": "deprecated by them: `push_to_hub`",
    "set_pooling_include_prompt": "there is no pooling",
    "transformers_model": "`model.backbone.model`",
}
MISSING_ARGUMENTS = {
    ("encode", "kwargs"): "an unknown keyword is an error",
    ("encode_query", "kwargs"): "same",
    ("encode_document", "kwargs"): "same",
    ("to", "kwargs"): "a device; the type of the weights is chosen at loading",
    ("to", "args"): "same",
}


def public_names(kind: type) -> set[str]:
    return {name for name in dir(kind) if not name.startswith("_")}


def test_every_public_name_of_theirs_is_ours_or_listed_with_a_reason() -> None:
    theirs = public_names(SentenceTransformer) - public_names(torch.nn.Sequential)
    theirs = {name for name in theirs if not name.isupper()} | {"to"}
    constants = {"default_huggingface_organization", "model_card_data_class", "model_type"}
    missing = theirs - public_names(ThinkingEmbedder) - constants
    assert missing == set(MISSING_METHODS), "list the new ones with a reason, or provide them"


SHARED = sorted(
    name
    for name in public_names(ThinkingEmbedder) & public_names(SentenceTransformer)
    if callable(getattr(SentenceTransformer, name))
)


@pytest.mark.parametrize("name", SHARED)
def test_a_shared_method_takes_their_arguments_in_their_order(name: str) -> None:
    theirs = inspect.signature(getattr(SentenceTransformer, name)).parameters
    ours = inspect.signature(getattr(ThinkingEmbedder, name)).parameters
    missing = {(name, argument) for argument in theirs if argument not in ours}
    assert missing == {pair for pair in MISSING_ARGUMENTS if pair[0] == name}
    by_position = [
        argument
        for argument, parameter in theirs.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]
    assert list(ours)[: len(by_position)] == by_position
    changed = {
        argument: (parameter.default, ours[argument].default)
        for argument, parameter in theirs.items()
        if argument in ours and parameter.default != ours[argument].default
    }
    is_encode = name.startswith("encode")
    assert changed == ({"normalize_embeddings": (False, True)} if is_encode else {})


def test_the_walk_would_notice_a_new_argument() -> None:
    assert "encode" in SHARED
    assert "start_multi_process_pool" in SHARED
    assert len(SHARED) >= 10


def test_loading_takes_what_their_constructor_takes_or_says_why_not() -> None:
    missing = {
        "model_name_or_path": "`path`",
        "modules": "a model is loaded whole",
        "trust_remote_code": "no code of the hub is ever run",
        "use_auth_token": "deprecated by them: `token`",
        "model_kwargs": "`dtype` and `backbone`",
        "processor_kwargs": "the checkpoint's settings decide",
        "config_kwargs": "same",
        "model_card_data": "an attribute: `model_card_data`",
        "backend": "torch is the only one",
        "similarity_fn_name": "always the cosine",
    }
    theirs = set(inspect.signature(SentenceTransformer.__init__).parameters) - {"self"}
    ours = set(inspect.signature(ThinkingEmbedder.from_pretrained).parameters)
    assert theirs - ours == set(missing)


@pytest.fixture
def embedder(make_model: Any) -> Any:
    """Return an embedder whose gate lets some queries think; typed loosely, as theirs is asked."""
    model = make_model("llama", gate_threshold=0.5)
    model.gates["query"] = HalfGate(model.hidden_size)
    return ThinkingEmbedder(model)


class HalfGate(torch.nn.Module):
    """Says yes to about half of all states."""

    def __init__(self, width: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.direction = torch.nn.Parameter(torch.randn(width, generator=generator))

    def probability(self, states: torch.Tensor) -> torch.Tensor:
        return (states @ self.direction).sigmoid()


def test_arguments_by_position_mean_what_theirs_mean(embedder: Any) -> None:
    rows = embedder.encode(WORDS, None, "find it", 2, False, "sentence_embedding", "int8")
    expected = embedder.encode(WORDS, prompt="find it", precision="int8")
    np.testing.assert_array_equal(rows, expected)
    assert rows.dtype == np.int8
    np.testing.assert_array_equal(embedder.encode(WORDS, precision=None), embedder.encode(WORDS))
    with pytest.raises(ValueError, match="output_value = 'token_embeddings', expected one of"):
        embedder.encode(WORDS, output_value="token_embeddings")


def test_prompts_are_instructions_chosen_by_name_side_and_default(make_model: Any) -> None:
    model = make_model("llama")
    prompts = {"query": "find the zebra", "passage": "row of the tree", "other": "above the pizza"}
    embedder = ThinkingEmbedder(model, prompts=prompts, default_prompt_name="other")
    plain = ThinkingEmbedder(model)
    never: dict[str, Any] = {"think": "never"}

    def by(prompt: str | None) -> Any:
        return plain.encode("camel", prompt=prompt)

    np.testing.assert_array_equal(embedder.encode_query("camel", **never), by("find the zebra"))
    np.testing.assert_array_equal(embedder.encode("camel"), by("above the pizza"))
    np.testing.assert_array_equal(
        embedder.encode("camel", prompt_name="query"), by(prompts["query"])
    )
    np.testing.assert_array_equal(embedder.encode("camel", "query", "above"), by("above"))
    # "document" is there and empty: as theirs, it is taken before "passage".
    np.testing.assert_array_equal(embedder.encode_document("camel"), by(""))
    assert np.abs(by("") - by("above the pizza")).max() > 1e-3
    own = {"text": "camel", "instruction": "center"}
    np.testing.assert_array_equal(embedder.encode(own), plain.encode(own))
    with pytest.raises(ValueError, match="prompt_name = 'gone'; expected one of"):
        embedder.encode("camel", prompt_name="gone")
    with pytest.raises(ValueError, match="prompt_name = 'gone'"):
        ThinkingEmbedder(model, default_prompt_name="gone")


def test_truncation_in_a_context_holds_for_calls_that_do_not_say(embedder: Any) -> None:
    width = embedder.get_embedding_dimension()
    with embedder.truncate_embeddings(5):
        assert embedder.encode(WORDS).shape == (len(WORDS), 5)
        assert embedder.get_embedding_dimension() == 5
        assert embedder.encode(WORDS, truncate_dim=7).shape[1] == 7
    assert embedder.encode(WORDS).shape[1] == width


def test_no_output_value_gives_a_dict_for_each_input(embedder: Any) -> None:
    rows = embedder.encode_query(WORDS, output_value=None)
    details = embedder.encode_query(WORDS, return_details=True)
    assert [row["think_tokens"] for row in rows] == details.think_tokens
    np.testing.assert_array_equal([row["sentence_embedding"] for row in rows], details.embeddings)
    assert any(row["thoughts"] for row in rows)
    one = embedder.encode_query(WORDS[0], output_value=None)
    np.testing.assert_allclose(one["sentence_embedding"], rows[0]["sentence_embedding"], atol=1e-6)


def test_their_kinds_of_input_mean_what_they_mean_there(make_model: Any, caplog: Any) -> None:
    embedder = ThinkingEmbedder(make_model())
    image, other = picture(1), picture(2)
    pixels = np.asarray(image)
    same = [
        (pixels, image),
        (torch.from_numpy(pixels.copy()).permute(2, 0, 1), image),
        ({"image": pixels, "text": "tree"}, Item(text="tree", images=(image,))),
        (
            {"image": [image, other], "text": ["tree", "row"]},
            Item(text="tree\nrow", images=(image, other)),
        ),
        ({"video": np.stack([pixels, np.asarray(other)])}, Item(video=(image, other))),
    ]
    for value, meant in same:
        np.testing.assert_array_equal(embedder.encode([value]), embedder.encode([meant]))
        np.testing.assert_array_equal(embedder.encode(value), embedder.encode(meant))
    message = {"role": "user", "content": "camel"}
    np.testing.assert_array_equal(embedder.encode(message), embedder.encode("camel"))
    assert as_list({"role": "user", "content": "camel"}) == [[{"role": "user", "content": "camel"}]]
    with pytest.raises(
        InputError, match=r"input 0: an array of shape \(8, 8\).*expected a picture"
    ):
        embedder.encode([np.zeros((8, 8))])
    assert embedder.supports(("image", "text"))
    assert not embedder.supports(("audio", "text"))
    assert not embedder.supports("audio")
    assert not ThinkingEmbedder(make_model("llama")).supports(("image", "text"))


def test_a_string_that_looks_like_a_file_is_text_and_says_so(embedder: Any, caplog: Any) -> None:
    with caplog.at_level(logging.WARNING):
        embedder.encode(["camel", "camel.png"])
    assert "1 of 2 inputs are strings that look like names of pictures ('camel.png')" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        embedder.encode(["the camel of camel.png"])
    assert not caplog.records


def test_the_similarity_is_the_cosine_and_no_other(embedder: Any) -> None:
    assert embedder.similarity_fn_name == "cosine"
    embedder.similarity_fn_name = None
    with pytest.raises(ValueError, match="similarity_fn_name = 'dot'; expected 'cosine'"):
        embedder.similarity_fn_name = "dot"
    assert embedder.to("cpu") is embedder
    assert embedder.encode(WORDS, device="cpu").shape[0] == len(WORDS)
    assert embedder.tokenizer is embedder.model.tokenizer
    assert embedder.processor is embedder.model.processor


def ranks_by_hand(embedder: Any) -> float:
    """Return hit@1 of each word against all of them, read as documents."""
    queries, documents = embedder.encode_query(WORDS), embedder.encode_document(WORDS)
    return float((np.argmax(queries @ documents.T, axis=1) == np.arange(len(WORDS))).mean())


def test_their_information_retrieval_evaluator_measures_what_we_would(embedder: Any) -> None:
    ids = {f"d{row}": word for row, word in enumerate(WORDS)}
    queries = {f"q{row}": word for row, word in enumerate(WORDS)}
    relevant = {f"q{row}": {f"d{row}"} for row in range(len(WORDS))}
    evaluator = InformationRetrievalEvaluator(queries, ids, relevant, name="words")
    found = embedder.evaluate(evaluator)
    assert found["words_cosine_accuracy@1"] == pytest.approx(ranks_by_hand(embedder))
    assert 0 < found["words_cosine_mrr@10"] <= 1
    noted = embedder.model_card_data.evaluations["words"]
    assert noted["words_cosine_mrr@10"] == found["words_cosine_mrr@10"]


def test_their_nano_beir_machinery_runs_on_local_data(
    embedder: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [{"_id": str(row), "text": word} for row, word in enumerate(WORDS)]
    qrels = [{"query-id": row["_id"], "corpus-id": row["_id"]} for row in rows]
    tables = {"corpus": rows, "queries": rows, "qrels": qrels}

    def local(self: Any, subset: str, split: str, required_columns: list[str]) -> Any:
        return Dataset.from_list(tables[subset])

    monkeypatch.setattr(NanoBEIREvaluator, "_load_dataset_subset_split", local)
    evaluator = NanoBEIREvaluator(["msmarco", "scifact"], query_prompts="find the camel")
    found = evaluator(embedder)
    assert 0 < found["NanoBEIR_mean_cosine_ndcg@10"] <= 1
    assert "NanoBEIR_mean" in embedder.model_card_data.evaluations


def test_their_other_evaluators_run(embedder: Any, tmp_path: Path) -> None:
    scores = [1.0, 0.2, 0.5, 0.1, 0.9, 0.3, 0.7]
    pairs = EmbeddingSimilarityEvaluator(WORDS, WORDS[::-1], scores, name="sts", precision="int8")
    assert -1 <= embedder.evaluate(pairs, str(tmp_path))["sts_spearman_cosine"] <= 1
    triplets = TripletEvaluator(WORDS, WORDS, WORDS[::-1], name="triplets")
    assert 0.5 <= triplets(embedder)["triplets_cosine_accuracy"] <= 1
    labels = [1, 0, 1, 0, 1, 0, 1]
    assert "two_cosine_ap" in BinaryClassificationEvaluator(WORDS, WORDS[::-1], labels, "two")(
        embedder
    )
    samples = [{"query": "camel", "positive": ["camel"], "negative": WORDS[1:]}]
    assert 0 < RerankingEvaluator(samples, name="rerank")(embedder)["rerank_map"] <= 1


def test_their_utilities_search_mine_paraphrases_and_negatives(embedder: Any) -> None:
    queries = embedder.encode_query(WORDS, convert_to_tensor=True)
    documents = embedder.encode_document(WORDS, convert_to_tensor=True)
    hits = semantic_search(queries, documents, top_k=1)
    best = [row[0]["corpus_id"] for row in hits]
    assert best == np.argmax((queries @ documents.T).numpy(), axis=1).tolist()
    doubled = [*WORDS, "camel"]
    best_pair: Any = paraphrase_mining(embedder, doubled)[0]
    score, first, second = best_pair
    assert {doubled[first], doubled[second]} == {"camel"}
    assert score == pytest.approx(1, abs=1e-5)
    data = Dataset.from_dict({"query": WORDS, "answer": WORDS[::-1]})
    mined: Any = mine_hard_negatives(data, embedder, num_negatives=2, verbose=False)
    assert {"query", "answer", "negative"} <= set(mined.column_names)
    for row in mined:
        assert row["negative"] in WORDS
        assert row["negative"] != row["answer"]


@pytest.mark.distributed
def test_several_processes_give_the_vectors_of_one(embedder: Any) -> None:
    options: dict[str, Any] = {"think": [row % 2 == 0 for row in range(7)], "return_details": True}
    expected = embedder.encode_query(WORDS, **options)
    pool = embedder.start_multi_process_pool(["cpu", "cpu"])
    try:
        details = embedder.encode_query(WORDS, pool=pool, chunk_size=3, **options)
        np.testing.assert_allclose(details.embeddings, expected.embeddings, atol=1e-5)
        assert details.thoughts == expected.thoughts
        assert details.fallbacks == expected.fallbacks
        tensor = embedder.encode(WORDS, pool=pool, convert_to_tensor=True)
        np.testing.assert_allclose(tensor.numpy(), embedder.encode(WORDS), atol=1e-5)
        assert embedder.encode([], pool=pool).shape == (0, embedder.get_embedding_dimension())
        assert embedder.encode("camel", pool=pool).ndim == 1
        with pytest.raises(InputError, match="input 5: value = None"):
            embedder.encode([*WORDS[:5], None], pool=pool, chunk_size=2)
        with pytest.raises(ValueError, match="think_rate in several processes"):
            embedder.encode_query(WORDS, pool=pool, think_rate=0.5)
    finally:
        embedder.stop_multi_process_pool(pool)
