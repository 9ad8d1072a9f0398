"""Adapter weights on disk: gather, write, read back with every key verified. Knows no config files.

A folder is a plain PEFT adapter (`adapter_config.json`, safetensors) that PEFT itself can load.
"""

from collections.abc import Callable, Collection
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor

from twn_rl.modeling.adapters import adapter_parameters, stored_key
from twn_rl.runtime.zero import gathered


def adapter_state(peft_model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return one adapter's weights on the CPU under PEFT's stored keys.

    Under ZeRO-3 its shards are gathered, which every process must take part in.
    """
    parameters = adapter_parameters(peft_model, name)
    with gathered(list(parameters.values())):
        return {_stored(key, name): p.detach().cpu().clone() for key, p in parameters.items()}


def _stored(key: str, name: str) -> str:
    stored = stored_key(key, name)
    assert stored is not None
    return stored


def save_adapter(peft_model: PeftModel, name: str, directory: str | Path) -> None:
    """Write one adapter as a plain PEFT folder: `adapter_config.json` and safetensors.

    Weights that are not finite are refused. PEFT's own saving would refuse two adapters of which
    only one has trainable tokens. Of several processes only the first writes; under ZeRO-3 all of
    them must call this.
    """
    state = adapter_state(peft_model, name)
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FloatingPointError(
            f"adapter {name!r}: {len(bad)} of {len(state)} tensors hold NaN or infinity, such as "
            f"{bad[0]}; expected finite weights; nothing was written to {directory}; resume from "
            "the last checkpoint with a lower learning_rate"
        )
    if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config: PeftConfig = peft_model.peft_config[name]
    was_inference, config.inference_mode = config.inference_mode, True
    try:
        config.save_pretrained(str(directory))
    finally:
        config.inference_mode = was_inference


def load_adapter(
    peft_model: PeftModel,
    name: str,
    directory: str | Path,
    *,
    rename: Callable[[str, Collection[str]], str] | None = None,
    optional_keys: tuple[str, ...] = (),
) -> None:
    """Copy the weights stored in `directory` into adapter `name`, which must fit them exactly.

    Args:
        peft_model: The model, with the adapter attached.
        name: The adapter.
        directory: A PEFT folder with safetensors.
        rename: (stored key, the adapter's keys) -> the adapter's key, for imports of other layouts.
        optional_keys: Key endings that may be missing, likewise.

    Raises:
        FileNotFoundError: If there are no safetensors.
        KeyError: If keys are missing or unexpected; the message lists them.
        ValueError: If a shape differs; the message lists them.
    """
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected adapter weights as safetensors; check the folder"
        )
    stored = load_file(path)
    own = {_stored(key, name): p for key, p in adapter_parameters(peft_model, name).items()}
    if rename is not None:
        stored = {rename(key, own): tensor for key, tensor in stored.items()}
    missing = [key for key in own if key not in stored and not key.endswith(optional_keys)]
    unexpected = [key for key in stored if key not in own]
    if missing or unexpected:
        raise KeyError(
            f"{path} does not fit adapter {name!r}: missing keys {sorted(missing)}, unexpected "
            f"keys {sorted(unexpected)}; expected exactly the adapter's {len(own)} keys; "
            "check that backbone, targets and ranks are those of the checkpoint"
        )
    misshapen = [
        f"{key}: checkpoint {tuple(tensor.shape)}, model {tuple(own[key].shape)}"
        for key, tensor in stored.items()
        if tensor.shape != own[key].shape
    ]
    if misshapen:
        raise ValueError(
            f"{path} has other shapes than adapter {name!r}: {misshapen}; expected equal shapes; "
            "load it onto the backbone it was trained on"
        )
    with torch.no_grad():
        for key, tensor in stored.items():
            own[key].copy_(tensor)
