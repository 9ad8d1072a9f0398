"""Random Qwen3-VLs have the published sizes and read pictures as the family does."""

import pytest
import torch
from made_records import picture
from transformers import AutoModelForImageTextToText

from twn_rl.data.record import Item
from twn_rl.demo.random_qwen import SHAPES, make_config, make_tokenizer, random_backbone
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel


@pytest.mark.parametrize("name", ["2b", "4b", "8b"])
def test_a_shape_has_as_many_parameters_as_the_published_weights(name: str) -> None:
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(make_config(SHAPES[name]))
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].parameters


def test_the_tokenizer_leaves_rows_of_the_table_free_as_the_published_one_does() -> None:
    tokenizer = make_tokenizer(151936)
    assert len(tokenizer) == 151669
    assert tokenizer.tokenize("w7 <think> w8 </think>") == ["w7", "<think>", "w8", "</think>"]


def test_a_random_model_reads_a_picture_of_so_many_tokens_and_makes_a_vector() -> None:
    backbone = random_backbone("tiny", smallest_pixels=64 * 64)
    lora = LoraSettings(r=2, alpha=4)
    config = TwnConfig(reasoning_lora=lora, embedding_lora=lora)
    model = DualLoraModel.from_backbone(backbone, config)
    items = [Item(text="w1 w2", images=(picture(0, 64, 128),)), Item(text="w3")]
    batch = model.collate(items)
    image_id = backbone.tokenizer.convert_tokens_to_ids("<|image_pad|>")
    assert (batch["input_ids"] == image_id).sum(1).tolist() == [8, 0]
    assert batch["mm_token_type_ids"].sum().item() == 8
    vectors = model.embed(batch)
    assert vectors.shape == (2, 32)
    assert torch.allclose(vectors.norm(dim=-1), torch.ones(2), atol=1e-5)
    alone = model.embed(model.collate(items[1:]))
    assert torch.allclose(vectors[1], alone[0], atol=1e-5)


def test_videos_are_refused_where_nothing_can_read_them() -> None:
    processor = random_backbone("tiny").processor
    if type(processor).__name__ != "ImageOnlyProcessor":
        pytest.skip("torchvision is installed, and with it the family's own processor")
    with pytest.raises(ValueError, match="install torchvision"):
        processor(text="w1", videos=[[picture(0)]])
