"""What a model's outputs depend on, as one hash; stored vectors and thoughts are keyed by it."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from twn_rl.modeling.adapter_files import adapter_state
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, SNAPSHOT_ADAPTER

_PROBE_BYTES = 1 << 20


def scorer_fingerprint(model: Any) -> str:
    """Return a sha256 that changes whenever the same target would get another vector.

    It covers the embedding adapter with its read-out rows, the interface, the renderer, the limits
    of prompts if there are any, and the backbone: its revision and, for a local folder, samples of
    its weight files instead of its path. With `kv_detach` it also covers the reasoning
    adapter that scores, its snapshot if there is one. Under ZeRO-3 every process must call this.

    Args:
        model: Anything with `peft_model` and `config` like `DualLoraModel`.
    """
    config = model.config
    described = {
        "backbone": _backbone_identity(config.backbone),
        "backbone_revision": config.backbone_revision,
        "interface": config.interface,
        **config.readout_settings,
        **config.limit_settings,
        "embedding_lora": asdict(config.embedding_lora),
        "renderer": config.renderer.to_dict(),
    }
    names = [EMBEDDING_ADAPTER]
    if config.interface == "kv_detach":
        has_snapshot = SNAPSHOT_ADAPTER in model.peft_model.peft_config
        names.append(SNAPSHOT_ADAPTER if has_snapshot else REASONING_ADAPTER)
    return _fingerprint(model, described, names)


def reasoner_fingerprint(model: Any) -> str:
    """Return a sha256 that changes whenever the same input could get another greedy thought.

    It covers the reasoning adapter, renderer, limits, the parameter type and the backbone, as in
    `scorer_fingerprint`; vectors may change without it.
    """
    config = model.config
    described = {
        "backbone": _backbone_identity(config.backbone),
        "backbone_revision": config.backbone_revision,
        **config.limit_settings,
        "reasoning_lora": asdict(config.reasoning_lora),
        "renderer": config.renderer.to_dict(),
        "dtype": str(model.backbone.model.dtype),
    }
    if config.thinking_decision == "policy":
        described["opening"] = "written for the policy"
    return _fingerprint(model, described, [REASONING_ADAPTER])


def _fingerprint(model: Any, described: Mapping[str, Any], adapters: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode())
    for name in adapters:
        for key, weight in sorted(adapter_state(model.peft_model, name).items()):
            digest.update(f"{key} {weight.dtype} {tuple(weight.shape)}".encode())
            # View as bytes: numpy has no bfloat16.
            digest.update(weight.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _backbone_identity(backbone: str) -> list[str]:
    if not backbone or not Path(backbone).is_dir():
        return [backbone]
    identity = []
    for path in sorted(Path(backbone).glob("*.safetensors")):
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(_PROBE_BYTES)
            file.seek(max(0, size - _PROBE_BYTES))
            sample = hashlib.sha256(start + file.read(_PROBE_BYTES)).hexdigest()
        identity.append(f"{path.name} {size} {sample}")
    return identity or [backbone]
