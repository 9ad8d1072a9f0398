"""Does the vector read its thought? Score a model with own, gold, borrowed, empty and cut thoughts.

    accelerate launch recipes/experiments/probe_cot.py --model outputs/demo/refit

Prints and writes one table: hit@1 under each kind of thought, and the cosine between a query's
vector with its own thought and with the other one (1 with no spread: thoughts are not read). On the
embedded default, shuffled, foreign and empty thoughts cost the whole gain. Under a minute on two
CPU cores.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

from transformers import set_seed

from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.modes import ABLATIONS, mode_name
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

MODES = ("always", *ABLATIONS, "never")


@dataclass
class ProbeScriptArguments:
    """What to probe."""

    model: str = field(default="outputs/demo/refit", metadata={"help": "Model to probe."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Where table and numbers go; default: MODEL/probe_cot."}
    )
    splits: list[str] = field(
        default_factory=lambda: ["test", "unseen_pairs", "ood"],
        metadata={"help": "Splits to probe on, where they are."},
    )
    max_think_tokens: int | None = field(
        default=None, metadata={"help": "Longest CoT in tokens; default: the model's."}
    )
    batch_size: int = field(default=64, metadata={"help": "Queries or targets a forward."})
    seed: int = field(default=0, metadata={"help": "Of borrowed thoughts and the bootstrap."})


def main(script: ProbeScriptArguments, data: DataArguments) -> Path:
    """Probe on every split, write and print the tables; return their folder."""
    set_up_logging()
    set_seed(script.seed)
    output = Path(script.output_dir or Path(script.model) / "probe_cot")
    splits = {name: data.load(name) for name in script.splits if data.has(name)}  # pyright: ignore[reportArgumentType]
    save_run(output, script, data)
    model = DualLoraModel.from_pretrained(script.model).to(join_processes().device)
    tables = []
    for name, records in splits.items():
        settings = EvaluationSettings(
            split=name,
            modes=MODES,
            batch_size=script.batch_size,
            max_think_tokens=script.max_think_tokens,
            seed=script.seed,
        )
        result = evaluate(model, records, settings, processes=join_processes())
        if join_processes().is_main_process:
            result.save(output / name)
        tables.append(table(name, result.metrics))
    if join_processes().is_main_process:
        write_text(output / "probe_cot.md", "\n".join(tables))
        print("\n".join(tables))
    join_processes().wait_for_everyone()
    return output


def table(split: str, metrics: dict[str, float]) -> str:
    """Return a Markdown table of one split: a row for each kind of thought."""
    rows = []
    for mode in MODES:
        start = f"{split}/all/{mode}"
        if f"{start}/hit@1" not in metrics:
            continue
        near = f"{split}/collapse/own_to_{mode}"
        mean, std = metrics.get(f"{near}/cosine_mean"), metrics.get(f"{near}/cosine_std")
        cosine = "" if mean is None else f"{mean:.3f} ± {std:.3f}"
        queries, hit = f"{metrics[f'{start}/num_queries']:.0f}", metrics[f"{start}/hit@1"]
        rows.append((mode_name(mode), queries, f"{100 * hit:.1f}", cosine))
    columns = (split, "queries", "hit@1 in %", "cosine to the vector with the own thought")
    return markdown_table(columns, rows)


if __name__ == "__main__":
    start(main, (ProbeScriptArguments, DataArguments), description=__doc__)
