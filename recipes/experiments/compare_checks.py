"""Which check notices a thought that does not answer? The judge beside simpler ways.

    accelerate launch recipes/experiments/compare_checks.py --model outputs/demo/refit

Reads the labels that recipes/gate_embed.py left in MODEL/gate, measures the same on the reported
splits, and lets the gate decide with each check behind it. A check that refuses leaves the vector
without thinking. Everything is fitted to the gate's split and set on the validation split; the
reported splits are looked at once, at the end. Each of the four Gaussian checks may refuse 5 % of
the helpful thoughts of the validation split. Writes and prints one table: hit@1 and, in brackets,
the share of thoughts that a check keeps. A few minutes on one CPU core for the embedded default.
On it no check noticed the thoughts about three hops in both of two seeds (docs/results/gate.md).
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import set_seed

from twn_rl.evaluation.results import REPORTED_SPLITS
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.modeling.gate import QUERY_SIDE, FitSettings, Gate, fit_gate
from twn_rl.modeling.judge import fit_judge
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import write_text
from twn_rl.training.gate_labels import GateLabels, cut_labels, read_labels
from twn_rl.training.measure_gains import LabelSettings, measure_gains

logger = logging.getLogger(__name__)

# Labels -> which thoughts are kept, (N,) of bool.
Check = Callable[[GateLabels], NDArray[np.bool_]]


@dataclass
class ChecksScriptArguments:
    """What to compare checks on."""

    model: str = field(
        default="outputs/demo/refit", metadata={"help": "Model with a gate and its labels."}
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where table and labels go; default: MODEL/checks."}
    )
    splits: list[str] = field(
        default_factory=lambda: ["validation", *REPORTED_SPLITS],
        metadata={"help": "Splits to report on, where they are."},
    )
    split: str = field(default="gate", metadata={"help": "Split that the gate has learned from."})
    temperature: float = field(
        default=0.05, metadata={"help": "InfoNCE temperature of the gate's labels."}
    )
    max_refused: float = field(
        default=0.05, metadata={"help": "Share of helpful thoughts a Gaussian check may refuse."}
    )
    num_gates: int = field(default=5, metadata={"help": "Gates of the ensemble."})
    batch_size: int = field(default=64, metadata={"help": "Inputs a forward."})
    seed: int = field(default=0, metadata={"help": "Of the fits."})


def main(script: ChecksScriptArguments, data: DataArguments) -> Path:
    """Measure, compare, write and print the table; return its folder."""
    set_up_logging()
    set_seed(script.seed)
    path = Path(script.model)
    output = Path(script.output_dir or path / "checks")
    splits = {name: data.load(name) for name in script.splits if data.has(name)}  # pyright: ignore[reportArgumentType]
    model = DualLoraModel.from_pretrained(path).to(join_processes().device)
    train, validation = (
        read_labels(path / "gate" / "labels" / QUERY_SIDE / name)
        for name in (script.split, "validation")
    )
    save_run(output, script, data)
    settings = LabelSettings(temperature=script.temperature, batch_size=script.batch_size)
    measured = {
        name: measure_gains(model, records, QUERY_SIDE, output / "labels" / name, settings)
        for name, records in splits.items()
    }
    gate, threshold = model.gates[QUERY_SIDE], model.config.gate_threshold
    assert isinstance(gate, Gate)
    assert threshold is not None
    found = checks(script, train, validation, threshold)
    text = table(measured, found, lambda labels: says(gate, labels) > threshold)
    write_text(output / "checks.md", text)
    print(text)
    return output


def checks(
    script: ChecksScriptArguments, train: GateLabels, validation: GateLabels, threshold: float
) -> dict[str, Check]:
    """Return every check by its name: none, before thinking, after thinking."""
    helps = cut_labels(train.gains, 0.1).astype(np.float32)
    gates = [
        fit_gate(states(train)[0], torch.from_numpy(helps), FitSettings(seed=script.seed + n))[0]
        for n in range(script.num_gates)
    ]
    gains = torch.from_numpy(train.gains)
    classes = (gains[gains != 0] > 0).float()
    classifier, _ = fit_gate(both(train)[gains != 0], classes, FitSettings(seed=script.seed))

    def gaussian(first: int, second: int) -> Check:
        """Judge by some of the two states: 0 is without the thought, 1 with it."""
        parts = [
            tuple(
                states(labels)[side][torch.from_numpy(labels.gains) > 0] for side in (first, second)
            )
            for labels in (train, validation)
        ]
        judge = fit_judge(
            (parts[0][0], parts[0][1]), (parts[1][0], parts[1][1]), max_refused=script.max_refused
        )
        if judge is None:
            raise ValueError("too few helpful thoughts; expected more labels; label more records")
        return lambda labels: (
            judge.plausibility(states(labels)[first], states(labels)[second]) > judge.level
        ).numpy()

    return {
        "gate alone": lambda labels: np.ones(len(labels.rows), dtype=bool),
        f"before: least sure of {script.num_gates} gates": lambda labels: (
            np.min([says(gate, labels) for gate in gates], axis=0) > threshold
        ),
        "before: usual question": gaussian(0, 0),
        "after: usual vector with the thought": gaussian(1, 1),
        "after: classifier of both states": lambda labels: (
            classifier.probability(both(labels)).numpy() > 0.5
        ),
        "after: judge of both states": gaussian(0, 1),
    }


def states(labels: GateLabels) -> tuple[Tensor, Tensor]:
    """Return the states (N, D) without and with the thoughts."""
    return torch.from_numpy(labels.states.copy()), torch.from_numpy(labels.think_states.copy())


def both(labels: GateLabels) -> Tensor:
    """Return both states of each input side by side, (N, 2D), each half of length 1."""
    return torch.cat([torch.nn.functional.normalize(part, dim=1) for part in states(labels)], 1)


def says(gate: Gate, labels: GateLabels) -> NDArray[np.float32]:
    """Return the probability (N,) that thinking helps."""
    return gate.probability(states(labels)[0]).numpy()


def table(measured: dict[str, GateLabels], found: dict[str, Check], decides: Check) -> str:
    """Return hit@1 in % by check and split, and the share of the gate's thoughts that are kept."""
    hits = {
        name: [
            np.array([np.mean([rank == 1 for rank in row[f"{mode}_ranks"]]) for row in labels.rows])
            for mode in ("no_think", "think")
        ]
        for name, labels in measured.items()
    }
    rows = [
        ["never", *(f"{100 * before.mean():.1f}" for before, _ in hits.values())],
        ["always", *(f"{100 * after.mean():.1f}" for _, after in hits.values())],
        ["oracle", *(f"{100 * np.maximum(*both).mean():.1f}" for both in hits.values())],
    ]
    for check, keeps in found.items():
        cells = []
        for name, labels in measured.items():
            thinks, (before, after) = decides(labels), hits[name]
            is_kept = thinks & keeps(labels)
            share = is_kept.sum() / max(1, thinks.sum())
            cells.append(f"{100 * np.where(is_kept, after, before).mean():.1f} ({100 * share:.0f})")
        rows.append([check, *cells])
    return markdown_table(["hit@1 in % (kept in %)", *measured], rows)


if __name__ == "__main__":
    start(main, (ChecksScriptArguments, DataArguments), description=__doc__)
