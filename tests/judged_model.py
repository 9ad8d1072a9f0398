"""A tiny model that writes thoughts it was taught, and a judge that refuses half of them."""

from collections.abc import Callable
from typing import Any

import torch

from twn_rl.data.record import Item
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.config import LoraSettings
from twn_rl.modeling.gate import QUERY_SIDE, Gate
from twn_rl.modeling.judge import Judge
from twn_rl.modeling.model import DualLoraModel

TAUGHT = {
    "camel": "<think> tree above </think>",
    "pizza": "<think> row two </think>",
    "zebra one": "<think> column three it is </think>",
    "tree": "<think> one </think>",
    "row": "it is",  # no thought
}

LEVEL = 0.6


def judged_model(make_model: Callable[..., DualLoraModel]) -> DualLoraModel:
    """Return a model that writes `TAUGHT`, with a judge that refuses two of its four thoughts.

    Its gate, with threshold 0, lets everybody think.
    """
    model = make_model("llama", reasoning_lora=LoraSettings(r=8, alpha=16), gate_threshold=0.0)
    items = [Item(text=text) for text in TAUGHT]
    written = [model.completion_ids(text, add_eos=True) for text in TAUGHT.values()]
    batch = model.collate(items, written)
    with torch.no_grad():  # a random head is almost flat, and no adapter could sharpen it
        decoder: Any = model.backbone.model.get_decoder()
        decoder.norm.weight.mul_(60)
    parameters = list(adapter_parameters(model.peft_model, REASONING_ADAPTER).values())
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for step in range(400):
        if step % 10 == 0 and model.reason(batch) == written:
            break
        optimizer.zero_grad()
        model.token_nll(batch)[0].sum().backward()
        optimizer.step()
    model.requires_grad_(False)
    gate = Gate(model.hidden_size, 4)
    judge = gate.judge = _some_judge(model.hidden_size)
    model.gates[QUERY_SIDE] = gate
    prefix = model.read(model.prepare(model.collate(items[:4])))
    states = model.read_out(prefix), model.read_out(prefix, written[:4])
    distances = judge.distance(*states).sort().values
    judge.reference.copy_((distances[1:] + distances[:-1]) / 2)  # one between each two
    judge.level.fill_(LEVEL)
    return model


def _some_judge(width: int) -> Judge:
    judge = Judge(width, 2, 3)
    generator = torch.Generator().manual_seed(0)
    judge.mean.copy_(torch.randn(2 * width, generator=generator))
    judge.axes.copy_(torch.eye(2 * width)[:2])
    judge.spread.fill_(1.0)
    return judge
