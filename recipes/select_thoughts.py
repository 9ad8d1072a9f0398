r"""Which thoughts are worth teaching? Candidates for every record, judged, the best one kept.

Pair-aware selection by counterfactual intervention (MMEmb-R1, 2604.06156): how well query and
target match with a candidate CoT, minus how well they match without it, hard negatives as control.

    accelerate launch recipes/select_thoughts.py --model outputs/demo/sft --demo_teachers 4
    accelerate launch recipes/select_thoughts.py --model DIR --train_file train.jsonl \
        --own_temperatures 0 0.7 1 --candidate_files cots.jsonl \
        --endpoint_url http://localhost:8000/v1 --endpoint_model Qwen3-VL-32B
    accelerate launch recipes/sft_embed.py --train_file outputs/selection/selected.jsonl \
        --data_root DATA_ROOT

Writes selected.jsonl (records whose `query_cot` is the selected one, or null: they train the direct
path only), candidates.jsonl (every candidate with its scores and fate), report.json and report.md.
Candidates and scores are kept shard by shard: the same command goes on where it was stopped, and
another rule or threshold takes seconds. On records whose metadata has a `gold_cot` the report says
how many wrong CoTs were rejected. About four minutes on one CPU core for the embedded default.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import set_seed

from twn_rl.data.chat import Renderer
from twn_rl.data.mixture import Mixture
from twn_rl.data.record_files import RecordSet, write_records
from twn_rl.demo.dataset import noisy_teachers
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.whole_files import write_text
from twn_rl.training.thought_selection.candidates import (
    ListedCots,
    Writer,
    read_candidate_file,
    unique_ids,
)
from twn_rl.training.thought_selection.choosing import (
    Choice,
    SelectionRule,
    choose,
    report_text,
    selection_report,
    taught_records,
)
from twn_rl.training.thought_selection.endpoint import FAILURES, EndpointSettings, EndpointWriter
from twn_rl.training.thought_selection.evaluators import EVALUATORS, build_evaluator
from twn_rl.training.thought_selection.judging import judge, unjudged
from twn_rl.training.thought_selection.shards import RecordShards, SelectionError
from twn_rl.training.thought_selection.writing import AdapterWriter

logger = logging.getLogger(__name__)


@dataclass
class SelectScriptArguments:
    """Candidates, evaluator and rule."""

    output_dir: str = field(default="outputs/selection", metadata={"help": "Where all goes."})
    model: str | None = field(
        default=None,
        metadata={"help": "Trained model that judges and, if asked, writes; none: random, all."},
    )
    split: str = field(default="train", metadata={"help": "Records: train, rl or validation."})
    use_record_cots: bool = field(
        default=False, metadata={"help": "The records' own query_cot is a candidate, too."}
    )
    own_temperatures: list[float] = field(
        default_factory=list,
        metadata={"help": "Temperatures at which the model writes candidates; 0 is greedy."},
    )
    num_thoughts: int = field(
        default=1, metadata={"help": "Candidates for each temperature above 0."}
    )
    checkpoints: list[str] = field(
        default_factory=list, metadata={"help": "Further models that write at own_temperatures."}
    )
    candidate_files: list[str] = field(
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
    batch_size: int = field(default=64, metadata={"help": "Candidates a forward."})
    rebuild: bool = field(default=False, metadata={"help": "Drop candidates and scores first."})
    seed: int = field(default=0, metadata={"help": "Of every draw."})

    def __post_init__(self) -> None:
        """Collect what would only show after the candidates are there."""
        rule, problems = self.selection_rule(), []
        if self.evaluator not in EVALUATORS:
            problems.append(f"evaluator = {self.evaluator!r}, expected one of {EVALUATORS}")
        if self.model is None and (rule.is_judged or self.own_temperatures):
            problems.append("model = None, expected a model that judges or writes")
        if self.checkpoints and not self.own_temperatures:
            problems.append("checkpoints without own_temperatures, expected both")
        counts = ("num_thoughts", "batch_size", "num_negatives")
        problems += [
            f"{n} = {getattr(self, n)}, expected >= 1" for n in counts if getattr(self, n) < 1
        ]
        if self.demo_teachers < 0 or min(self.own_temperatures, default=0.0) < 0:
            problems.append("demo_teachers or own_temperatures below 0, expected >= 0")
        if problems:
            raise ValueError("SelectScriptArguments: " + "; ".join(problems) + "; change these")

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
    """Write candidates, judge them, choose; return the file of selected records."""
    set_up_logging()
    set_seed(script.seed)
    output, processes = Path(script.output_dir), join_processes()

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

    # Candidates
    counts: Counter[str] = Counter()
    sources = [
        RecordShards(
            output / "candidates" / writer.name, ids, writer.plan, shard_size=writer.shard_size
        ).fill(
            lambda positions, writer=writer: [
                {"candidates": [candidate.to_dict() for candidate in candidates]}
                for candidates in writer.write([records[n] for n in positions])
            ],
            is_redone=has_failed if script.retry_failed else None,
            rebuild=script.rebuild,
            processes=processes,
        )
        for writer in writers(script, endpoint, data, model, ids, records, counts)
    ]

    # Worth
    rows = unjudged(sources)
    if script.selection_rule().is_judged:
        assert model is not None
        if script.rebuild and processes.is_main_process:
            shutil.rmtree(output / "bank", ignore_errors=True)
        processes.wait_for_everyone()
        evaluator = build_evaluator(
            script.evaluator,
            model,
            records,
            output / "bank",
            num_negatives=script.num_negatives,
            batch_size=script.batch_size,
            seed=script.seed,
            processes=processes,
        )
        scores = judge(
            rows,
            evaluator,
            model,
            output / "scores" / script.evaluator,
            batch_size=script.batch_size,
            rebuild=script.rebuild,
            processes=processes,
        )
        rows = list(scores.rows())

    # Choice
    rule = script.selection_rule()
    choices = [choose(row["id"], row["candidates"], rule) for row in rows]
    if processes.is_main_process:
        save(output, records, rows, choices, dict(counts))
        logger.info(
            "Train on it with: recipes/sft_embed.py --train_file %s --data_root %s",
            output / "selected.jsonl",
            records.data_root,
        )
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
    """Yield the sources asked for, one at a time: only one further checkpoint is in memory."""
    renderer = model.renderer if model is not None else Renderer()
    if script.use_record_cots:
        own = {r.id: [("record", r.query_cot)] for r in records if r.query_cot is not None}
        yield ListedCots("record", own, renderer)
    if script.demo_teachers:
        yield ListedCots("demo_teachers", demo_cots(script, data), renderer)
    for number, path in enumerate(script.candidate_files):
        cots, skipped = read_candidate_file(path, ids, on_bad_row=data.on_bad_record)
        counts.update(skipped)
        yield ListedCots(f"file{number}_{Path(path).stem}", cots, renderer)
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
        writer = EndpointWriter(endpoint, renderer)
        yield writer
        counts["endpoint_retries"] += writer.num_retries


def demo_cots(
    script: SelectScriptArguments, data: DataArguments
) -> dict[str, list[tuple[str, str]]]:
    """Return the noisy teachers' CoTs by record."""
    if not data.is_demo():
        raise SelectionError(
            f"demo_teachers = {script.demo_teachers} with record files of your own; expected the "
            "embedded emoji scenes; use --candidate_files"
        )
    cots = noisy_teachers(script.split, data.demo_settings(), script.demo_teachers)
    return {
        key: [(f"teacher{n}", cot) for n, cot in enumerate(texts)] for key, texts in cots.items()
    }


def has_failed(row: dict[str, Any]) -> bool:
    """Tell whether an endpoint gave no answer for a record."""
    return any(candidate["problem"] in FAILURES for candidate in row["candidates"])


def save(
    output: Path,
    records: RecordSet,
    rows: list[dict[str, Any]],
    choices: list[Choice],
    counts: dict[str, int],
) -> None:
    """Write selected.jsonl, candidates.jsonl, report.json and report.md."""
    write_records(
        output / "selected.jsonl",
        (
            taught
            for record, row, choice in zip(records, rows, choices, strict=True)
            for taught in taught_records(record, row["candidates"], choice)
        ),
        data_root=records.data_root,
    )
    lines = []
    for row, choice in zip(rows, choices, strict=True):
        fated = [
            {**candidate, "fate": fate}
            for candidate, fate in zip(row["candidates"], choice.fates, strict=True)
        ]
        lines.append(json.dumps({"id": row["id"], "candidates": fated}, ensure_ascii=False) + "\n")
    write_text(output / "candidates.jsonl", "".join(lines))
    report = {**selection_report(records, rows, choices), "left_out": counts}
    write_text(output / "report.json", json.dumps(report, indent=1) + "\n")
    write_text(output / "report.md", report_text(report))
    logger.info("Selected:\n%s", report_text(report))


if __name__ == "__main__":
    main(
        *parse_arguments(
            (SelectScriptArguments, EndpointSettings, DataArguments), description=__doc__
        )
    )
