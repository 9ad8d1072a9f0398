"""Checkpoint folders: writing them, reading them back exactly, importing other layouts.

Knows no training state: optimizers and schedulers belong to the trainer.
"""

import shutil
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from twn_rl.modeling.adapter_files import load_adapter, save_adapter
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, set_trainable
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.gate_files import (
    GATE_FILE,
    forget_thresholds,
    load_gates,
    save_gates,
    warn_dropped,
)

if TYPE_CHECKING:
    from twn_rl.modeling.model import DualLoraModel

REASONING_DIR = "reasoning"
EMBEDDING_DIR = "embedding"
ASIDE_DIR = ".saving"
_PACKAGES = ("torch", "transformers", "peft")


def save_model(model: "DualLoraModel", path: str | Path) -> None:
    """Write `reasoning/`, `embedding/` (read-out rows inside), gates and `twn_config.json`.

    A `gate.safetensors` that an earlier model left there is removed if this one has no gates. All
    is written aside first: a full disk leaves the model that was there as it was.

    Of several processes only the first writes; under ZeRO-3 all of them must call this.

    Args:
        model: The model.
        path: Folder; created if needed.
    """
    path = Path(path)
    aside = path / ASIDE_DIR
    is_writer = not dist.is_initialized() or dist.get_rank() == 0
    if is_writer:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    for name, folder in ((REASONING_ADAPTER, REASONING_DIR), (EMBEDDING_ADAPTER, EMBEDDING_DIR)):
        save_adapter(model.peft_model, name, aside / folder)
    save_gates(model, aside)
    model.config.versions = {package: version(package) for package in _PACKAGES}
    if is_writer:
        model.config.save(aside)
        _publish(aside, path)


def _publish(aside: Path, path: Path) -> None:
    """Put a model that has been written whole in the place of another one."""
    if not (aside / GATE_FILE).exists():
        (path / GATE_FILE).unlink(missing_ok=True)
    for new in sorted(aside.iterdir()):
        old = path / new.name
        if old.is_dir():
            old.rename(path / f".{new.name}.old")
        new.replace(old)
        shutil.rmtree(path / f".{new.name}.old", ignore_errors=True)
    aside.rmdir()


def load_model(
    model_class: type["DualLoraModel"],
    path: str | Path,
    *,
    backbone: str | Path | Backbone | None = None,
    dtype: str | torch.dtype | None = None,
    is_trainable: bool = False,
) -> "DualLoraModel":
    """Return the model stored in `path`; its vectors are those of the model that was saved.

    Args:
        model_class: `DualLoraModel`.
        path: Checkpoint folder.
        backbone: Backbone to use instead of the one named in the config.
        dtype: Parameter type when loading the backbone.
        is_trainable: Leave both adapters trainable; otherwise everything is frozen. Stored gates
            stay behind with a warning: training changes what they are about.

    Raises:
        FileNotFoundError: If `path` holds no config or no weights.
        KeyError: If adapter keys or gate tensors are missing or unexpected; the message lists them.
        ValueError: If shapes do not fit the backbone, no backbone is known, or a gate was fitted to
            another model.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{path / CONFIG_FILE} does not exist; expected a folder written by save_pretrained; "
            "check the path"
        )
    config = TwnConfig.load(path)
    source = backbone if backbone is not None else config.backbone
    if not source:
        raise ValueError(
            f"{CONFIG_FILE} names no backbone; expected a name or a path; pass backbone=..."
        )
    model = model_class.from_backbone(source, config, dtype=dtype)
    load_weights(model, path)
    if not is_trainable:
        load_gates(model, path)
    elif (path / GATE_FILE).is_file():
        forget_thresholds(model.config)
        warn_dropped(f"{path} is loaded to be trained", "OUTPUT_DIR")
    freeze_unless(model, is_trainable)
    return model


def load_weights(model: "DualLoraModel", path: str | Path) -> None:
    """Overwrite both adapters of `model` with those stored in `path`, every key accounted for."""
    for name, folder in ((REASONING_ADAPTER, REASONING_DIR), (EMBEDDING_ADAPTER, EMBEDDING_DIR)):
        load_adapter(model.peft_model, name, Path(path) / folder)


def freeze_unless(model: "DualLoraModel", is_trainable: bool) -> None:
    """Set both adapters trainable, or freeze the whole model in evaluation mode."""
    set_trainable(model.peft_model, (REASONING_ADAPTER, EMBEDDING_ADAPTER) if is_trainable else ())
    model.train(is_trainable)
