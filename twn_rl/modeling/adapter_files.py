"""Adapter weights on disk: gather, write, read back with every key verified.

A folder is a plain PEFT adapter (`adapter_config.json`, safetensors) that PEFT itself can load.
"""

from collections.abc import Callable, Collection, Mapping
from copy import copy
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import Tensor, nn

from twn_rl.modeling.adapters import adapter_parameters, stored_key
from twn_rl.modeling.tensor_files import read_tensors
from twn_rl.runtime.zero import gathered


def adapter_state(peft_model: PeftModel, name: str) -> dict[str, Tensor]:
    """Return one adapter's weights on the CPU under PEFT's stored keys.

    Under ZeRO-3 its shards are gathered, which every process must take part in.
    """
    parameters = _stored_parameters(peft_model, name)
    with gathered(list(parameters.values())):
        return {key: p.detach().cpu().clone() for key, p in parameters.items()}


def _stored_parameters(peft_model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    parameters = adapter_parameters(peft_model, name)
    return {stored_key(key, name) or key: p for key, p in parameters.items()}


def save_adapter(
    peft_model: PeftModel, name: str, directory: str | Path, *, base_model: str | None = None
) -> None:
    """Write one adapter as a plain PEFT folder: `adapter_config.json` and safetensors.

    Weights that are not finite are refused. PEFT's own saving would refuse two adapters of which
    only one has trainable tokens. Of several processes only the first writes; under ZeRO-3 all of
    them must call this.

    Args:
        peft_model: The model.
        name: The adapter.
        directory: Folder; created if needed.
        base_model: What the folder is to call the backbone.
    """
    state = adapter_state(peft_model, name)
    bad = [key for key, tensor in state.items() if not torch.isfinite(tensor).all()]
    if bad:
        raise FloatingPointError(
            f"adapter {name!r}: {len(bad)} of {len(state)} tensors hold NaN or infinity, such as "
            f"{bad[0]}; expected finite weights; nothing was written to {directory}; resume from "
            "the last checkpoint with a lower learning_rate"
        )
    if not is_writer():
        return
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    weights = {key: tensor.contiguous() for key, tensor in state.items()}
    save_file(weights, directory / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    config: PeftConfig = copy(peft_model.peft_config[name])
    config.inference_mode, config.base_model_name_or_path = True, base_model
    config.save_pretrained(str(directory))


class KeysError(KeyError, ValueError):
    """Keys of stored tensors that are missing or unexpected; its text is not quoted."""

    def __str__(self) -> str:
        """Return the message."""
        return str(self.args[0])


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
        ValueError: If a shape differs; the message lists them; or if the file is damaged.
    """
    path = Path(directory) / SAFETENSORS_WEIGHTS_NAME
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected adapter weights as safetensors; check the folder"
        )
    stored, _ = read_tensors(path)
    own = _stored_parameters(peft_model, name)
    if rename is not None:
        stored = {rename(key, own): tensor for key, tensor in stored.items()}
    remedy = "check that backbone, targets and ranks are those of the checkpoint"
    check_fit(path, f"adapter {name!r}", stored, own, remedy, optional_keys=optional_keys)
    with torch.no_grad():
        for key, tensor in stored.items():
            own[key].copy_(tensor)


def check_fit(
    file: Path,
    owner: str,
    stored: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    remedy: str,
    *,
    optional_keys: tuple[str, ...] = (),
    dtype: torch.dtype | None = None,
) -> None:
    """Refuse stored tensors that are not exactly those they are to replace.

    Args:
        file: Where they were stored.
        owner: What they are for, as the message says it.
        stored: The tensors.
        own: What they are to replace.
        remedy: What to do about it.
        optional_keys: Key endings that may be missing.
        dtype: Type the stored ones must have; None takes any.

    Raises:
        KeyError: If keys are missing or unexpected; the message lists them.
        ValueError: If a shape or the type differs; the message lists them.
    """
    missing = [key for key in own if key not in stored and not key.endswith(optional_keys)]
    unexpected = [key for key in stored if key not in own]
    if missing or unexpected:
        raise KeysError(
            f"{file} does not fit {owner}: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}; expected exactly its {len(own)} keys; {remedy}"
        )
    other = [
        f"{key}: checkpoint {tuple(tensor.shape)}{f' {tensor.dtype}' if dtype else ''}, model "
        f"{tuple(own[key].shape)}"
        for key, tensor in stored.items()
        if tensor.shape != own[key].shape or dtype not in (None, tensor.dtype)
    ]
    if other:
        raise ValueError(
            f"{file} has other shapes or types than {owner}: {other}; expected equal shapes"
            f"{f' in {dtype}' if dtype else ''}; {remedy}"
        )


def is_writer() -> bool:
    """Return whether this process writes what all of them have: it is the first, or alone."""
    return not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
