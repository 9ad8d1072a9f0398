"""The two LoRA adapters: attach, switch, save, load. Knows nothing of items, losses or vectors.

PEFT and TRL both flip `requires_grad` when they change the active adapter; here a switch never
changes what is trainable.
"""

import re
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from twn_rl.backbone import Backbone, whole_parameters
from twn_rl.config import LoraSettings

REASONING_ADAPTER = "default"  # TRL's GRPO reads peft_config["default"]
EMBEDDING_ADAPTER = "embedding"


def _lora_config(
    backbone: Backbone, settings: LoraSettings, readout_ids: list[int] | None
) -> LoraConfig:
    # Names alone would also match the vision tower's q_proj; the prefix keeps it out.
    layers = rf"{re.escape(backbone.language_prefix)}\.layers\.\d+\..*"
    leaves = [
        name.rpartition(".")[2]
        for name, module in backbone.model.named_modules()
        if re.fullmatch(layers, name)
        and isinstance(module, BaseTunerLayer | nn.Linear)
        and "lora_" not in name
    ]
    absent = [target for target in settings.targets if target not in leaves]
    if absent:
        raise ValueError(
            f"LoraSettings.targets = {absent} match no linear map in the decoder layers; "
            f"expected some of {sorted(set(leaves) - {'base_layer'})}; change targets"
        )
    embedding_name = _module_name(backbone.model, backbone.model.get_input_embeddings())
    return LoraConfig(
        r=settings.r,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=rf"{layers}\.({'|'.join(map(re.escape, settings.targets))})",
        task_type="CAUSAL_LM",
        trainable_token_indices=(
            {embedding_name.rpartition(".")[2]: readout_ids} if readout_ids else None
        ),
    )


def _module_name(model: nn.Module, wanted: nn.Module) -> str:
    return next(name for name, module in model.named_modules() if module is wanted)


def attach_adapters(
    backbone: Backbone,
    *,
    reasoning: LoraSettings,
    embedding: LoraSettings,
    readout_ids: list[int],
    seed: int = 0,
) -> PeftModel:
    """Return `backbone.model` with both adapters; the reasoning adapter is active, both trainable.

    The read-out rows belong to the embedding adapter: they are saved, trained and switched with it.
    The same seed gives the same initial weights, and the global random state is left as it was.
    """
    if isinstance(backbone.model, PeftModel) or hasattr(backbone.model, "peft_config"):
        raise ValueError(
            "backbone.model already carries adapters; expected a bare model; load the backbone anew"
        )
    with torch.random.fork_rng(), whole_parameters():
        torch.manual_seed(seed)
        reasoning_config = _lora_config(backbone, reasoning, None)
        embedding_config = _lora_config(backbone, embedding, readout_ids)
        peft_model = get_peft_model(backbone.model, reasoning_config, REASONING_ADAPTER)
        peft_model.add_adapter(EMBEDDING_ADAPTER, embedding_config)
        _init_readout_rows(peft_model)
    peft_model.set_adapter(REASONING_ADAPTER)
    set_trainable(peft_model, (REASONING_ADAPTER, EMBEDDING_ADAPTER))
    return peft_model


def _init_readout_rows(peft_model: PeftModel) -> None:
    # New rows start as copies of untrained base rows; a common mean with small noise lets the
    # tokens differ from each other and stay inside the range of trained embeddings.
    for name, rows in adapter_parameters(peft_model, EMBEDDING_ADAPTER).items():
        if "trainable_tokens_delta" not in name:
            continue
        table = peft_model.get_base_model().get_input_embeddings().token_adapter.base_layer.weight
        if table.is_meta:
            return
        with torch.no_grad():
            noise = torch.randn(rows.shape, dtype=torch.float32).to(rows.device)
            table32 = table.detach().float()
            rows.copy_(table32.mean(0) + 0.5 * table32.std() * noise)


def adapter_parameters(peft_model: PeftModel, name: str) -> dict[str, nn.Parameter]:
    """Return the parameters of one adapter by qualified name, read-out rows included.

    Raises:
        KeyError: If there is no such adapter.
    """
    if name not in peft_model.peft_config:
        raise KeyError(
            f"adapter = {name!r}; expected one of {list(peft_model.peft_config)}; "
            "check the adapter's name"
        )
    return {
        key: parameter
        for key, parameter in peft_model.named_parameters()
        if _adapter_key(key, name) is not None
    }


def _adapter_key(key: str, name: str) -> str | None:
    """Return the name-free key under which PEFT stores `key` if it belongs to adapter `name`."""
    match = re.fullmatch(
        rf"(.*\.(?:lora_\w+|trainable_tokens_delta))\.{re.escape(name)}(\..*)?", key
    )
    return match.group(1) + (match.group(2) or "") if match else None


def set_trainable(peft_model: PeftModel, names: Iterable[str]) -> None:
    """Make exactly the parameters of the named adapters trainable."""
    trainable = {id(p) for name in names for p in adapter_parameters(peft_model, name).values()}
    for parameter in peft_model.parameters():
        parameter.requires_grad_(id(parameter) in trainable)


def active_adapter(peft_model: PeftModel) -> str:
    """Return the name of the one adapter that takes part in a forward."""
    active = peft_model.active_adapter
    return active if isinstance(active, str) else active[0]


@contextmanager
def use_adapter(peft_model: PeftModel, name: str) -> Iterator[None]:
    """Run the body with adapter `name` active.

    Inside the body and after it, also after an exception, every `requires_grad` flag is what it was
    before, and afterwards the previous adapter is active again.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    previous = active_adapter(peft_model)
    try:
        _activate(peft_model, name, flags)
        yield
    finally:
        _activate(peft_model, previous, flags)


def _activate(peft_model: PeftModel, name: str, flags: list[tuple[nn.Parameter, bool]]) -> None:
    layers = (m for m in peft_model.modules() if isinstance(m, BaseTunerLayer))
    if active_adapter(peft_model) != name or any(m.active_adapters != [name] for m in layers):
        peft_model.set_adapter(name)
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


def checkpoint_contexts(
    peft_model: PeftModel,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the forward and recompute contexts of one gradient-checkpointed layer.

    Recomputation happens in the backward pass, when another adapter may be active; the layer must
    be recomputed under the adapter of its forward.
    """
    return nullcontext(), use_adapter(peft_model, active_adapter(peft_model))


def _gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(parameters)


def adapter_state(
    peft_model: PeftModel, name: str, state_dict: dict[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Return one adapter's weights on the CPU under PEFT's stored keys.

    Args:
        peft_model: The model.
        name: The adapter.
        state_dict: Weights by full-model keys, with or without a leading `peft_model.`, as
            `accelerator.get_state_dict` gathers them; None reads the model itself, and under ZeRO-3
            gathers its shards, which every process must then take part in.
    """
    parameters = adapter_parameters(peft_model, name)
    if state_dict is not None:
        plain = {key.removeprefix("peft_model."): value for key, value in state_dict.items()}
        absent = sorted(set(parameters) - set(plain))
        if absent:
            raise KeyError(
                f"state_dict lacks {len(absent)} keys of adapter {name!r}: {absent}; expected all "
                "of them; pass the gathered state of the whole model"
            )
        return {_stored(key, name): plain[key].detach().cpu().clone() for key in parameters}
    with _gathered(list(parameters.values())):
        return {_stored(key, name): p.detach().cpu().clone() for key, p in parameters.items()}


def _stored(key: str, name: str) -> str:
    stored = _adapter_key(key, name)
    assert stored is not None
    return stored


def save_adapter(
    peft_model: PeftModel,
    name: str,
    directory: str | Path,
    *,
    state_dict: dict[str, Tensor] | None = None,
) -> None:
    """Write one adapter as a plain PEFT folder: `adapter_config.json` and safetensors.

    PEFT's own saving refuses two adapters of which only one has trainable tokens.
    """
    state = adapter_state(peft_model, name, state_dict)
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
    optional_keys: tuple[str, ...] = (),
) -> None:
    """Copy the weights stored in `directory` into adapter `name`, which must fit them exactly.

    Args:
        peft_model: The model, with the adapter attached.
        name: The adapter.
        directory: A PEFT folder with safetensors.
        optional_keys: Key endings that may be missing, for imports of other layouts.

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
    missing = [
        key for key in own if key not in stored and not key.endswith(optional_keys or ("\0",))
    ]
    unexpected = [key for key in stored if key not in own]
    if missing or unexpected:
        raise KeyError(
            f"{path} does not fit adapter {name!r}: missing keys {sorted(missing)}, unexpected keys "
            f"{sorted(unexpected)}; expected exactly the adapter's {len(own)} keys; check that "
            "backbone, targets and ranks are those of the checkpoint"
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
