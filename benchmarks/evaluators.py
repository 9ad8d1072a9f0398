r"""Which evaluator tells right thoughts from wrong ones? Planted errors on WordNet's definitions.

    python benchmarks/evaluators.py --model outputs/wordnet_smollm2/seed0/warm_start \
        --train_file outputs/wordnet/train.jsonl --rl_file outputs/wordnet/rl.jsonl

Every record has three drafts: its own CoT, the same with the word of a hard negative at its end
(`near_miss`), and another record's (`foreign`). Records should be such as the model was not trained
on. AUC is of the own CoTs' worth against the wrong ones'; rejected and kept are shares of the wrong
and of the own CoTs at the threshold. Scores are kept below output_dir: a killed run goes on.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from twn_rl.data.record import Record
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import set_up_logging
from twn_rl.metrics.calibration import roc_auc
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.training.thought_selection.drafts import Draft
from twn_rl.training.thought_selection.worth import EVALUATORS, build_evaluator, judge

OWN, WRONG = "own", ("near_miss", "foreign")


@dataclass
class BenchmarkArguments:
    """Who judges what."""

    model: str = field(
        default="outputs/wordnet_smollm2/seed0/warm_start", metadata={"help": "Model that judges."}
    )
    split: str = field(default="rl", metadata={"help": "Records it was not trained on."})
    evaluators: list[str] = field(
        default_factory=lambda: list(EVALUATORS), metadata={"help": "margin, yes_no, or both."}
    )
    threshold: float = field(default=0.0, metadata={"help": "Smallest worth that is kept."})
    num_records: int | None = field(default=None, metadata={"help": "First records; null: all."})
    batch_size: int = field(default=16, metadata={"help": "Drafts a forward."})
    seed: int = field(default=0, metadata={"help": "Of the planted errors."})
    output_dir: str = field(default="outputs/evaluators", metadata={"help": "Where scores go."})

    def __post_init__(self) -> None:
        """Refuse evaluators that do not exist."""
        if not self.evaluators or not set(self.evaluators) <= set(EVALUATORS):
            raise ValueError(
                f"evaluators = {self.evaluators}; expected some of {EVALUATORS}; correct the list"
            )


def main(script: BenchmarkArguments, data: DataArguments) -> list[dict[str, Any]]:
    """Judge, print a table, and return its rows."""
    set_up_logging()
    records = list(data.load(script.split))[: script.num_records]  # pyright: ignore[reportArgumentType]
    rows = plant(records, seed=script.seed)
    model = DualLoraModel.from_pretrained(script.model)
    output, table = Path(script.output_dir), []
    for name in script.evaluators:
        evaluator = build_evaluator(
            name,
            model,
            records,
            output / "bank",
            batch_size=script.batch_size,
            seed=script.seed,
        )
        scores = judge(rows, evaluator, model, output / name, batch_size=script.batch_size)
        table.append({"evaluator": name, **measured(list(scores), script.threshold)})
    cells = [[f"{v:.3f}" if isinstance(v, float) else str(v) for v in r.values()] for r in table]
    print(markdown_table(list(table[0]), cells), end="")
    return table


def plant(records: Sequence[Record], *, seed: int = 0) -> list[dict[str, Any]]:
    """Return one row a record with its own CoT and two wrong ones, as sources of drafts do.

    Raises:
        ValueError: For fewer than two records, or one whose CoT does not end in its word.
    """
    die = random.Random(seed)
    words = {record.id: str(record.metadata.get("word")) for record in records}
    rows = []
    for position, record in enumerate(records):
        own, word = record.query_cot or "", words[record.id]
        if len(records) < 2 or not own.endswith(word):
            raise ValueError(
                f"record {record.id!r} of {len(records)}: query_cot = {own!r}; expected two or "
                f"more records whose CoTs end in their word, here {word!r}; use those of "
                "recipes/prepare/wordnet.py"
            )
        others = [records[p] for p in range(len(records)) if p != position]
        like = [
            other for other in others if other.metadata.get("task") == record.metadata.get("task")
        ]
        wrong = words[die.choice(like or others).id]
        if record.negatives:
            wrong = (record.negatives[0].text or "").split(", a ")[0]
        cots = {
            OWN: own,
            WRONG[0]: own.removesuffix(word) + wrong,
            WRONG[1]: die.choice(others).query_cot or "",
        }
        drafts = [asdict(Draft(cot, source)) for source, cot in cots.items()]
        rows.append({"id": record.id, "drafts": drafts})
    return rows


def measured(rows: Sequence[dict[str, Any]], threshold: float) -> dict[str, float | None]:
    """Return how well worth tells own from wrong CoTs, None where none could be judged."""
    worth: dict[str, list[float]] = {source: [] for source in (OWN, *WRONG)}
    for row in rows:
        for draft in row["drafts"]:
            if draft["problem"] is None:
                worth[draft["source"]].append(draft["worth"])
    kept = {s: sum(w >= threshold for w in v) / len(v) if v else None for s, v in worth.items()}
    found: dict[str, float | None] = {"kept": kept[OWN]}
    for source in WRONG:
        share = kept[source]
        labels = [1] * len(worth[OWN]) + [0] * len(worth[source])
        found[f"rejected_{source}"] = None if share is None else 1 - share
        found[f"auc_{source}"] = roc_auc([*worth[OWN], *worth[source]], labels)
    return found


if __name__ == "__main__":
    start(main, (BenchmarkArguments, DataArguments), description=__doc__)
