"""What its own thought gains every input: embedded without and with it, against fixed vectors.

The gain is attributed to one side: the other side's vectors come from a bank and never change.
Knows no gate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from twn_rl.data.record import Item, Record
from twn_rl.metrics.negatives import FalseNegatives
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import DOCUMENT_SIDE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import Processes
from twn_rl.runtime.sharded_pass import Progress, ShardedPass, make_shards
from twn_rl.runtime.whole_files import digest
from twn_rl.training.gate_examples import (
    GateExample,
    bank_items,
    choose_examples,
    gate_examples,
)
from twn_rl.training.gate_labels import (
    LABEL_FORMAT,
    GateLabels,
    LabelsError,
    read_labels,
    read_shard,
    write_shard,
)
from twn_rl.training.rollout_scorer import embed_items
from twn_rl.training.similarity_columns import similarity_columns
from twn_rl.training.target_bank import TargetBank

BANK_DIR = "bank"
PAIRS_PER_PRODUCT = 1024


@dataclass(frozen=True)
class LabelSettings:
    """How inputs are labelled.

    Attributes:
        temperature: InfoNCE temperature; the one the embedding adapter was trained with.
        max_think_tokens: Budget of a thought; None takes the model's.
        max_examples: Distinct inputs to label, drawn by `seed`; None takes all. Negatives always
            come from all records.
        seed: Of that draw.
        batch_size: Inputs a forward; does not change what is measured.
        shard_size: Inputs between two writes; a kill loses at most one shard per process.
    """

    temperature: float = 0.02
    max_think_tokens: int | None = None
    max_examples: int | None = None
    seed: int = 0
    batch_size: int = 32
    shard_size: int = 256

    def __post_init__(self) -> None:
        """Collect every problem into one error."""
        problems = Problems()
        problems.expect(self, ">= 1", "batch_size", "shard_size")
        problems.expect(self, "None or >= 1", "max_think_tokens", "max_examples")
        problems.expect(self, "> 0", "temperature")
        problems.refuse("LabelSettings")


def measure_gains(
    model: DualLoraModel,
    records: Sequence[Record],
    side: str,
    directory: str | Path,
    settings: LabelSettings | None = None,
    *,
    processes: Processes | None = None,
    rebuild: bool = False,
    show_progress_bar: bool = True,
) -> GateLabels:
    """Measure both ways of embedding each input of one side, or reopen what was measured.

    Finished shards are kept while model, settings and records are the same, so that a killed pass
    goes on where it stopped. Several processes share the shards, each with the whole model; the
    result is that of one process.

    Args:
        model: The model, unsharded; on any device.
        records: Where inputs, partners and negatives come from.
        side: `gate.QUERY_SIDE` or `gate.DOCUMENT_SIDE`.
        directory: Folder of labels and bank; all processes must see the same one.
        settings: How to label; defaults if None.
        processes: `PartialState` or `Accelerator` when several processes share the work.
        rebuild: Measure anew, whatever is stored.
        show_progress_bar: Show inputs done, on the main process.

    Raises:
        LabelsError: If the folder holds labels of another model, other settings or other records,
            unless `rebuild`; if another run writes to it; or if shards got lost.
    """
    settings, folder = settings or LabelSettings(), Path(directory)
    examples = choose_examples(
        gate_examples(records, side), settings.max_examples, seed=settings.seed
    )
    if not examples:
        raise LabelsError("records is empty; expected at least one; check the file")
    items, pools = bank_items(records, side)
    plan = _plan(model, side, settings, examples, items, pools)
    work = ShardedPass(
        *(folder, plan, len(examples), settings.shard_size),
        error=LabelsError,
        rebuild_flag="--rebuild_labels",
    )
    shared: dict[str, Any] = {"processes": processes, "show_progress_bar": show_progress_bar}
    bank = TargetBank(folder / BANK_DIR)
    with work.opened(rebuild=rebuild, belongings=[bank.directory], processes=processes):
        missing = {
            number: rows
            for number, rows in enumerate(work.ranges)
            if read_shard(folder, number, len(rows)) is None
        }
        if missing:
            bank.build(
                items,
                lambda batch: embed_items(model, batch),
                fingerprint=plan["scorer"],
                batch_size=settings.batch_size,
                pools=pools,
                **shared,
            )
        gauge = _Gauge(model, bank, settings, is_latent=_is_latent(model, side))

        def make(number: int, rows: Sequence[int], progress: Progress) -> None:
            write_shard(folder, number, *gauge.measure([examples[row] for row in rows], progress))

        make_shards(
            missing,
            make,
            description=f"{side} labels",
            unit="input",
            num_shards=len(work.ranges),
            **shared,
        )
    return read_labels(folder)


def _plan(
    model: DualLoraModel,
    side: str,
    settings: LabelSettings,
    examples: Sequence[GateExample],
    items: Sequence[Item],
    pools: Sequence[str],
) -> dict[str, Any]:
    keys = [[example.key, example.partners] for example in examples]
    competitors = sorted({(item.content_key(), p) for item, p in zip(items, pools, strict=True)})
    fingerprints = Fingerprints(model)
    return {
        "format": LABEL_FORMAT,
        "side": side,
        "scorer": fingerprints.vectors,
        "thoughts": fingerprints.thoughts,
        "temperature": settings.temperature,
        "max_think_tokens": settings.max_think_tokens or model.config.max_think_tokens,
        "num_examples": len(examples),
        "records": digest([keys, competitors]),
        **({"is_latent": True} if _is_latent(model, side) else {}),
    }


def _is_latent(model: DualLoraModel, side: str) -> bool:
    """Tell whether an input that does not think is served with its latent thought."""
    return side == DOCUMENT_SIDE and model.config.latent_documents


class _Gauge:
    """Measures examples against a bank."""

    def __init__(
        self, model: DualLoraModel, bank: TargetBank, settings: LabelSettings, *, is_latent: bool
    ) -> None:
        self.model, self.bank, self.settings = model, bank, settings
        self.is_latent = is_latent

    def measure(
        self, examples: Sequence[GateExample], progress: Progress
    ) -> tuple[list[dict[str, Any]], np.ndarray]:
        """Return one row an example, and the states (N, 2D) without and with its thought."""
        # A batch is as long as its longest prompt; pictures decide before words.
        order = sorted(range(len(examples)), key=lambda i: examples[i].item.length_estimate())
        no_think = torch.empty(len(examples), self.model.hidden_size)
        think = torch.empty_like(no_think)
        thoughts: list[dict[str, Any]] = [{}] * len(examples)
        for start in range(0, len(order), self.settings.batch_size):
            rows = order[start : start + self.settings.batch_size]
            batch = self._read([examples[row].item for row in rows])
            no_think[rows], think[rows] = batch[0].cpu(), batch[1].cpu()
            for row, thought in zip(rows, batch[2], strict=True):
                thoughts[row] = thought
            progress(len(rows))
        measured = [self._score(examples, states) for states in (no_think, think)]
        labelled = [
            _row(example, thought, before, after)
            for example, thought, before, after in zip(examples, thoughts, *measured, strict=True)
        ]
        return labelled, torch.cat([no_think, think], dim=1).numpy()

    def _read(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
        """Return states (n, D) without and with each input's own thought, and the thoughts."""
        model = self.model
        prompts = model.prepare(model.collate(items))
        start, prefix = model.read_both(prompts)
        no_think = model.read_out(prefix, is_latent=self.is_latent)
        written = model.reason(start, max_think_tokens=self.settings.max_think_tokens)
        usable = [model.completion_for_embedding(ids) for ids in written]
        think = model.read_out(prefix, usable)
        # An unusable thought is embedded as no-think; its gain is 0, not a rounding error.
        is_used = torch.tensor([bool(ids) for ids in usable], device=think.device)
        think = torch.where(is_used[:, None], think, no_think)
        eos = model.backbone.eos_token_id
        thoughts = [
            {
                "cot": model.think(ids).text,
                "think_tokens": sum(token != eos for token in ids),
                "problem": model.think(ids).problem,
            }
            for ids in written
        ]
        return no_think, think, thoughts

    def _score(self, examples: Sequence[GateExample], states: Tensor) -> list[dict[str, Any]]:
        """Return the means over each example's partners; its ranks as a list."""
        vectors = normalize(states, dim=-1)
        pairs = [(row, key, pool) for row, e in enumerate(examples) for key, pool in e.partners]
        known = FalseNegatives((examples[row].key, key) for row, key, _ in pairs)
        columns: dict[str, list[Any]] = {}
        for start in range(0, len(pairs), PAIRS_PER_PRODUCT):
            part = pairs[start : start + PAIRS_PER_PRODUCT]
            scored = similarity_columns(
                vectors[[row for row, _, _ in part]].to(self.model.device),
                [key for _, key, _ in part],
                self.bank,
                num_negatives=1,
                false_negative_ids=[known.of(examples[row].key) for row, _, _ in part],
                pools=[pool for _, _, pool in part],
                temperature=self.settings.temperature,
            )
            for name, values in scored.items():
                columns.setdefault(name, []).extend(values)
        members: list[list[int]] = [[] for _ in examples]
        for position, (row, _, _) in enumerate(pairs):
            members[row].append(position)
        return [
            {name: [values[p] for p in rows] for name, values in columns.items()}
            for rows in members
        ]


def _row(
    example: GateExample, thought: dict[str, Any], before: dict[str, Any], after: dict[str, Any]
) -> dict[str, Any]:
    losses = [float(np.mean(scored["info_nce"])) for scored in (before, after)]
    row: dict[str, Any] = {
        "id": example.id,
        "key": example.key,
        "task": example.task,
        "hop": example.hop,
        "no_think_loss": losses[0],
        "think_loss": losses[1],
        "gain": losses[0] - losses[1],
        **thought,
    }
    for name, scored in (("no_think", before), ("think", after)):
        # A pool may hold nothing but partners.
        hardest = [values[0] for values in scored["negative_similarities"] if values]
        row[f"{name}_ranks"] = scored["target_rank"]
        row[f"{name}_positive_similarity"] = float(np.mean(scored["positive_similarity"]))
        row[f"{name}_hardest_negative"] = float(np.mean(hardest)) if hardest else None
    return row
