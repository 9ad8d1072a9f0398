"""Gates beside a checkpoint: writing, reading back, refusing those of another model.

`gate.safetensors` holds the tensors of every side, prefixed by it, those of its judge among them;
what they were fitted to (`Fingerprints.gate_origin`) is in the file's metadata.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from twn_rl.modeling.adapter_files import check_fit, is_writer
from twn_rl.modeling.backbone_names import plain_name
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import SIDES, THRESHOLD_FIELDS, Gate
from twn_rl.modeling.generation import DualLoraInference
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.tensor_files import read_tensors
from twn_rl.runtime.whole_files import written_aside

logger = logging.getLogger(__name__)

GATE_FILE = "gate.safetensors"
GATE_FORMAT = "1"


def set_threshold(config: TwnConfig, side: str, threshold: float | None) -> None:
    """Set the threshold of one side in a model's settings."""
    setattr(config, THRESHOLD_FIELDS[side], threshold)


def save_gates(model: DualLoraInference, path: str | Path) -> None:
    """Write the model's gates into a checkpoint folder, or remove the file if it has none.

    Gates that no longer fit the model are dropped with a warning. Of several processes only the
    first writes.
    """
    gates: dict[str, Any] = dict(model.gates.items())
    if gates:
        now = Fingerprints(model).gate_origin
        stale = [side for side, gate in gates.items() if gate.fitted_to != now]
        if stale:
            drop_gates(model, f"the adapters have changed since gates {stale} were fitted", path)
    if not is_writer():
        return
    target = Path(path) / GATE_FILE
    if not model.gates:
        target.unlink(missing_ok=True)
        return
    tensors = {
        f"{side}.{key}": tensor.detach().cpu().contiguous()
        for side, gate in gates.items()
        for key, tensor in gate.state_dict().items()
    }
    metadata = {
        "format": "pt",
        "gate_format": GATE_FORMAT,
        "backbone": plain_name(model.config.backbone),
        "hidden_size": str(model.hidden_size),
        "sides": json.dumps({side: gate.hidden_size for side, gate in gates.items()}),
        "judges": json.dumps(
            {side: gate.judge.sizes for side, gate in gates.items() if gate.judge}
        ),
        **next(gate.fitted_to for gate in gates.values()),
    }
    with written_aside(target) as aside:
        save_file(tensors, aside, metadata=metadata)


def load_gates(model: DualLoraInference, path: str | Path, file: Path) -> None:
    """Give the model the gates stored in a file; without one it has none.

    Args:
        model: The model.
        path: Folder to name in the advice to refit.
        file: `GATE_FILE`.

    A gate whose thoughts came from other reasoning weights still loads, with a warning.

    Raises:
        KeyError: If tensors are missing or unexpected; the message lists them.
        ValueError: If the gate belongs to another backbone or embedding adapter, or shapes differ.
    """
    if not file.is_file():
        return
    tensors, metadata = read_tensors(file)
    now = Fingerprints(model).gate_origin
    _check_origin(file, metadata, model, now)
    sides: dict[str, int] = json.loads(metadata["sides"])
    gates = {side: Gate(model.hidden_size, size) for side, size in sides.items()}
    for side, sizes in json.loads(metadata.get("judges", "{}")).items():
        gates[side].judge = Judge(model.hidden_size, *sizes)
    fitting = torch.nn.ModuleDict(gates)
    remedy = f"delete the file and {_refit(path)}"
    check_fit(file, "its gates", tensors, fitting.state_dict(), remedy, dtype=torch.float32)
    fitting.load_state_dict(tensors)
    for side, gate in gates.items():
        gate.fitted_to = {name: metadata[name] for name in now}
        model.gates[side] = gate.to(model.device)
    if metadata["reasoning"] != now["reasoning"]:
        logger.warning(
            "gate of %s was fitted to other reasoning weights: its probabilities are about other "
            "thoughts; %s",
            path,
            _refit(path),
        )


def drop_gates(model: DualLoraInference, reason: str, path: str | Path = "MODEL") -> None:
    """Remove the model's gates and thresholds with one warning; without gates do nothing.

    Args:
        model: The model.
        reason: Why they do not fit any more.
        path: Folder to name in the advice to refit.
    """
    if model.gates:
        model.gates.clear()
        forget_thresholds(model.config)
        warn_dropped(reason, path)


def forget_thresholds(config: TwnConfig) -> None:
    """Leave the settings without a threshold: they belong to a gate."""
    for side in SIDES:
        set_threshold(config, side, None)


def warn_dropped(reason: str, path: str | Path) -> None:
    """Log, on the first process, that a gate was left behind and how to fit it anew."""
    if is_writer():
        logger.warning("the routing gate is dropped: %s; afterwards %s", reason, _refit(path))


def _refit(path: str | Path) -> str:
    return f"fit it anew: accelerate launch recipes/gate_embed.py --model {path}"


def _check_origin(
    file: Path, metadata: Mapping[str, str], model: DualLoraInference, now: Mapping[str, str]
) -> None:
    needed = ("gate_format", "backbone", "hidden_size", "sides", *now)
    absent = [name for name in needed if name not in metadata]
    if (
        absent
        or metadata["gate_format"] != GATE_FORMAT
        or not set(json.loads(metadata["sides"])) <= set(SIDES)
    ):
        raise ValueError(
            f"{file} has metadata {dict(metadata)}; expected {list(needed)}, gate_format = "
            f"{GATE_FORMAT} and sides among {list(SIDES)}; delete the file and "
            + _refit(file.parent)
        )
    own = {"hidden_size": str(model.hidden_size), "embedding": now["embedding"]}
    if any(metadata[name] != value for name, value in own.items()):
        raise ValueError(
            f"{file} was fitted to backbone {metadata['backbone']!r} (width "
            f"{metadata['hidden_size']}, embedding side {metadata['embedding'][:12]}); expected "
            f"the loaded {model.config.backbone!r} (width {model.hidden_size}, embedding side "
            f"{now['embedding'][:12]}); load the model it was fitted to, or delete the file and "
            + _refit(file.parent)
        )
