"""A checkpoint as a folder that other programs load without this package.

`merged` makes vectors without thinking, `reasoner` writes the thoughts, `sentence-transformers`
is the whole checkpoint with its backbone inside. Thinks and trains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import PeftModel
from transformers import GenerationConfig

from twn_rl.modeling.adapter_files import save_adapter
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER
from twn_rl.modeling.backbone import Backbone, load_backbone
from twn_rl.modeling.backbone_names import plain_name
from twn_rl.modeling.hub import model_folder
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.whole_files import write_text, written_aside

_CARDS = Path(__file__).with_name("cards")
BACKBONE_DIR = "backbone"


def export(
    model: str | Path, output: str | Path, to: str, *, dtype: str | torch.dtype | None = None
) -> Path:
    """Write a checkpoint in another form, and return the new folder; a kill leaves none.

    Args:
        model: Folder of a checkpoint, or "owner/name" on the hub.
        output: Folder to make; it must not exist.
        to: One of `EXPORTS`.
        dtype: Parameter type to merge in and to write; None keeps the stored one. Merging in
            bfloat16 rounds every weight.

    Raises:
        FileExistsError: If there is something at `output`.
        ValueError: If the checkpoint cannot have that form.
    """
    output = Path(output)
    if to not in EXPORTS:
        raise ValueError(f"to = {to!r}; expected one of {list(EXPORTS)}; choose one")
    if output.exists():
        raise FileExistsError(f"{output} exists; expected a new folder; name another, or remove it")
    loaded = DualLoraModel.from_pretrained(model_folder(model), dtype=dtype)
    with written_aside(output) as aside:
        aside.mkdir()
        EXPORTS[to](loaded, aside)
    return output


def _export_merged(model: DualLoraModel, folder: Path) -> None:
    """Write the embedding adapter merged into the backbone, read-outs at the end of its prompts."""
    config = model.config
    problems = []
    if config.interface == "kv_detach":
        problems.append(f"interface = {config.interface!r}: two adapters make its vectors")
    if config.interface == "shared_prefill":
        problems.append(f"interface = {config.interface!r}: no adapter reads its prompts")
    if config.readout_start == "pooled_token":
        problems.append(
            "readout_start = 'pooled_token': its read-out replaces a prompt's last token"
        )
    if config.latent_documents:
        problems.append("latent_documents: its documents are read with a latent thought")
    if problems:
        raise ValueError(
            f"--to merged of a model with {'; '.join(problems)}; expected one adapter that reads "
            "all, and read-outs behind the prompt; export it --to sentence-transformers"
        )
    readouts = model.tokenizer.convert_ids_to_tokens(model.readout_ids)
    merged: Any = model.peft_model.merge_and_unload(adapter_names=[EMBEDDING_ADAPTER])
    _save_plain(model.backbone, merged, folder, behind_prompts="".join(readouts))
    _write_card(model, folder, "merged", num_readouts=len(readouts))


def _export_reasoner(model: DualLoraModel, folder: Path) -> None:
    """Write the reasoning adapter merged into the backbone, greedy decoding as its default."""
    if model.shares_prefill:
        raise ValueError(
            "--to reasoner of a model with interface = 'shared_prefill': no adapter reads its "
            "prompts; expected one that reads all; export it --to sentence-transformers"
        )
    bare, renderer = _bare_backbone(model), model.renderer
    with TemporaryDirectory() as adapter:
        save_adapter(model.peft_model, REASONING_ADAPTER, adapter)
        merged: Any = PeftModel.from_pretrained(bare.model, adapter).merge_and_unload()
    merged.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=model.config.max_think_tokens,
        eos_token_id=bare.eos_token_id,
        pad_token_id=bare.tokenizer.pad_token_id,
        suppress_tokens=bare.suppressed_token_ids((renderer.think_open, renderer.think_close)),
    )
    _save_plain(bare, merged, folder)
    _write_card(model, folder, "reasoner")


def _bare_backbone(model: DualLoraModel) -> Backbone:
    """Load the backbone anew: without adapters and without their tokens."""
    config = model.config
    dtype = model.backbone.model.dtype
    return load_backbone(config.backbone, revision=config.backbone_revision, dtype=dtype)


def _save_plain(backbone: Backbone, merged: Any, folder: Path, *, behind_prompts: str = "") -> None:
    """Write weights and processor as transformers has them."""
    merged.save_pretrained(folder)
    processor = backbone.processor
    if behind_prompts:
        ending = f"{{% if add_generation_prompt %}}{behind_prompts}{{% endif %}}"
        processor.chat_template = f"{processor.chat_template}{ending}"
    processor.save_pretrained(folder)


def _export_sentence_transformers(model: DualLoraModel, folder: Path) -> None:
    """Write the checkpoint with its backbone inside, which no other machine has to have."""
    bare = _bare_backbone(model)
    bare.model.save_pretrained(folder / BACKBONE_DIR)
    bare.processor.save_pretrained(folder / BACKBONE_DIR)
    model.save_pretrained(folder)
    inside = str(folder / BACKBONE_DIR)
    replace(model.config, backbone=inside, backbone_revision=None).save(folder)
    _write_card(model, folder, "sentence-transformers")


EXPORTS: dict[str, Callable[[DualLoraModel, Path], None]] = {
    "merged": _export_merged,
    "reasoner": _export_reasoner,
    "sentence-transformers": _export_sentence_transformers,
}


def _write_card(model: DualLoraModel, folder: Path, form: str, **facts: Any) -> None:
    """Write a README with the code that loads the folder."""
    is_multimodal, config = model.backbone.is_multimodal, model.config
    system, text = config.renderer.system_prompt, "which object is it"
    parts: Any = [{"type": "text", "text": system}] if is_multimodal else system
    opening = "" if system is None else f"{json.dumps({'role': 'system', 'content': parts})}, "
    facts |= {
        "backbone": plain_name(config.backbone) or "(built in code)",
        "auto_class": f"AutoModelFor{'ImageTextToText' if is_multimodal else 'CausalLM'}",
        "auto_processor": "AutoProcessor" if is_multimodal else "AutoTokenizer",
        "messages": f'[{opening}{{"role": "user", "content": content}}]',
        "instruction_place": "in the system message, in place of any other"
        if config.renderer.instruction_in_system
        else "before the text, on a line of its own",
        "content_help": 'parts {"type": "image", "image": ...}, then text'
        if is_multimodal
        else "a text",
        "content_example": json.dumps([{"type": "text", "text": text}] if is_multimodal else text),
        "content_example_text": json.dumps(text),
        "max_length": config.max_length or "any number of",
        "max_image_pixels": config.max_image_pixels or "any number of",
        "think_open": f"`{config.renderer.think_open}`",
        "think_close": f"`{config.renderer.think_close}`",
    }
    card = (_CARDS / f"{form}.md").read_text("utf-8")
    for name, value in facts.items():
        card = card.replace(f"[[{name}]]", str(value))
    write_text(folder / "README.md", card)
