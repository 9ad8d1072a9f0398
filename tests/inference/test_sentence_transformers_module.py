"""A saved folder is a model of sentence-transformers: the same vectors, and it thinks."""

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from made_records import picture
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import EncodeOptions
from twn_rl.inference.sentence_transformers_module import THINKING, ThinkingModule
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.sentence_transformers_import import MODULE_CLASS

QUESTIONS = ["which object is above the camel", "camel", "which object is at the north of it"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model on the embedded backbone whose gate lets some think."""
    from tiny_backbones import awaken

    rank = LoraSettings(r=2, alpha=4)
    settings: dict[str, Any] = {"reasoning_lora": rank, "embedding_lora": rank}
    config = TwnConfig(max_think_tokens=6, gate_threshold=0.5, **settings)
    model = DualLoraModel.from_backbone(str(BACKBONE_DIR), config)
    awaken(model)
    gate = Gate(model.hidden_size)
    gate.fitted_to = Fingerprints(model).gate_origin
    model.gates["query"] = gate
    path = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def both(folder: Path) -> tuple[Any, Any]:
    """Return our embedder and their model of one folder."""
    ours = ThinkingEmbedder.from_pretrained(folder, device="cpu")
    return ours, SentenceTransformer(str(folder), device="cpu", trust_remote_code=False)


def inputs_of_every_kind() -> list[Any]:
    image, other = picture(1, 64, 64), picture(2, 64, 64)
    return [
        *QUESTIONS,
        image,
        {"image": image, "text": "which object is it"},
        {"image": [image, other], "text": "camel"},
        {"video": [image, other]},
        [{"role": "user", "content": [{"type": "image", "image": image}]}],
    ]


@pytest.mark.parametrize("think", ["never", "always", "auto"])
def test_vectors_are_bit_equal_for_every_kind_of_input(both: Any, think: str) -> None:
    ours, theirs = both
    inputs = inputs_of_every_kind()
    options = {"think": think, "seed": 3}
    expected = ours.encode_query(inputs, **options)
    np.testing.assert_array_equal(theirs.encode_query(inputs, **options), expected)
    for value in inputs[::3]:
        np.testing.assert_array_equal(
            theirs.encode_query(value, **options), ours.encode_query(value, **options)
        )
    assert expected.shape == (len(inputs), theirs.get_embedding_dimension())


def test_sides_think_by_default_as_ours_do(both: Any) -> None:
    ours, theirs = both
    for name in ("encode", "encode_query", "encode_document"):
        expected = getattr(ours, name)(QUESTIONS)
        np.testing.assert_array_equal(getattr(theirs, name)(QUESTIONS), expected)
    details = ours.encode_query(QUESTIONS, return_details=True, think_threshold=0.5)
    rows = theirs.encode_query(QUESTIONS, output_value=None, think_threshold=0.5)
    assert [int(row["think_tokens"]) for row in rows] == details.think_tokens
    found = [float(row["gate_probability"]) for row in rows]
    np.testing.assert_allclose(found, details.gate_probabilities, rtol=1e-5)
    assert set(theirs.get_model_kwargs()) == {"task", *THINKING}


def test_what_their_model_promises_holds(both: Any) -> None:
    ours, theirs = both
    assert isinstance(theirs[0], ThinkingModule)
    assert theirs.modalities == ours.modalities
    assert theirs.supports(("image", "text"))
    assert theirs.max_seq_length == ours.max_seq_length
    assert theirs.tokenizer.get_vocab() == ours.tokenizer.get_vocab()
    assert theirs.similarity_fn_name == "cosine"
    short = theirs.encode(QUESTIONS, truncate_dim=5, normalize_embeddings=True)
    np.testing.assert_allclose(short, ours.encode(QUESTIONS, truncate_dim=5), atol=1e-6)
    prompted = theirs.encode(QUESTIONS, prompt="find the name")
    np.testing.assert_array_equal(prompted, ours.encode(QUESTIONS, prompt="find the name"))
    assert np.abs(prompted - ours.encode(QUESTIONS)).max() > 1e-3
    ids = {str(row): text for row, text in enumerate(QUESTIONS)}
    relevant = {name: {name} for name in ids}
    evaluator = InformationRetrievalEvaluator(ids, ids, relevant)
    assert evaluator(theirs) == evaluator(ours)


def test_every_way_to_think_is_offered_but_what_a_batch_cannot_know() -> None:
    own = [f.name for f in fields(EncodeOptions) if f.kw_only and f.name != "_"]
    left_out = {"think_rate", "on_bad_input", "prefix_cache_gib", "return_details"}
    assert set(own) - set(THINKING) == left_out
    assert set(THINKING) <= set(own)


def test_what_a_batch_cannot_know_is_refused(both: Any) -> None:
    _, theirs = both
    with pytest.raises(ValueError, match="think_rate"):
        theirs.encode_query(QUESTIONS, think_rate=0.5)
    with pytest.raises(ValueError, match="expected one mode for all inputs"):
        theirs.encode_query(QUESTIONS, think=[True, False, True])
    with pytest.raises(ValueError, match="think = 'often', expected one of"):
        theirs.encode_query(QUESTIONS, think="often")
    with pytest.raises(ValueError, match=r"model_kwargs = \['device_map'\]; expected only dtype"):
        ThinkingModule.load("anywhere", model_kwargs={"device_map": "auto"})
    module = theirs[0]
    module.train()
    try:
        with pytest.raises(RuntimeError, match="twn-rl sft"):
            module(module.preprocess(QUESTIONS))
    finally:
        module.eval()


def test_saving_and_loading_there_keeps_vectors_and_prompts(
    folder: Path, both: Any, tmp_path: Path
) -> None:
    ours, _ = both
    prompts = {"query": "find the name"}
    theirs: Any = SentenceTransformer(str(folder), device="cpu", prompts=prompts)
    theirs.save_pretrained(str(tmp_path / "again"))
    again: Any = SentenceTransformer(str(tmp_path / "again"), device="cpu")
    assert again.prompts["query"] == "find the name"
    expected = ours.encode_query(QUESTIONS, prompt="find the name")
    np.testing.assert_array_equal(again.encode_query(QUESTIONS), expected)
    back = ThinkingEmbedder.from_pretrained(tmp_path / "again", device="cpu")
    np.testing.assert_array_equal(back.encode_query(QUESTIONS), expected)
    back.model.save_pretrained(tmp_path / "again")  # as a recipe that goes on in this folder
    kept = ThinkingEmbedder.from_pretrained(tmp_path / "again", device="cpu")
    assert kept.prompts == back.prompts
    half: Any = SentenceTransformer(str(folder), model_kwargs={"dtype": torch.bfloat16})
    assert half.dtype is torch.bfloat16


SCRIPT = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
folder, texts = sys.argv[1], sys.argv[2:]
try:
    SentenceTransformer(folder, device="cpu")
except ValueError as error:
    assert "trust_remote_code" in str(error), error
    assert "twn_rl.inference.sentence_transformers_module.ThinkingModule" in str(error), error
else:
    raise AssertionError("loaded a class that nobody has imported")
assert "twn_rl" not in sys.modules
model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
np.save(folder + "/flag.npy", model.encode_query(texts))
"""
AFTER = """
import sys
import numpy as np
from sentence_transformers import SentenceTransformer
import twn_rl
assert "twn_rl.inference.sentence_transformers_module" not in sys.modules
model = SentenceTransformer(sys.argv[1], device="cpu", trust_remote_code=False)
np.save(sys.argv[1] + "/import.npy", model.encode_query(sys.argv[2:]))
"""


@pytest.mark.distributed
@pytest.mark.parametrize(("script", "file"), [(SCRIPT, "flag.npy"), (AFTER, "import.npy")])
def test_the_installed_class_is_loaded_by_their_flag_or_once_twn_rl_is_imported(
    folder: Path, both: Any, script: str, file: str
) -> None:
    command = [sys.executable, "-c", script, str(folder), *QUESTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(np.load(folder / file), both[0].encode_query(QUESTIONS))


def test_importing_twn_rl_imports_neither_torch_nor_sentence_transformers() -> None:
    code = (
        "import sys, twn_rl\n"
        "assert not {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules)\n"
        "assert type(sys.meta_path[0]).__name__ == '_Watch'\n"
        "from sentence_transformers.base.model import BaseModel\n"
        "assert type(sys.meta_path[0]).__name__ != '_Watch'\n"
        "assert list(BaseModel._module_classes) == [sys.argv[1]]\n"
        "assert 'twn_rl.inference.embedder' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, MODULE_CLASS], check=True, timeout=300)
