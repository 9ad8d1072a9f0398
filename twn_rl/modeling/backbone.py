"""Any Hugging Face VLM or causal LM with its processor, and where its language layers are.

Knows no adapters and no read-out; nothing here depends on what the model will be trained for.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.cache_utils import DynamicCache, DynamicLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from twn_rl.data.chat import PLAIN_CHAT_TEMPLATE, Renderer
from twn_rl.data.markup import KNOWN_TOKENS, Markup
from twn_rl.modeling.hub import HubAccess
from twn_rl.modeling.pooled_token import stop_appending
from twn_rl.modeling.tensor_files import damage_named

_CONFIG_TOKEN_PREFIXES = ("image", "video", "vision", "audio", "boi", "eoi")
_CONFIG_TOKEN_SUFFIXES = ("_token_id", "_token_index")


@dataclass
class Backbone:
    """A model, its processor and what the adapters need to know about it.

    Attributes:
        model: The whole model with its language head.
        processor: The processor of a VLM, the tokenizer of an LM.
        tokenizer: The tokenizer inside `processor`.
        is_multimodal: Whether items may hold images.
        language_prefix: Qualified module name of the decoder, the parent of `layers`.
        hidden_size: Width D of the decoder.
        uses_mrope: Whether positions are 3-D (Qwen-VL family) and come from `get_rope_index`.
        name: Name or path it was loaded from; empty if built in code.
        revision: Commit it was loaded at.
        appended_token_id: Token that the tokenizer wrote behind every text until it was told to
            stop, since prompts are written on from; embedders of the Qwen family pool it.
        picture_tokens: Tokens that the model's config names as places of pictures and videos.
        blank_picture: Processor's tensors of a blank picture, made when first needed.
    """

    model: PreTrainedModel
    processor: Any
    tokenizer: Any  # transformers types special tokens as int | list | str
    is_multimodal: bool
    language_prefix: str
    hidden_size: int
    uses_mrope: bool
    name: str = ""
    revision: str | None = None
    appended_token_id: int | None = None
    picture_tokens: frozenset[str] = frozenset()
    blank_picture: dict[str, Any] | None = None
    _markups: dict[Any, Markup] = field(default_factory=dict, init=False, repr=False)

    @property
    def inner_model(self) -> nn.Module:
        """The model without its language head."""
        return getattr(self.model, self.model.base_model_prefix)

    @property
    def eos_token_id(self) -> int:
        """The token that ends a completion."""
        return int(self.tokenizer.eos_token_id)

    @property
    def counts_columns(self) -> bool:
        """Whether padding within a row would move what a later token sees.

        Sliding windows count columns, padding or not, and linear attention forgets a little at
        each. Full attention has masks and positions, which know what is padding.
        """
        layers = DynamicCache(config=self.model.config.get_text_config(decoder=True)).layers
        return any(type(layer) is not DynamicLayer for layer in layers)

    def suppressed_token_ids(self, keep: Iterable[str] = ()) -> list[int]:
        """Return the sorted ids a policy must never write.

        These are image and video placeholders, vision and turn marks, read-out tokens, every other
        special token, and rows of the output layer that no token belongs to. A placeholder inside a
        completion would make the next forward look for an image that does not exist.

        Args:
            keep: Tokens to allow although they are special, such as think tags. The end-of-sequence
                token is always allowed.
        """
        vocabulary = self.tokenizer.get_vocab()
        suppressed = set(self.tokenizer.all_special_ids)
        suppressed |= {vocabulary[token] for token in self._special_tokens()}
        text_config = self.model.config.get_text_config(decoder=True)
        suppressed |= set(range(len(self.tokenizer), text_config.vocab_size))
        allowed = {vocabulary[token] for token in keep if token in vocabulary}
        return sorted(suppressed - allowed - {self.eos_token_id})

    def markup(self, renderer: Renderer) -> Markup:
        """Return what gives prompts their structure, and stays text where people wrote it.

        These are special tokens, known ones of other families that the tokenizer has, what the
        config names, added tokens that the chat template writes, read-outs, and think markers.
        """
        key = len(self.tokenizer), renderer.think_open, renderer.think_close
        if key not in self._markups:
            template = str(getattr(self.processor, "chat_template", None) or "")
            added = {str(token) for token in self.tokenizer.added_tokens_decoder.values()}
            written = {token for token in added if token in template}
            backend = getattr(self.tokenizer, "backend_tokenizer", None)
            normalizer = getattr(backend, "normalizer", None)
            self._markups[key] = Markup(
                [renderer.think_open, renderer.think_close, *written, *self._special_tokens()],
                getattr(normalizer, "normalize_str", None),
            )
        return self._markups[key]

    def _special_tokens(self) -> set[str]:
        vocabulary = self.tokenizer.get_vocab()
        added = self.tokenizer.added_tokens_decoder.values()
        special = {str(token) for token in added if token.special}
        special |= {*self.tokenizer.all_special_tokens, *KNOWN_TOKENS, *self.picture_tokens}
        return special & set(vocabulary)


def _config_token_ids(config: Any) -> set[int]:
    values = {
        value
        for name, value in config.to_dict().items()
        if name.startswith(_CONFIG_TOKEN_PREFIXES) and name.endswith(_CONFIG_TOKEN_SUFFIXES)
    }
    vocab_size = config.get_text_config(decoder=True).vocab_size
    return {value for value in values if isinstance(value, int) and 0 <= value < vocab_size}


@contextmanager
def whole_parameters() -> Iterator[None]:
    """Load whole weights although a ZeRO-3 config is alive.

    transformers would otherwise hand out partitioned, empty tensors, and adapters could not be
    created on them without a GPU. DeepSpeed partitions the weights later, when it is initialised;
    the price is one full copy of the backbone per process in host memory until then.
    """
    from transformers.integrations import deepspeed

    alive = deepspeed._hf_deepspeed_config_weak_ref
    deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = alive


def load_backbone(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: str | torch.dtype | None = "auto",
    trust_remote_code: bool = False,
    attn_implementation: str | None = None,
    with_weights: bool = True,
    access: HubAccess | None = None,
) -> Backbone:
    """Return the backbone stored at `name_or_path`; weights come from safetensors only.

    Args:
        name_or_path: Hub name or local folder.
        revision: Commit, tag or branch of a hub name.
        dtype: Parameter type; "auto" keeps the stored one.
        trust_remote_code: Allow code from the hub; off unless you read that code.
        attn_implementation: Attention kernel; None leaves the choice to transformers.
        with_weights: False reads none and leaves the model on the meta device, which is enough to
            render and tokenize.
        access: How the hub may be asked.

    Raises:
        ValueError: If weights are missing, or a file of weights is damaged.
    """
    shared: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    shared |= (access or HubAccess()).keywords()
    config = AutoConfig.from_pretrained(name_or_path, **shared)
    is_vlm = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    model_class = AutoModelForImageTextToText if is_vlm else AutoModelForCausalLM
    processor_class = AutoProcessor if is_vlm else AutoTokenizer
    processor = processor_class.from_pretrained(name_or_path, **shared)
    if with_weights:
        with whole_parameters(), damage_named(name_or_path):
            loaded: Any = model_class.from_pretrained(
                name_or_path,
                dtype=dtype or "auto",
                use_safetensors=True,
                attn_implementation=attn_implementation,
                output_loading_info=True,
                **shared,
            )
        model, found = loaded
        if missing := sorted(found["missing_keys"]):
            raise ValueError(
                f"backbone {name_or_path} lacks {len(missing)} weights of {type(model).__name__}, "
                f"such as {missing[0]}; expected all: the missing ones would be random; download "
                "it again, or name a backbone of this architecture"
            )
    else:
        with torch.device("meta"):
            model = model_class.from_config(config, trust_remote_code=trust_remote_code)
    backbone = from_parts(model, processor)
    backbone.name, backbone.revision = str(name_or_path), revision
    return backbone


def from_parts(model: PreTrainedModel, processor: Any) -> Backbone:
    """Return the backbone of a model and a processor that already exist.

    The tokenizer is set to left padding and gets a padding token and, if it is a plain tokenizer
    without a chat template, `PLAIN_CHAT_TEMPLATE`.

    Raises:
        ValueError: If there is no end-of-sequence token, no chat template on a processor, or no
            decoder layers can be found.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    is_multimodal = hasattr(processor, "image_processor")
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "tokenizer.eos_token = None; expected the token that ends a turn; "
            "set tokenizer.eos_token"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.padding_side = "left"
    if getattr(processor, "chat_template", None) is None:
        if is_multimodal:
            raise ValueError(
                f"processor {type(processor).__name__} has chat_template = None; expected the "
                "backbone's own template, which places its image tokens; use a chat model"
            )
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
    appended = stop_appending(tokenizer)
    picture_ids = sorted(_config_token_ids(model.config)) if is_multimodal else []
    return Backbone(
        model=model,
        processor=processor,
        tokenizer=tokenizer,
        is_multimodal=is_multimodal,
        language_prefix=_find_language_prefix(model),
        hidden_size=model.config.get_text_config(decoder=True).hidden_size,
        uses_mrope=hasattr(getattr(model, model.base_model_prefix, model), "get_rope_index"),
        name=getattr(model, "name_or_path", "") or "",
        appended_token_id=appended,
        picture_tokens=frozenset(tokenizer.convert_ids_to_tokens(picture_ids)) - {None},
    )


def _find_language_prefix(model: PreTrainedModel) -> str:
    decoder = model.get_decoder()
    for name, module in model.named_modules():
        if module is decoder and isinstance(getattr(module, "layers", None), nn.ModuleList):
            return name
    raise ValueError(
        f"{type(model).__name__}.get_decoder() gave {type(decoder).__name__} without `layers`; "
        "expected the language model's stack of layers; use another backbone"
    )
