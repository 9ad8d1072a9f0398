"""The two LoRA adapters: attach, switch, freeze. Knows nothing of items, losses or files.

PEFT and TRL both flip `requires_grad` when they change the active adapter; here a switch never
changes what is trainable.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from twn_rl.modeling.backbone import Backbone, whole_parameters
from twn_rl.modeling.config import LoraSettings

REASONING_ADAPTER = "default"  # TRL's GRPO reads peft_config["default"]
EMBEDDING_ADAPTER = "embedding"
SNAPSHOT_ADAPTER = "reasoning_snapshot"


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
    start_token: int | None = None,
    seed: int = 0,
) -> PeftModel:
    """Return `backbone.model` with both adapters; the reasoning adapter is active, both trainable.

    The read-out rows belong to the embedding adapter: they are saved, trained and switched with it.
    The same seed gives the same initial weights, and the global random state is left as it was.
    With `start_token` the rows start as that token's.
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
        _init_readout_rows(peft_model, start_token)
    peft_model.set_adapter(REASONING_ADAPTER)
    set_trainable(peft_model, (REASONING_ADAPTER, EMBEDDING_ADAPTER))
    return peft_model


def _init_readout_rows(peft_model: PeftModel, start_token: int | None) -> None:
    # New rows start as copies of untrained base rows; a common mean with small noise lets the
    # tokens differ from each other and stay inside the range of trained embeddings.
    for name, rows in adapter_parameters(peft_model, EMBEDDING_ADAPTER).items():
        if "trainable_tokens_delta" not in name:
            continue
        base: Any = peft_model.get_base_model()
        table = base.get_input_embeddings().token_adapter.base_layer.weight
        if table.is_meta:
            return
        with torch.no_grad():
            if start_token is not None:
                rows.copy_(table[start_token].expand_as(rows))
                continue
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
        if stored_key(key, name) is not None
    }


def change_last_bits(peft_model: PeftModel, number: int) -> None:
    """Move every trainable weight that is not 0 to one of its two neighbours, drawn from `number`.

    Another processor sums in another order, which differs as much: what such runs of one seed end
    at tells what a result owes to the machine.
    """
    generator = torch.Generator().manual_seed(number)
    with torch.no_grad():
        for weight in peft_model.parameters():
            if weight.requires_grad:
                side = torch.randint(0, 2, weight.shape, generator=generator).to(weight) * 2 - 1
                moved = torch.nextafter(weight, side * torch.inf)
                weight.copy_(torch.where(weight == 0, weight, moved))


def stored_key(key: str, name: str) -> str | None:
    """Return the name-free key under which PEFT stores `key`; None if not of adapter `name`.

    >>> stored_key("q_proj.lora_A.default.weight", "default")
    'q_proj.lora_A.weight'
    """
    match = re.fullmatch(
        rf"(.*\.(?:lora_\w+|trainable_tokens_delta))\.{re.escape(name)}(\..*)?", key
    )
    return match.group(1) + (match.group(2) or "") if match else None


def snapshot_reasoning_adapter(peft_model: PeftModel) -> str:
    """Freeze a copy of the reasoning adapter's present weights and return the copy's name.

    In "kv_detach" the vectors depend on the reasoning adapter; a scorer of its rollouts must not
    move while it is trained. A later call refreshes the copy. Copies are never saved.
    """
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    if SNAPSHOT_ADAPTER not in peft_model.peft_config:
        peft_model.add_adapter(SNAPSHOT_ADAPTER, peft_model.peft_config[REASONING_ADAPTER])
    source = adapter_parameters(peft_model, REASONING_ADAPTER)
    copies = adapter_parameters(peft_model, SNAPSHOT_ADAPTER)
    with torch.no_grad():
        for key, copy in copies.items():
            copy.copy_(source[key.replace(f".{SNAPSHOT_ADAPTER}", f".{REASONING_ADAPTER}")])
    for parameter, flag in flags:
        parameter.requires_grad_(flag)
    for copy in copies.values():
        copy.requires_grad_(False)
    return SNAPSHOT_ADAPTER


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
def use_adapter(peft_model: PeftModel, name: str | None) -> Iterator[None]:
    """Run the body with adapter `name` active; None is the bare backbone.

    Neither switch changes a `requires_grad` flag. Afterwards, also after an exception, what was
    active before is active again.
    """
    if name is None:
        with without_adapters(peft_model):
            yield
        return
    switch = _switch_of(peft_model)
    before = switch.state(peft_model)
    switch.set(peft_model, switch.state_of(peft_model, name))
    try:
        yield
    finally:
        switch.set(peft_model, before)


_State = tuple[str, list[Any]]  # active adapter, and what that means in each layer


class _Switch:
    """The layers in which adapters are switched, and what PEFT's own switch sets in each.

    PEFT walks through all modules, and turns gradients on and off: of a 2B backbone that takes
    milliseconds, twice for every use. What is active in a layer is one attribute.
    """

    def __init__(self, peft_model: PeftModel) -> None:
        kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
        self.adapters = tuple(peft_model.peft_config)
        self.layers: list[Any] = [m for m in peft_model.modules() if isinstance(m, kinds)]
        self.known: dict[str, _State] = {}

    def state(self, peft_model: PeftModel) -> _State:
        """Return what is active now."""
        return active_adapter(peft_model), [layer._active_adapter for layer in self.layers]

    def state_of(self, peft_model: PeftModel, name: str) -> _State:
        """Return what is active once PEFT has switched to an adapter."""
        if name not in self.known:
            before = self.state(peft_model)
            flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
            try:
                peft_model.set_adapter(name)
                self.known[name] = self.state(peft_model)
            finally:
                self.set(peft_model, before)
                _restore(flags)
        return self.known[name]

    def set(self, peft_model: Any, state: _State) -> None:
        """Make a state the active one."""
        for layer, active in zip(self.layers, state[1], strict=True):
            layer._active_adapter = active
        peft_model.base_model.active_adapter = peft_model.active_adapter = state[0]


def _switch_of(peft_model: PeftModel) -> _Switch:
    """Return the model's switch; an adapter that was added or deleted since makes a new one."""
    switch = vars(peft_model).get("_twn_switch")
    if switch is None or switch.adapters != tuple(peft_model.peft_config):
        switch = vars(peft_model)["_twn_switch"] = _Switch(peft_model)
    return switch


def _restore(flags: list[tuple[nn.Parameter, bool]]) -> None:
    for parameter, flag in flags:
        if parameter.requires_grad != flag:
            parameter.requires_grad_(flag)


@contextmanager
def without_adapters(peft_model: PeftModel) -> Iterator[None]:
    """Run the body with the bare backbone; afterwards everything is as before.

    Other than PEFT's `disable_adapter` it touches no `requires_grad`, and it may stand inside that.
    """
    layers = _switch_of(peft_model).layers
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, is_disabled in zip(layers, before, strict=True):
            layer._disable_adapters = is_disabled


def under_own_adapter(checkpoint: Callable[..., Any], peft_model: PeftModel) -> Callable[..., Any]:
    """Return a checkpointing function that recomputes a layer under the adapter of its forward.

    Recomputation happens in the backward pass, when another adapter may be active. Only the layer
    itself is switched, so that it costs no walk through the whole model.

    Args:
        checkpoint: transformers' function: (layer's forward, *inputs) -> outputs.
        peft_model: Whose active adapter counts.
    """

    def run(forward: Any, *inputs: Any) -> Any:
        name, layer = active_adapter(peft_model), _owner(forward, peft_model)
        tuners = [m for m in layer.modules() if isinstance(m, BaseTunerLayer)]

        def again(*inner: Any) -> Any:
            with _switched(tuners, name):
                return forward(*inner)

        return checkpoint(again, *inputs)

    return run


def _owner(forward: Any, default: nn.Module) -> nn.Module:
    """Return the module whose forward this is, bound or as the first argument of a partial."""
    inside = getattr(forward, "func", forward)
    owners = (*getattr(forward, "args", ()), getattr(inside, "__self__", None))
    return next((owner for owner in owners if isinstance(owner, nn.Module)), default)


@contextmanager
def _switched(tuners: Sequence[BaseTunerLayer], name: str) -> Iterator[None]:
    others = [(tuner, list(tuner.active_adapters)) for tuner in tuners]
    others = [(tuner, names) for tuner, names in others if names != [name]]
    modules: list[Any] = [tuner for tuner, _ in others]
    flags = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    try:
        for tuner, _ in others:
            tuner.set_adapter(name)
        _restore(flags)
        yield
    finally:
        for tuner, names in others:
            tuner.set_adapter(names)
        _restore(flags)
