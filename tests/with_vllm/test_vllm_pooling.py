"""A merged export in vLLM's pooling runner: its vectors are the model's without thinking.

Skipped where vLLM is missing; `make test-vllm` runs it.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: run `make test-vllm`", allow_module_level=True)

import torch
from made_records import picture
from vllm_models import make_vllm_model

from twn_rl.data.record import Item
from twn_rl.inference.export import export
from twn_rl.modeling.model import DualLoraModel

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, and many


def items_of(model: DualLoraModel) -> list[Item]:
    texts = [Item(text="camel left of the pizza"), Item(instruction="find it", text="zebra")]
    if not model.backbone.is_multimodal:
        return texts
    return [*texts, Item(text="tree", images=(picture(1, 64, 64),))]


def vllm_vectors(folder: Path, model: DualLoraModel, items: list[Item], readouts: int) -> Any:
    """Return vectors (N, D) of items by vLLM, as docs/serving.md has it."""
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    from transformers import AutoProcessor, AutoTokenizer
    from vllm import LLM  # pyright: ignore[reportMissingImports]
    from vllm.config import PoolerConfig  # pyright: ignore[reportMissingImports]

    auto: Any = AutoProcessor if model.backbone.is_multimodal else AutoTokenizer
    processor, renderer = auto.from_pretrained(folder), model.renderer
    prompts = []
    for item in items:
        messages = renderer.messages(item, model.backbone.is_multimodal)
        text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        prompts.append(
            {"prompt": text, "multi_modal_data": {"image": list(item.images)}}
            if item.images
            else {"prompt": text}
        )
    llm = LLM(
        model=str(folder),
        runner="pooling",
        pooler_config=PoolerConfig(
            task="embed" if readouts == 1 else "token_embed", use_activation=readouts == 1
        ),
        dtype="float32",
        load_format="safetensors",
        max_model_len=256,
        enforce_eager=True,
        disable_log_stats=True,
    )
    if readouts == 1:  # the last token's state, scaled to length 1: vLLM's own default
        vectors = np.array([output.outputs.embedding for output in llm.embed(prompts)])
    else:
        outputs = llm.encode(prompts, pooling_task="token_embed", use_tqdm=False)
        states = [output.outputs.data[-readouts:].float().mean(0) for output in outputs]
        vectors = torch.nn.functional.normalize(torch.stack(states), dim=-1).numpy()
    llm.llm_engine.engine_core.shutdown()
    return vectors


@pytest.mark.parametrize("readouts", [1, 3])
@pytest.mark.parametrize("name", ["embedded", "qwen3", "qwen3_vl"])
def test_merged_exports_give_the_vectors_of_the_model(
    name: str, readouts: int, tmp_path: Path
) -> None:
    model = make_vllm_model(name, tmp_path / "backbone", num_readout_tokens=readouts).eval()
    model.save_pretrained(tmp_path / "model")
    folder = export(tmp_path / "model", tmp_path / "merged", "merged")
    items = items_of(model)
    with torch.no_grad():
        expected = model.embed(model.collate(items)).numpy()
    found = vllm_vectors(folder, model, items, readouts)
    np.testing.assert_allclose(found, expected, atol=2e-4)
    assert np.abs(expected[0] - expected[1]).max() > 1e-3
