"""The files that make a checkpoint a folder of sentence-transformers. Imports nothing of it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twn_rl.modeling.sentence_transformers_import import MODULE_CLASS
from twn_rl.runtime.whole_files import write_text

MODULES_FILE = "modules.json"
SETTINGS_FILE = "config_sentence_transformers.json"


def write_modules(directory: Path, folder: Path) -> None:
    """Write the list of modules, and settings without prompts if `folder` has none yet.

    Args:
        directory: Where to write.
        folder: Where the files will lie.
    """
    modules = [{"idx": 0, "name": "0", "path": "", "type": MODULE_CLASS}]
    write_text(directory / MODULES_FILE, json.dumps(modules, indent=2) + "\n")
    if not (folder / SETTINGS_FILE).is_file():
        write_settings(directory)


def write_settings(
    directory: Path,
    prompts: Mapping[str, str] | None = None,
    default_prompt_name: str | None = None,
    truncate_dim: int | None = None,
) -> None:
    """Write what holds for all calls of a model, as sentence-transformers has it."""
    settings: dict[str, Any] = {
        "model_type": "SentenceTransformer",
        "prompts": {"query": "", "document": "", **(prompts or {})},
        "default_prompt_name": default_prompt_name,
        "similarity_fn_name": "cosine",
    }
    if truncate_dim is not None:
        settings["truncate_dim"] = truncate_dim
    write_text(directory / SETTINGS_FILE, json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def read_settings(folder: Path) -> dict[str, Any]:
    """Return `prompts`, `default_prompt_name` and `truncate_dim` of a folder; {} without any."""
    file = folder / SETTINGS_FILE
    if not file.is_file():
        return {}
    stored = json.loads(file.read_text("utf-8"))
    prompts = {name: text or "" for name, text in stored.get("prompts", {}).items()}
    rest = {name: stored.get(name) for name in ("default_prompt_name", "truncate_dim")}
    return {"prompts": prompts, **rest}
