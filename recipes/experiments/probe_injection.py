"""How far can a text steer a vector? Attack queries and documents with words and forged thoughts.

    twn-rl probe-injection --model outputs/demo/refit

Prints and writes two tables. In the first, part of each query is an attacker's, who wants one wrong
target of its pool to be found: how often it is the nearest, how often the right one still is, how
often the query thinks, and how near the vector stays to that without the attack. In the second the
wrong target itself is rewritten, to be found for a query about another one. Markup that an attacker
forges is shown to the model as text; the last row of the first table is what it would do if it were
not: the same thought in the thought's own place. A few minutes on two CPU cores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from twn_rl.evaluation.injection import choose_victims, measure_documents, measure_queries
from twn_rl.inference.options import ThinkMode
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.text_tables import markdown_table
from twn_rl.runtime.whole_files import write_json, write_text

COLUMNS = {
    "attack": "attack",
    "mode": "thinks",
    "queries": "queries",
    "steered": "wrong target nearest, %",
    "hit": "right target nearest, %",
    "think_rate": "think, %",
    "cosine": "cosine to unattacked",
}


@dataclass
class InjectionScriptArguments:
    """What to attack."""

    model: str = field(default="outputs/demo/refit", metadata={"help": "Model to attack."})
    output_dir: str | None = field(
        default=None,
        metadata={"help": "Where tables and numbers go; default: MODEL/probe_injection."},
    )
    split: str = field(default="test", metadata={"help": "Split whose queries are attacked."})
    num_queries: int = field(
        default=240, metadata={"help": "Queries to attack, drawn by the seed."}
    )
    batch_size: int = field(default=64, metadata={"help": "Inputs a forward."})
    seed: int = field(default=0, metadata={"help": "Of the draw of queries and wrong targets."})


def main(script: InjectionScriptArguments, data: DataArguments) -> Path:
    """Attack, write and print the tables; return their folder."""
    set_up_logging()
    set_seed(script.seed)
    output = Path(script.output_dir or Path(script.model) / "probe_injection")
    records = data.load(script.split)  # pyright: ignore[reportArgumentType]
    if join_processes().is_main_process:
        save_run(output, script, data)
        model = DualLoraModel.from_pretrained(script.model).to(join_processes().device)
        has_decision = "query" in dict(model.gates.items()) or model.is_policy_deciding
        modes: list[ThinkMode] = ["never", "always"]
        if has_decision:
            modes.append("auto")
        victims = choose_victims(records, script.num_queries, script.seed)
        options = {"batch_size": script.batch_size, "show_progress_bar": False}
        queries = measure_queries(model, victims, modes, **options)
        documents = measure_documents(model, victims, modes, **options)
        write_json(output / "metrics.json", {"queries": queries, "documents": documents}, indent=1)
        text = f"attacks on queries\n\n{table(queries)}\nattacks by documents\n\n{table(documents)}"
        write_text(output / "probe_injection.md", text)
        print(text)
    join_processes().wait_for_everyone()
    return output


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a Markdown table of rows, with the columns they have."""
    names = [name for name in COLUMNS if name in rows[0]]
    cells = [[_cell(name, row[name]) for name in names] for row in rows]
    return markdown_table([COLUMNS[name] for name in names], cells, texts=(0, 1))


def _cell(name: str, value: Any) -> str:
    if name in ("steered", "hit", "think_rate"):
        return f"{100 * value:.1f}"
    return f"{value:.3f}" if name == "cosine" else str(value)


if __name__ == "__main__":
    start(main, (InjectionScriptArguments, DataArguments), description=__doc__)
