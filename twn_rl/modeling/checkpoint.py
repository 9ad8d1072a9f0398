"""Checkpoint folders: one model each, saved as a whole and read back exactly.

A model is written into `.saving/` first and then put in place file by file, its settings last. They
name the digest of every file of weights, so that a kill in between leaves a model that can be read:
the old one, or the new one from both folders.
"""

import logging
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import nn

from twn_rl.modeling.adapter_files import is_writer, load_adapter, save_adapter
from twn_rl.modeling.adapters import (
    EMBEDDING_ADAPTER,
    REASONING_ADAPTER,
    adapter_parameters,
    set_trainable,
)
from twn_rl.modeling.backbone_names import stored_name
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate_files import GATE_FILE, save_gates
from twn_rl.modeling.generation import DualLoraInference
from twn_rl.modeling.hub import model_folder
from twn_rl.modeling.sentence_transformers_files import write_modules
from twn_rl.runtime.nearest import path_hint
from twn_rl.runtime.whole_files import file_digest, full_disk_told, read_json, written_aside
from twn_rl.runtime.zero import parameter_count

logger = logging.getLogger(__name__)

REASONING_DIR = "reasoning"
EMBEDDING_DIR = "embedding"
ASIDE_DIR = ".saving"
_FOLDERS = {REASONING_ADAPTER: REASONING_DIR, EMBEDDING_ADAPTER: EMBEDDING_DIR}
_WEIGHTS = {name: f"{folder}/{SAFETENSORS_WEIGHTS_NAME}" for name, folder in _FOLDERS.items()}
_PACKAGES = ("torch", "transformers", "peft")


def save_model(model: DualLoraInference, path: str | Path) -> None:
    """Write `reasoning/`, `embedding/` (read-out rows inside), gates and `twn_config.json`.

    Beside them lie the files that make the folder one of sentence-transformers; prompts that are
    there already stay.

    A `gate.safetensors` that an earlier model left there is removed if this one has no gates. A
    full disk leaves the model that was there as it was.

    Of several processes only the first writes; under ZeRO-3 all of them must call this.

    Args:
        model: The model.
        path: Folder; created if needed.
    """
    path = Path(path)
    with _saved_aside(model, path, keep={}) as aside:
        base_model = stored_name(model.config.backbone, path)
        for name, folder in _FOLDERS.items():
            save_adapter(model.peft_model, name, aside / folder, base_model=base_model)
        save_gates(model, aside)
        model.config.versions = {package: version(package) for package in _PACKAGES}


def save_decision(model: DualLoraInference, path: str | Path) -> None:
    """Replace gates and thresholds of the model stored in `path`, which are otherwise its own."""
    kept = _of_adapters(model.config.digests)
    with _saved_aside(model, Path(path), keep=kept) as aside:
        save_gates(model, aside)


def adapter_digests(path: str | Path) -> dict[str, str]:
    """Return the sha256 of each adapter's weights in a model's folder; none if it is no model."""
    settings = read_json(Path(path) / CONFIG_FILE)
    return _of_adapters(settings.get("digests", {})) if isinstance(settings, dict) else {}


def _of_adapters(digests: Mapping[str, str]) -> dict[str, str]:
    return {name: digest for name, digest in digests.items() if name in _WEIGHTS.values()}


@contextmanager
def _saved_aside(model: DualLoraInference, path: Path, keep: dict[str, str]) -> Iterator[Path]:
    """Give a folder to write to, and put what lies there in place, with the model's settings."""
    aside = path / ASIDE_DIR
    if is_writer():
        if (aside / CONFIG_FILE).is_file():  # a kill left a whole model there
            _publish(aside, path)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    try:
        with full_disk_told(path, stored_bytes(model)):
            yield aside
        if is_writer():
            written = aside.rglob("*.safetensors")
            new = {str(file.relative_to(aside)): file_digest(file) for file in written}
            model.config.digests = {**keep, **dict(sorted(new.items()))}
            write_modules(aside, path)
            model.config.save(aside, folder=path)
            _publish(aside, path)
    finally:
        if is_writer() and not (aside / CONFIG_FILE).exists():
            shutil.rmtree(aside, ignore_errors=True)


def stored_bytes(model: DualLoraInference) -> int:
    """Return about how large the model's folder is: its adapters."""
    return sum(parameter_count(p) * p.element_size() for p in _stored(model))


def moments_bytes(model: DualLoraInference) -> int:
    """Return about how large Adam's two moments of what is trained are, in float32."""
    return sum(8 * parameter_count(p) for p in _stored(model) if p.requires_grad)


def _stored(model: DualLoraInference) -> list[nn.Parameter]:
    return [p for name in _FOLDERS for p in adapter_parameters(model.peft_model, name).values()]


def _publish(aside: Path, path: Path) -> None:
    """Put the files of a model in place, settings last; all stay in `aside` until the end."""
    files = [file for file in sorted(aside.rglob("*")) if file.is_file()]
    for file in sorted(files, key=lambda file: file.name == CONFIG_FILE):
        with file.open("rb") as written:
            os.fsync(written.fileno())
        with written_aside(path / file.relative_to(aside)) as new:
            try:
                os.link(file, new)
            except OSError:  # some file systems have no links
                shutil.copy2(file, new)
    if not (aside / GATE_FILE).exists():
        (path / GATE_FILE).unlink(missing_ok=True)
    shutil.rmtree(aside)


def find_files(path: str | Path) -> tuple[TwnConfig, dict[str, Path]]:
    """Return the settings of the model in a folder, and where each file of its weights is.

    Raises:
        FileNotFoundError: If there are no settings or no weights.
        ValueError: If a file is not the one that was saved with the settings.
    """
    path = Path(path)
    if not (path / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{path / CONFIG_FILE} does not exist; expected a folder written by "
            f"save_pretrained{path_hint(path / CONFIG_FILE)} Check the path"
        )
    config = TwnConfig.load(path)
    files, damaged = _find(path, config)
    if damaged and (path / ASIDE_DIR / CONFIG_FILE).is_file():
        newer = TwnConfig.load(path / ASIDE_DIR, folder=path)
        found, still_damaged = _find(path, newer)
        if not still_damaged:
            logger.warning("%s: a save was cut short; its model is read from %s", path, ASIDE_DIR)
            return newer, found
    if damaged:
        raise ValueError(
            f"{path}: {', '.join(damaged)} is not what was saved with {CONFIG_FILE}; expected the "
            "files of one model; copy or train it again, or, if you changed it on purpose, set "
            f'"digests" to {{}} in {CONFIG_FILE}'
        )
    return config, files


def check_model(name: str | Path) -> None:
    """Refuse what is no whole model before anything long begins that needs one.

    Args:
        name: As for `DualLoraModel.from_pretrained`, which raises the same.
    """
    find_files(model_folder(name))


def has_adapters_of(path: str | Path, other: str | Path) -> bool:
    """Return whether the folder of a model holds whole what another one holds, gates aside."""
    try:
        (own, files), (theirs, _) = find_files(path), find_files(other)
    except (OSError, ValueError):
        return False
    return all(
        files[name].is_file() and own.digests.get(name) == theirs.digests.get(name, "unknown")
        for name in _WEIGHTS.values()
    )


def _find(path: Path, config: TwnConfig) -> tuple[dict[str, Path], list[str]]:
    """Return where the files are that a model's settings name, and which are not those."""
    files = {name: path / name for name in (*_WEIGHTS.values(), GATE_FILE)}
    damaged = []
    for name in [name for name in files if name in config.digests]:
        digest = config.digests[name]
        places = [place for place in (path / name, path / ASIDE_DIR / name) if place.is_file()]
        whole = [place for place in places if file_digest(place) == digest]
        if whole:
            files[name] = whole[0]
        elif places:
            damaged.append(name)
        else:
            logger.warning("%s is missing", path / name)
    if GATE_FILE not in config.digests and (path / ASIDE_DIR / CONFIG_FILE).is_file():
        files[GATE_FILE] = path / ASIDE_DIR / GATE_FILE  # what lies in `path` is an older model's
    return files, damaged


def load_weights(
    model: DualLoraInference, path: str | Path, files: dict[str, Path] | None = None
) -> None:
    """Overwrite both adapters of `model` with those stored in `path`, every key accounted for.

    `files` are those of `find_files`; without them the folder is taken as it is.
    """
    for name, file in _WEIGHTS.items():
        load_adapter(model.peft_model, name, (files or {}).get(file, Path(path) / file).parent)


def check_backbone(
    model: DualLoraInference, path: Path, expected: str | None, accept: bool
) -> None:
    """Refuse a model on another backbone than it was trained on.

    Args:
        model: The model, loaded.
        path: Folder it was loaded from.
        expected: The stored `Fingerprints.frozen`; None if the checkpoint is older than it.
        accept: Take any backbone, with a warning where it is another one.

    Raises:
        ValueError: If it is another one.
    """
    own = Fingerprints(model).frozen
    if expected is None:
        logger.warning("%s does not say which backbone it was trained on: not checked", path)
        return
    if own == expected:
        return
    said = (
        f"{path} was trained on another backbone (weights {expected[:12]}) than "
        f"{model.config.backbone or 'the given one'} (weights {own[:12]})"
    )
    if not accept:
        raise ValueError(
            f"{said}; expected the same weights: its vectors would mean nothing; pass its own "
            "backbone, or accept this one with accept_other_backbone=True or by setting "
            f'"backbone_fingerprint" to null in {CONFIG_FILE}'
        )
    logger.warning("%s: accepted", said)


def freeze_unless(model: DualLoraInference, is_trainable: bool) -> None:
    """Set both adapters trainable, or freeze the whole model in evaluation mode."""
    set_trainable(model.peft_model, _FOLDERS if is_trainable else ())
    model.train(is_trainable)
