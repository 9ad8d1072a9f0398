"""Reading the folder layout that TWN's authors released. Knows nothing else; never writes it.

The layout is `reasoning/` and `embedding/` (PEFT), `gate_mlp.pt` and `queries.pt`. What is inside
the two `.pt` files is not documented, so whatever cannot be read with certainty is refused.
"""

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from twn_rl.data.chat import Renderer
from twn_rl.modeling.adapter_files import load_adapter
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.checkpoint import EMBEDDING_DIR, REASONING_DIR, freeze_unless
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.tensor_files import read_tensors
from twn_rl.runtime.reading import load_json

_ROWS_KEY = "trainable_tokens_delta"


def import_twn_release(
    path: str | Path,
    *,
    backbone: str | Path | Backbone | None = None,
    renderer: Renderer | None = None,
    dtype: str | torch.dtype | None = None,
    is_trainable: bool = False,
) -> tuple[DualLoraModel, dict[str, Tensor]]:
    """Return a "kv_detach" model made of a released folder, and the tensors of its gate, unused.

    Args:
        path: Folder with `reasoning/`, `embedding/`, `gate_mlp.pt`, `queries.pt`.
        backbone: Backbone; the one named by the adapters' config if None.
        renderer: The prompt format, which the release does not hold.
        dtype: Parameter type when loading the backbone.
        is_trainable: Leave both adapters trainable.

    Raises:
        FileNotFoundError: If a part of the layout is missing.
        KeyError: If adapter keys do not fit the backbone; the message lists them.
        ValueError: If `queries.pt` does not hold exactly one (Q, D) tensor.
    """
    path = Path(path)
    queries = _read_queries(path / "queries.pt")
    gate = dict(_flat_tensors(_load_pt(path / "gate_mlp.pt")))
    reasoning, base_name = _read_settings(path / REASONING_DIR)
    embedding, _ = _read_settings(path / EMBEDDING_DIR)
    config = TwnConfig(
        interface="kv_detach",
        num_readout_tokens=queries.shape[0],
        reasoning_lora=reasoning,
        embedding_lora=embedding,
        renderer=renderer or Renderer(),
    )
    model = DualLoraModel.from_backbone(
        backbone if backbone is not None else base_name, config, dtype=dtype
    )
    load_adapter(model.peft_model, REASONING_ADAPTER, path / REASONING_DIR, rename=_rename)
    load_adapter(
        model.peft_model,
        EMBEDDING_ADAPTER,
        path / EMBEDDING_DIR,
        rename=_rename,
        optional_keys=(_ROWS_KEY,),
    )
    _set_rows(model, queries)
    freeze_unless(model, is_trainable)
    return model, gate


def _set_rows(model: DualLoraModel, queries: Tensor) -> None:
    if queries.shape[1] != model.hidden_size:
        raise ValueError(
            f"queries.pt has width {queries.shape[1]}; expected the backbone's {model.hidden_size}"
            "; use the backbone the release was trained on"
        )
    with torch.no_grad():
        for key, rows in adapter_parameters(model.peft_model, EMBEDDING_ADAPTER).items():
            if _ROWS_KEY in key:
                rows.copy_(queries)


def _rename(key: str, own: Collection[str]) -> str:
    """Return the adapter's key with the same `layers.N...` tail; what precedes it differs."""
    tail = re.search(r"\.layers\.\d+\..*$", key)
    matches = [name for name in own if tail and name.endswith(tail.group())]
    return matches[0] if len(matches) == 1 else key


def _load_pt(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist; expected TWN's released layout; check the folder"
        )
    return torch.load(path, map_location="cpu", weights_only=True)


def _flat_tensors(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        return [(prefix, value)]
    if not isinstance(value, dict):
        return []
    pairs = (_flat_tensors(v, f"{prefix}.{k}" if prefix else str(k)) for k, v in value.items())
    return [pair for found in pairs for pair in found]


def _read_queries(path: Path) -> Tensor:
    found = _flat_tensors(_load_pt(path))
    tensors = [
        tensor.reshape(-1, tensor.shape[-1]) for _, tensor in found if tensor.dim() in (2, 3)
    ]
    if len(found) != 1 or len(tensors) != 1:
        shapes = {name or "tensor": tuple(tensor.shape) for name, tensor in found}
        raise ValueError(
            f"{path} holds {shapes}; expected exactly one tensor of shape (Q, D) or (1, Q, D); "
            "this variant of the layout is not known"
        )
    return tensors[0].float()


def _read_settings(directory: Path) -> tuple[LoraSettings, str]:
    """Return the adapter's sizes, targets read off its keys, and the name of its backbone."""
    config_path = directory / "adapter_config.json"
    weights_path = directory / SAFETENSORS_WEIGHTS_NAME
    for needed in (config_path, weights_path):
        if not needed.is_file():
            raise FileNotFoundError(
                f"{needed} does not exist; expected TWN's released layout; check the folder"
            )
    config = load_json(config_path)
    weights, _ = read_tensors(weights_path)
    found = [re.search(r"(\w+)\.lora_A\.weight$", key) for key in weights]
    targets = sorted({match.group(1) for match in found if match})
    settings = LoraSettings(
        r=config["r"],
        alpha=config["lora_alpha"],
        dropout=config.get("lora_dropout", 0.0),
        targets=tuple(targets),
    )
    return settings, config.get("base_model_name_or_path") or ""
