"""Tiny random backbones of each family, built in code. Knows no expected values."""

import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hostile.table import PROPERTY, Tally, table_lines
from huggingface_hub import constants
from local_hub import LocalHub, running_hub
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLModel,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils import hub as hub_of_transformers

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.demo.random_qwen import ImageOnlyProcessor
from twn_rl.modeling.backbone import Backbone, from_parts
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

LONG_MARKERS = ("slow", "distributed")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Declare the switch of `make hostile`."""
    parser.addoption("--campaign", action="store_true", help="run tests marked campaign, too")


@pytest.fixture
def tally(request: pytest.FixtureRequest) -> Tally:
    """Return the verdicts of this test, which the table at the end of the run counts."""
    return Tally(request.node)


@contextmanager
def logs_restored() -> Iterator[None]:
    """Take back what a command that ran in this process did to logs and uncaught errors."""
    root = logging.getLogger()
    level, handlers, hook = root.level, list(root.handlers), sys.excepthook
    yield
    root.setLevel(level)
    root.handlers[:] = [each for each in root.handlers if each in handlers]
    sys.excepthook = hook


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """Leave logs to the next test as they were."""
    with logs_restored():
        yield


@pytest.fixture(autouse=True, scope="module")
def logs_as_before_the_file() -> Iterator[None]:
    """Leave logs to the next file as they were, whatever this one's own fixtures have run."""
    with logs_restored():
        yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what became of all hostile cases of the run."""
    reports = [report for group in terminalreporter.stats.values() for report in group]
    verdicts = [
        (value[0], value[1])
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, value in report.user_properties
        if name == PROPERTY
    ]
    if verdicts:
        terminalreporter.section("hostile cases")
        for line in table_lines(verdicts):
            terminalreporter.write_line(line)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the long campaigns unless they are asked for, and then their quick subsets.

    The longest files come first, so that workers which share a run end at about the same time.
    """
    is_asked = config.getoption("campaign")
    left_out = [
        item
        for item in items
        if (item.name.endswith("[quick]") if is_asked else item.get_closest_marker("campaign"))
    ]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]
    length: Counter[Path] = Counter()
    for item in items:
        length[item.path] += sum(item.get_closest_marker(m) is not None for m in LONG_MARKERS)
    items.sort(key=lambda item: -length[item.path])


# Passes share pictures from the transformers on whose models take features made beforehand.
sharing_pictures = pytest.mark.skipif(
    "mm_encoder_outputs" not in inspect.signature(Qwen3VLModel.forward).parameters,
    reason="the models of this transformers take no features of pictures made beforehand",
)
WORDS = (  # noqa: SIM905 -- one string keeps the list readable
    "find the picture of a camel pizza zebra tree above below left right top bottom center it is "
    "one two three in row column which object answer Assistant: User: System:"
).split()
IDEFICS3_TEMPLATE = (
    "{% for m in messages %}<|im_start|> {{ m['role'] }} {% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>"
    "{% else %}{{ p['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant{% endif %}"
)
QWEN_TEMPLATE = IDEFICS3_TEMPLATE.replace(
    "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
).replace("<end_of_utterance>", "<|im_end|>")
TEXT_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}


def make_tokenizer(
    special: Sequence[str],
    *,
    eos: str,
    template: str | None,
    named: Mapping[str, str] | None = None,
) -> Any:
    """Return a word-level tokenizer; `<think>` tags are tokens but not special, as in Qwen3.

    `named` are special tokens that its processor looks for under a name, such as `boi_token`.
    """
    special = [*special, *(named or {}).values()]
    tokens = list(dict.fromkeys(["<pad>", "<unk>", *special, "<think>", "</think>", *WORDS]))
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token=eos,
        extra_special_tokens=dict(named or {}),
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


def make_idefics3() -> Backbone:
    """Idefics3 with its real processor: a 32-pixel picture is 2x2 tiles and a whole."""
    tiles = [f"<row_{row}_col_{col}>" for row in range(1, 4) for col in range(1, 4)]
    special = [
        "<end_of_utterance>",
        "<|im_start|>",
        "<fake_token_around_image>",
        "<global-img>",
        "<image>",
        *tiles,
    ]
    tokenizer = make_tokenizer(special, eos="<end_of_utterance>", template=IDEFICS3_TEMPLATE)
    images = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}, do_image_splitting=True
    )
    processor = Idefics3Processor(images, tokenizer, image_seq_len=1)
    processor.chat_template = IDEFICS3_TEMPLATE
    padding: Any = {"pad_token_id": tokenizer.pad_token_id}
    config = Idefics3Config(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "image_size": 16,
            "patch_size": 8,
        },
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), **TEXT_CONFIG},
        scale_factor=2,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=True,
        **padding,
    )
    return from_parts(_seeded(Idefics3ForConditionalGeneration, config), processor)


def _qwen_parts(patch_size: int) -> tuple[ImageOnlyProcessor, dict[str, Any]]:
    """Return a processor that makes 4 x 4 patches, 2 x 2 tokens, of a picture, and token ids."""
    special = ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>"]
    special += ["<|image_pad|>", "<|video_pad|>"]
    tokenizer = make_tokenizer(special, eos="<|im_end|>", template=QWEN_TEMPLATE)
    ids = {
        f"{name}_token_id": tokenizer.convert_tokens_to_ids(token)
        for name, token in (
            ("image", "<|image_pad|>"),
            ("video", "<|video_pad|>"),
            ("vision_start", "<|vision_start|>"),
            ("vision_end", "<|vision_end|>"),
        )
    }
    # Qwen tables have more rows than the tokenizer has tokens, and read-outs fit in there.
    ids["vocab_size"] = len(tokenizer) + 24
    side = (4 * patch_size) ** 2
    pictures = Qwen2VLImageProcessorPil(
        patch_size=patch_size, size={"shortest_edge": side, "longest_edge": 2 * side}
    )
    return ImageOnlyProcessor(pictures, tokenizer), ids


def make_qwen3_vl() -> Backbone:
    """Qwen3-VL with interleaved 3-D positions and DeepStack after both layers."""
    processor, ids = _qwen_parts(16)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLConfig(
        text_config={
            **TEXT_CONFIG,
            "vocab_size": ids.pop("vocab_size"),
            "head_dim": 8,
            "rope_parameters": {**rope, "rope_theta": 10000.0},
        },
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 16,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    return from_parts(_seeded(Qwen3VLForConditionalGeneration, config), processor)


def make_qwen2_5_vl() -> Backbone:
    """Qwen2.5-VL, whose vision tower has gate, up and down maps of the decoder's names."""
    processor, ids = _qwen_parts(14)
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    config = Qwen2_5_VLConfig(
        text_config={**TEXT_CONFIG, "vocab_size": ids.pop("vocab_size"), "rope_parameters": rope},
        vision_config={
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        tie_word_embeddings=True,
        **ids,
    )
    return from_parts(_seeded(Qwen2_5_VLForConditionalGeneration, config), processor)


def make_llama() -> Backbone:
    """A text-only LM with untied embeddings and a tokenizer without a chat template."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = LlamaConfig(**{**TEXT_CONFIG, "tie_word_embeddings": False}, vocab_size=len(tokenizer))
    return from_parts(_seeded(LlamaForCausalLM, config), tokenizer)


def make_gemma3_text() -> Backbone:
    """Gemma 3's language model: every second layer sees eight columns back."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = Gemma3TextConfig(
        **TEXT_CONFIG,
        **_own_ids(tokenizer),
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention"],
    )
    return from_parts(_seeded(Gemma3ForCausalLM, config), tokenizer)


def make_qwen3_5_text() -> Backbone:
    """Qwen3.5's language model: every second layer is linear attention."""
    tokenizer = make_tokenizer(["<eos>"], eos="<eos>", template=None)
    config = Qwen3_5TextConfig(
        **TEXT_CONFIG,
        **_own_ids(tokenizer),
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10000.0,
            "mrope_section": [2, 1, 1],
            "partial_rotary_factor": 1.0,
        },
    )
    return from_parts(_seeded(Qwen3_5ForCausalLM, config), tokenizer)


def _own_ids(tokenizer: Any) -> dict[str, Any]:
    return {
        "vocab_size": len(tokenizer) + 24,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
    }


def _seeded(model_class: Any, config: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return model_class(config).eval()


BACKBONES: dict[str, Callable[[], Backbone]] = {
    "idefics3": make_idefics3,
    "qwen3_vl": make_qwen3_vl,
    "qwen2_5_vl": make_qwen2_5_vl,
    "llama": make_llama,
}
# Text models whose layers count columns; their prompts are those of "llama".
COUNTING_BACKBONES: dict[str, Callable[[], Backbone]] = {
    "gemma3_text": make_gemma3_text,
    "qwen3_5_text": make_qwen3_5_text,
}


@pytest.fixture
def make_backbone() -> Callable[[str], Backbone]:
    """Return name -> new tiny backbone, the same weights at each call."""
    return lambda name: BACKBONES[name]()


@pytest.fixture
def make_model() -> Callable[..., DualLoraModel]:
    """Return (name, **config) -> model with awakened adapters, so that they change every output."""

    def make(name: str = "idefics3", *, seed: int = 0, **settings: Any) -> DualLoraModel:
        settings = {
            "reasoning_lora": LoraSettings(r=2, alpha=4),
            "embedding_lora": LoraSettings(r=3, alpha=6),
            "num_readout_tokens": 3,
            "max_think_tokens": 8,
            **settings,
        }
        backbone = {**BACKBONES, **COUNTING_BACKBONES}[name]()
        model = DualLoraModel.from_backbone(backbone, TwnConfig(**settings), seed=seed)
        awaken(model, seed)
        return model.eval()

    return make


def awaken(model: DualLoraModel, seed: int = 0) -> None:
    """Give LoRA's B matrices, which start at zero, random values."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def picture(seed: int, width: int = 32, height: int = 32) -> Image.Image:
    """Return a picture of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def make_items() -> Callable[[str], list[Item]]:
    """Return name -> items of different lengths: text, one image, several images, video frames."""

    def make(name: str) -> list[Item]:
        text = [
            Item(instruction="find the picture of a camel"),
            Item(text="pizza"),
            Item(instruction="which object is in the top row", text="left of the zebra"),
        ]
        if name in ("llama", *COUNTING_BACKBONES):
            return text
        side = {"qwen3_vl": 64, "qwen2_5_vl": 56}.get(name, 32)
        return [
            *text[:2],
            Item(instruction="which object is it", images=(picture(1, side, side),)),
            Item(text="tree", images=(picture(2, side, side), picture(3, 2 * side, side))),
            Item(instruction="answer", video=(picture(4, side, side), picture(5, side, side))),
        ]

    return make


def picture_records(folder: Path, count: int = 6, *, with_cots: bool = True) -> RecordSet:
    """Write and load records whose queries are pictures and whose targets are pictures or words.

    Every second target is a picture; the last record shares its positive with the first.
    """
    objects = ["camel", "pizza", "zebra", "tree"]
    sides = ["left", "right", "above", "below"]
    records = []
    for i in range(count):
        for name in (f"scene{i}", f"object{i}"):
            picture(1000 * i + len(name)).save(folder / f"{name}.png")
        word = Item(text=f"{objects[i % 4]} {sides[i // 4 % 4]}")
        positive = Item(images=(f"object{i}.png",)) if i % 2 else word
        if i == count - 1:
            positive = records[0].positive
        records.append(
            Record(
                id=f"r{i}",
                source="test",
                query=Item("find the object", f"{sides[i % 4]} of", (f"scene{i}.png",)),
                positive=positive,
                negatives=(Item(text="center"), Item(text="row"), Item(text="column"))[: i % 4],
                query_cot=f"{objects[i % 4]} {sides[i % 4]} " * (1 + i % 2) if with_cots else None,
                metadata={"pool": "all", "task": "find", "hops": i % 3},
            )
        )
    write_records(folder / "records.jsonl", records)
    return load_records(folder / "records.jsonl")


@pytest.fixture
def records(tmp_path: Path) -> RecordSet:
    """Six records with random pictures on disk."""
    folder = tmp_path / "records"
    folder.mkdir()
    return picture_records(folder)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalHub]:
    """Let everything that speaks to the hub speak to one on loopback, with an empty cache."""
    with running_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_of_transformers, "_hf_api", None)  # remembers where the hub was
        yield running
