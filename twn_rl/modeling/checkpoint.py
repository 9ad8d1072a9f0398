"""Checkpoint folders: writing them whole and reading their weights back exactly."""

import shutil
from importlib.metadata import version
from pathlib import Path

from twn_rl.modeling.adapter_files import is_writer, load_adapter, save_adapter
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, set_trainable
from twn_rl.modeling.gate_files import GATE_FILE, save_gates
from twn_rl.modeling.generation import DualLoraInference

REASONING_DIR = "reasoning"
EMBEDDING_DIR = "embedding"
ASIDE_DIR = ".saving"
_FOLDERS = {REASONING_ADAPTER: REASONING_DIR, EMBEDDING_ADAPTER: EMBEDDING_DIR}
_PACKAGES = ("torch", "transformers", "peft")


def save_model(model: DualLoraInference, path: str | Path) -> None:
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
    if is_writer():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    for name, folder in _FOLDERS.items():
        save_adapter(model.peft_model, name, aside / folder)
    save_gates(model, aside)
    model.config.versions = {package: version(package) for package in _PACKAGES}
    if is_writer():
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


def load_weights(model: DualLoraInference, path: str | Path) -> None:
    """Overwrite both adapters of `model` with those stored in `path`, every key accounted for."""
    for name, folder in _FOLDERS.items():
        load_adapter(model.peft_model, name, Path(path) / folder)


def freeze_unless(model: DualLoraInference, is_trainable: bool) -> None:
    """Set both adapters trainable, or freeze the whole model in evaluation mode."""
    set_trainable(model.peft_model, _FOLDERS if is_trainable else ())
    model.train(is_trainable)
