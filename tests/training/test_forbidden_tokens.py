"""What rollouts by vLLM ask for, as far as no vLLM is needed; tests/with_vllm has the rest."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_backbones import make_idefics3

from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.vllm_rollouts import forbidden_tokens


def test_rows_that_read_outs_added_are_not_named_to_vllm(tmp_path: Path) -> None:
    backbone = make_idefics3()
    backbone.model.save_pretrained(tmp_path)
    backbone.processor.save_pretrained(tmp_path)
    embeddings = backbone.model.get_input_embeddings()
    assert isinstance(embeddings, torch.nn.Embedding)
    rows = embeddings.num_embeddings
    model = DualLoraModel.from_backbone(tmp_path, TwnConfig(num_readout_tokens=3))
    assert max(model.suppressed_token_ids) >= rows
    assert forbidden_tokens(model) == [row for row in model.suppressed_token_ids if row < rows]
    assert set(model.readout_ids).isdisjoint(forbidden_tokens(model))
