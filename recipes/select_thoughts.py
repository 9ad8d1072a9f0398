r"""Which thoughts are worth teaching? Drafts for every record, judged, the best one kept.

Pair-aware selection by counterfactual intervention (MMEmb-R1, 2604.06156): how well query and
target match with a drafted CoT, minus how well they match without it, hard negatives as control.

    accelerate launch recipes/select_thoughts.py --model outputs/demo/sft --demo_teachers 4
    accelerate launch recipes/select_thoughts.py --model DIR --train_file train.jsonl \
        --own_temperatures 0 0.7 1 --draft_files cots.jsonl \
        --endpoint_url http://localhost:8000/v1 --endpoint_model Qwen3-VL-32B
    accelerate launch recipes/sft_embed.py --train_file outputs/selection/selected.jsonl \
        --data_root DATA_ROOT

Writes selected.jsonl (records whose `query_cot` is the selected one, or null: they train the direct
path only), drafts.jsonl (every draft with its scores and fate), report.json and report.md.
Drafts and scores are kept shard by shard: the same command goes on where it was stopped, and
another rule or threshold takes seconds. On records whose metadata has a `gold_cot` the report says
how many wrong CoTs were rejected. About four minutes on one CPU core for the embedded default.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from twn_rl.data.chat import Renderer
from twn_rl.data.markup import KNOWN_MARKUP
from twn_rl.data.mixture import Mixture
from twn_rl.data.record_files import RecordSet, write_records
from twn_rl.demo.dataset import noisy_teachers
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.whole_files import write_json, write_json_lines, write_text
from twn_rl.training.thought_selection.choosing import (
    Choice,
    SelectionRule,
    choose,
    report_text,
    selection_report,
    taught_records,
)
from twn_rl.training.thought_selection.drafts import (
    SelectionError,
    Writer,
    collect_drafts,
    merge_drafts,
    unique_ids,
)
from twn_rl.training.thought_selection.endpoint import FAILURES, EndpointSettings, EndpointWriter
from twn_rl.training.thought_selection.worth import EVALUATORS, build_evaluator, judge
from twn_rl.training.thought_selection.writers import (
    AdapterWriter,
    ListedDrafts,
    read_draft_file,
)

logger = logging.getLogger(__name__)


@dataclass
class SelectScriptArguments:
    """Drafts, evaluator and rule."""

    output_dir: str = field(default="outputs/selection", metadata={"help": "Where all goes."})
    model: str | None = field(
        default=None,
        metadata={"help": "Trained model that judges and, if asked, writes; none: random, all."},
    )
    split: str = field(default="train", metadata={"help": "Records: train, rl or validation."})
    use_record_cots: bool = field(
        default=False, metadata={"help": "The records' own query_cot is a draft, too."}
    )
    own_temperatures: list[float] = field(
        default_factory=list,
        metadata={"help": "Temperatures at which the model writes drafts; 0 is greedy."},
    )
    num_thoughts: int = field(default=1, metadata={"help": "Drafts for each temperature above 0."})
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Further models that write at own_temperatures."}
    )
    draft_files: list[str] = field(
        default_factory=list, metadata={"help": "JSON lines {id, cot[, source]} from elsewhere."}
    )
    demo_teachers: int = field(
        default=0,
        metadata={"help": "Independent noisy teachers of the emoji scenes; 0 is off."},
    )
    retry_failed: bool = field(
        default=False, metadata={"help": "Ask the endpoint again where it gave no answer."}
    )
    evaluator: str = field(default="margin", metadata={"help": f"{' or '.join(EVALUATORS)}."})
    num_negatives: int = field(default=1, metadata={"help": "K hard negatives as control."})
    rule: str = field(default="best", metadata={"help": "best, sample, random or all."})
    threshold: float = field(
        default=-0.05,
        metadata={
            "help": "Smallest worth of a CoT. 0 keeps what helps; a little below also keeps what "
            "changes nothing, so that easy inputs are taught a CoT, too."
        },
    )
    min_match: float | None = field(
        default=None,
        metadata={"help": "Smallest match with the CoT, such as 0: the positive wins; null: off."},
    )
    sampling_temperature: float = field(default=0.05, metadata={"help": "Of rule sample."})
    copies: int = field(
        default=1, metadata={"help": "Times each record is written, with a choice of its own."}
    )
    batch_size: int = field(default=64, metadata={"help": "Drafts a forward."})
    rebuild: bool = field(default=False, metadata={"help": "Drop drafts and scores first."})
    seed: int = field(default=0, metadata={"help": "Of every draw."})

    def __post_init__(self) -> None:
        """Collect what would only show after the drafts are there."""
        problems = Problems()
        problems.unless(
            self.evaluator in EVALUATORS,
            f"evaluator = {self.evaluator!r}, expected one of {EVALUATORS}",
        )
        needs_model = self.selection_rule().is_judged or self.own_temperatures
        problems.unless(
            self.model or not needs_model, "model = None, expected a model that judges or writes"
        )
        problems.unless(
            self.own_temperatures or not self.checkpoints,
            "checkpoints without own_temperatures, expected both",
        )
        problems.expect(self, ">= 1", "num_thoughts", "batch_size", "num_negatives")
        problems.expect(self, ">= 0", "demo_teachers")
        coldest = min(self.own_temperatures, default=0.0)
        problems.unless(coldest >= 0, f"own_temperatures has {coldest}, expected >= 0")
        problems.refuse("SelectScriptArguments", "change these")

    def selection_rule(self) -> SelectionRule:
        """Return the rule."""
        return SelectionRule(
            rule=self.rule,
            threshold=self.threshold,
            min_match=self.min_match,
            temperature=self.sampling_temperature,
            copies=self.copies,
            seed=self.seed,
        )


def main(script: SelectScriptArguments, endpoint: EndpointSettings, data: DataArguments) -> Path:
    """Collect drafts, judge them, choose; return the file of selected records."""
    set_up_logging()
    set_seed(script.seed)
    output, processes = Path(script.output_dir), join_processes()
    refuse_candidates(output)

    # Data first: bad records must show before a model is loaded.
    records = data.load(script.split)  # pyright: ignore[reportArgumentType]
    if isinstance(records, Mixture):
        raise SelectionError("records are a mixture; expected one file; select for each source")
    ids = unique_ids(records)
    save_run(output, script, endpoint, data)

    # Model: every process has the whole of it.
    model = None
    if script.model is not None:
        model = DualLoraModel.from_pretrained(script.model).to(processes.device)

    # Drafts
    counts: Counter[str] = Counter()
    shared: dict[str, Any] = {"rebuild": script.rebuild, "processes": processes}
    collected = [
        collect_drafts(
            *(writer, records, ids, output / "drafts"),
            is_redone=has_failed if script.retry_failed else None,
            **shared,
        )
        for writer in writers(script, endpoint, data, model, ids, records, counts)
    ]
    rows = merge_drafts(collected)

    # Worth
    if script.selection_rule().is_judged:
        assert model is not None
        if script.rebuild and processes.is_main_process:
            shutil.rmtree(output / "bank", ignore_errors=True)
        processes.wait_for_everyone()
        evaluator = build_evaluator(
            *(script.evaluator, model, records, output / "bank"),
            num_negatives=script.num_negatives,
            batch_size=script.batch_size,
            seed=script.seed,
            processes=processes,
        )
        folder = output / "scores" / script.evaluator
        rows = list(judge(rows, evaluator, model, folder, batch_size=script.batch_size, **shared))

    # Choice
    choices = [choose(row["id"], row["drafts"], script.selection_rule()) for row in rows]
    if processes.is_main_process:
        save(output, records, rows, choices, dict(counts))
    processes.wait_for_everyone()
    return output / "selected.jsonl"


def writers(
    script: SelectScriptArguments,
    endpoint: EndpointSettings,
    data: DataArguments,
    model: DualLoraModel | None,
    ids: Sequence[str],
    records: RecordSet,
    counts: Counter[str],
) -> Iterator[Writer]:
    """Yield the writers asked for, one at a time: only one further checkpoint is in memory."""
    renderer = model.renderer if model is not None else Renderer()
    markup = KNOWN_MARKUP if model is None else model.backbone.markup(renderer)
    if script.use_record_cots:
        own = {r.id: [("record", r.query_cot)] for r in records if r.query_cot is not None}
        yield ListedDrafts("record", own, renderer, markup)
    if script.demo_teachers:
        yield ListedDrafts("demo_teachers", demo_cots(script, data), renderer, markup)
    for number, path in enumerate(script.draft_files):
        cots, skipped = read_draft_file(path, ids, on_bad_row=data.on_bad_record)
        counts.update(skipped)
        yield ListedDrafts(f"file{number}_{Path(path).stem}", cots, renderer, markup)
    settings: dict[str, Any] = {
        "temperatures": script.own_temperatures,
        "num_thoughts": script.num_thoughts,
        "batch_size": script.batch_size,
        "seed": script.seed,
    }
    if script.own_temperatures and model is not None:
        yield AdapterWriter(model, "own", **settings)
    for number, path in enumerate(script.checkpoints):
        other = DualLoraModel.from_pretrained(path).to(join_processes().device)
        yield AdapterWriter(other, f"checkpoint{number}", **settings)
    if endpoint.endpoint_url is not None:
        writer = EndpointWriter(endpoint, renderer, markup)
        yield writer
        counts["endpoint_retries"] += writer.num_retries


def refuse_candidates(output: Path) -> None:
    """Refuse a folder from when drafts were called candidates, and say how it is converted."""
    old, new = output / "candidates", output / "drafts"
    if old.is_dir():
        raise SelectionError(
            f"{old} is of an earlier version; expected {new}; remove it, or keep what it holds: "
            f'mv {old} {new} && sed -i \'s/"candidates": /"drafts": /\' '
            f"{new}/*/*.jsonl && rm -r {output / 'scores'}"
        )


def demo_cots(
    script: SelectScriptArguments, data: DataArguments
) -> dict[str, list[tuple[str, str]]]:
    """Return the noisy teachers' CoTs by record."""
    if not data.is_demo():
        raise SelectionError(
            f"demo_teachers = {script.demo_teachers} with record files of your own; expected the "
            "embedded emoji scenes; use --draft_files"
        )
    cots = noisy_teachers(script.split, data.demo_settings(), script.demo_teachers)
    return {
        key: [(f"teacher{n}", cot) for n, cot in enumerate(texts)] for key, texts in cots.items()
    }


def has_failed(row: dict[str, Any]) -> bool:
    """Tell whether an endpoint gave no answer for a record."""
    return any(draft["problem"] in FAILURES for draft in row["drafts"])


def save(
    output: Path,
    records: RecordSet,
    rows: list[dict[str, Any]],
    choices: list[Choice],
    counts: dict[str, int],
) -> None:
    """Write selected.jsonl, drafts.jsonl, report.json and report.md."""
    taught = (
        copy
        for record, row, choice in zip(records, rows, choices, strict=True)
        for copy in taught_records(record, row["drafts"], choice)
    )
    write_records(output / "selected.jsonl", taught, data_root=records.data_root)
    fated = (
        [{**draft, "fate": fate} for draft, fate in zip(row["drafts"], choice.fates, strict=True)]
        for row, choice in zip(rows, choices, strict=True)
    )
    lines = ({"id": row["id"], "drafts": drafts} for row, drafts in zip(rows, fated, strict=True))
    write_json_lines(output / "drafts.jsonl", lines)
    report = {**selection_report(records, rows, choices), "left_out": counts}
    write_json(output / "report.json", report, indent=1)
    write_text(output / "report.md", report_text(report))
    logger.log(NOTICE, "Selected:\n%s", report_text(report))
    logger.log(
        NOTICE,
        "Train on it with: recipes/sft_embed.py --train_file %s --data_root %s",
        output / "selected.jsonl",
        records.data_root,
    )


if __name__ == "__main__":
    start(main, (SelectScriptArguments, EndpointSettings, DataArguments), description=__doc__)
