"""The embedded backbone, untrained: word-level tokenizer, small Idefics3."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    Idefics3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

from twn_rl.demo.scenes import GRID, PLACES, ROW_WORDS, STEPS, TILE_PIXELS, concepts

BACKBONE_DIR = Path(__file__).parent / "backbone"
MAX_READOUT_TOKENS = 16
EMBEDDING_STD = 0.1
MATCHING_HEADS = 2
MATCHING_GAIN = 3.5
FUNCTION_WORDS = (  # noqa: SIM905 -- one string keeps the list readable
    "which object is at the of in row where caption one find name picture scene place represent "
    "this with and category describe answer query document a an image text"
).split()
PUNCTUATION = (";", ".", ":", "?", ",")
SPECIAL_TOKENS = (
    "<pad>", "<unk>", "<bos>", "<end_of_utterance>", "<user>", "<assistant>", "<system>",
    "<think>", "</think>",
    "<fake_token_around_image>", "<global-img>", "<image>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}> "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<end_of_utterance>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def vocabulary() -> list[str]:
    """Return every token, special ones first; the order is the token id."""
    names = list(concepts())
    categories = list(dict.fromkeys(concepts().values()))
    tiles = [f"<row_{r + 1}_col_{c + 1}>" for r in range(GRID) for c in range(GRID)]
    readouts = [f"<|readout_{i}|>" for i in range(MAX_READOUT_TOKENS)]
    words = [*ROW_WORDS, *PLACES, *STEPS, *FUNCTION_WORDS, *PUNCTUATION]
    return list(dict.fromkeys([*SPECIAL_TOKENS, *tiles, *readouts, *words, *categories, *names]))


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Build the word-level tokenizer: one lower-case word, one token."""
    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = [t for t in tokens if t.startswith("<") and t not in ("<think>", "</think>")]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<bos>",
        eos_token="<end_of_utterance>",
        padding_side="left",
        model_max_length=512,
        chat_template=CHAT_TEMPLATE,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    tokenizer.add_tokens(["<think>", "</think>"])
    return tokenizer


def make_processor() -> Idefics3Processor:
    """Build the real Idefics3 processor: a 96x96 scene is 3x3 tiles and a whole, a token each."""
    image_processor = Idefics3ImageProcessorPil(
        size={"longest_edge": GRID * TILE_PIXELS},
        max_image_size={"longest_edge": TILE_PIXELS},
        do_image_splitting=True,
    )
    return Idefics3Processor(
        image_processor, make_tokenizer(), image_seq_len=1, chat_template=CHAT_TEMPLATE
    )


def make_model(processor: Idefics3Processor, *, seed: int = 0) -> Idefics3ForConditionalGeneration:
    """Build the VLM: SigLIP-style tower (patch 8, pixel shuffle 4) and a Llama decoder."""
    torch.manual_seed(seed)
    tokenizer = processor.tokenizer
    config = Idefics3Config(
        vision_config={
            "hidden_size": 96, "intermediate_size": 192,
            "num_hidden_layers": 3, "num_attention_heads": 4,
            "image_size": TILE_PIXELS, "patch_size": 8,
        },
        text_config={
            "model_type": "llama", "vocab_size": len(tokenizer),
            "hidden_size": 160, "intermediate_size": 448,
            "num_hidden_layers": 4, "num_attention_heads": 5, "num_key_value_heads": 5,
            "max_position_embeddings": 512, "tie_word_embeddings": True,
            "pad_token_id": tokenizer.pad_token_id, "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        },
        scale_factor=4,
        tie_word_embeddings=True,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        pad_token_id=tokenizer.pad_token_id,  # pyright: ignore[reportCallIssue]
    )  # fmt: skip
    model = Idefics3ForConditionalGeneration(config)
    _ease_matching(model)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.bos_token_id = tokenizer.bos_token_id
    return model


@torch.no_grad()
def _ease_matching(model: Idefics3ForConditionalGeneration) -> None:
    """Start where "the tile that shows this word" is easy to find: a match of two equal vectors.

    Words as long as what the layers add to them stay recognisable above the first layer, and in
    `MATCHING_HEADS` of each later layer queries equal keys, so that attention starts as content
    similarity. From ordinary initialisation the match was not found in 2,600 steps (object -> cell
    stayed at 1/9).
    """
    decoder = model.model.text_model
    decoder.embed_tokens.weight.normal_(std=EMBEDDING_STD)
    for layer in decoder.layers[1:]:
        attention = layer.self_attn
        rows = slice(0, MATCHING_HEADS * attention.head_dim)
        attention.k_proj.weight[rows] *= MATCHING_GAIN
        attention.q_proj.weight[rows] = attention.k_proj.weight[rows]
