"""Checkpoints to resume from: sealed when they are whole, checked before they are used.

The seal is written last and names every file with its size and digest. Knows no trainer.
"""

from __future__ import annotations

import json
import logging
import math
import re
from pathlib import Path
from typing import Any

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.runtime.whole_files import digest, file_digest, read_json, write_text

logger = logging.getLogger(__name__)

SEAL_FILE = "manifest.json"
# Fitting a gate to a checkpoint writes its thresholds there; resuming does not read them.
_UNSEALED = (SEAL_FILE, CONFIG_FILE)


def seal(folder: Path) -> None:
    """Write down every file of a finished checkpoint; without this it does not count as one."""
    files = {
        str(path.relative_to(folder)): {"bytes": path.stat().st_size, "sha256": file_digest(path)}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in _UNSEALED
    }
    sealed = {"files": files, "digest": digest(files)}
    write_text(folder / SEAL_FILE, json.dumps(sealed, indent=1) + "\n")


def damage_of(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint, in words; None if it is whole."""
    sealed = read_json(folder / SEAL_FILE)
    files = sealed.get("files") if isinstance(sealed, dict) else None
    if not files or digest(files) != sealed.get("digest"):
        return f"no readable {SEAL_FILE}: saving it was cut short"
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{name} has {size} bytes instead of {expected['bytes']}"
        if file_digest(path) != expected["sha256"]:
            return f"{name} has other content than was saved"
    return None


def newest_whole(output_dir: Path) -> Path | None:
    """Return the newest whole checkpoint of a run, None if there is none; say why not a newer."""
    found = {
        int(match.group(1)): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if (match := re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)", path.name)) and path.is_dir()
    }
    for step in sorted(found, reverse=True):
        damage = damage_of(found[step])
        if damage is None:
            return found[step]
        logger.warning("%s is passed over: %s", found[step], damage)
    return None


def is_finished(checkpoint: Path, args: Any) -> bool:
    """Return whether a run with these training arguments has nothing left to do after a checkpoint.

    Args:
        checkpoint: Folder with `trainer_state.json`.
        args: HF training arguments.
    """
    state = read_json(checkpoint / "trainer_state.json") or {}
    done = state.get("global_step", 0)
    if args.max_steps > 0:
        return done >= args.max_steps
    # HF notes whole epochs; a part of one ends within them.
    same_length = state.get("num_train_epochs") == math.ceil(args.num_train_epochs)
    went_through = (state.get("epoch") or 0.0) > args.num_train_epochs - 1e-6
    return same_length and went_through and 0 < state.get("max_steps", 0) <= done


def final_checkpoint(checkpoint: Path, args: Any) -> Path:
    """Return whose model a run keeps that ends with a checkpoint: the best one's, if that is asked.

    Args:
        checkpoint: The last one, whole.
        args: HF training arguments.
    """
    step = (read_json(checkpoint / "trainer_state.json") or {}).get("best_global_step")
    if not args.load_best_model_at_end or step is None:
        return checkpoint
    best = checkpoint.with_name(f"{PREFIX_CHECKPOINT_DIR}-{step}")
    if best == checkpoint or (damage := damage_of(best)) is None:
        return best
    logger.warning("%s, the best, is passed over: %s; %s is kept", best, damage, checkpoint)
    return checkpoint
