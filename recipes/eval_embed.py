"""Measure a model: no-think, always-think, the better of both; do vectors read their thoughts?

    accelerate launch recipes/eval_embed.py --model outputs/demo/refit --before outputs/demo/sft
    accelerate launch recipes/eval_embed.py --model outputs/demo/refit --gate_threshold 0.3
    accelerate launch recipes/eval_embed.py --model MODEL --benchmark mmeb_v2 --data_root MMEB-V2
    accelerate launch recipes/eval_embed.py --model MODEL --benchmark mrmr --data_root DIR
    accelerate launch recipes/eval_embed.py --model MODEL --benchmark "ViDoRe(v2)" --think auto

A model with a routing gate (recipes/gate_embed.py) is also measured with the gate deciding and with
chance deciding at the same rate. One whose policy decides (recipes/adaptive_embed.py) is also
measured with its own decisions, mode policy. routing.json then says what the decisions are worth.

With a benchmark nothing else is measured. mmeb_v2 is a recipe with flags of its own
(recipes/eval_mmeb_v2.py --help). For any of mteb's by name, mrmr, or EmojiScenes, the embedded
default as a task of mteb (extra "mteb"), benchmark.json and benchmark.md in a folder of its name
hold each task's score with think rate, think tokens and seconds per query; finished tasks are
kept. With HF_DATASETS_OFFLINE=1 data sets are read from the cache only.

Writes metrics.json (flat: <split>/<group>/<mode>/<metric>, such as test/hop2/always/hit@1),
per_query.jsonl, targets.json and a self-contained report.html. Ties count against the model and
non-finite vectors are refused. Several processes share the inputs, those of benchmarks too. About a
minute a model on two CPU cores for the embedded default.
"""

from __future__ import annotations

import argparse
import json
import logging
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from transformers import set_seed

from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.modes import ABLATIONS, MODES, THINKING_TARGETS
from twn_rl.evaluation.report.headline import summary_lines
from twn_rl.evaluation.results import METRICS_FILE, REPORTED_SPLITS, Evaluation, merge_evaluations
from twn_rl.evaluation.routing import (
    DECIDERS,
    describe_routing,
    routed_queries,
    routing_summary,
)
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import ThinkMode
from twn_rl.launch.arguments import DataArguments, Split
from twn_rl.launch.program import start
from twn_rl.launch.report_facts import report_facts
from twn_rl.launch.run_folder import owned_run, save_run, set_up_logging
from twn_rl.launch.trackers import check_trackers, track_metrics
from twn_rl.modeling.checkpoint import check_model
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig
from twn_rl.modeling.gate import QUERY_SIDE
from twn_rl.modeling.lineage import lineage
from twn_rl.modeling.model import DualLoraModel
from twn_rl.modeling.model_card import write_card
from twn_rl.recipes import eval_mmeb_v2
from twn_rl.runtime.extras import extra
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

# Of the model that this one came from: how far training has come.
BEFORE_MODES = ("never", "always")
PLAIN_MODES = (
    "never",
    "always",
    "oracle",
    "sampled",
    "averaged",
    *THINKING_TARGETS,
    *ABLATIONS,
)
GATE_MODES = ("auto", "random")
JUDGE_MODE = "auto_better"
LATENT_MODES = ("never", "latent")  # a latent model need not have learned to write
POLICY_MODE = "policy"
ROUTING_FILE = "routing.json"


@dataclass
class EvalScriptArguments:
    """What to measure and where to write it.

    Attributes:
        model: Model to measure.
        before: Model it was trained from; the report shows both.
        output_dir: Where metrics and report go; default: MODEL/evaluation.
        splits: Splits to measure.
        modes: Modes of thinking and ablations of the CoT; default: all, auto and random if the
            model has a gate, policy if its policy decides.
        gate_threshold: Probability above which mode auto thinks; default: the model's.
        policy_threshold: Probability above which mode policy thinks; default: the model's.
        batch_size: Queries or targets a forward.
        num_thoughts: Sampled CoTs per query, mode sampled.
        seed: Of sampling, borrowed CoTs and the bootstrap.
        report: Write report.html.
        report_to: Trackers that get the metrics: none, tensorboard, trackio, wandb, ...
        benchmark: Run this benchmark: a name of mteb's, mrmr, mmeb_v2, EmojiScenes.
        tasks: Tasks of the benchmark; default: all.
        think: Who thinks in a benchmark; default: auto with a gate, else never.
        think_documents: The same for the documents of a benchmark.
        max_think_tokens: Longest thought in a benchmark; default: the model's.
    """

    model: str = "outputs/demo/refit"
    before: str | None = None
    output_dir: str | None = None
    splits: list[str] = field(default_factory=lambda: list(REPORTED_SPLITS))
    modes: list[str] | None = None
    gate_threshold: float | None = None
    policy_threshold: float | None = None
    batch_size: int = 64
    num_thoughts: int = 4
    seed: int = 0
    report: bool = True
    report_to: list[str] = field(default_factory=lambda: ["none"])
    benchmark: str | None = None
    tasks: list[str] | None = None
    think: ThinkMode | None = None
    think_documents: ThinkMode = "never"
    max_think_tokens: int | None = None

    def __post_init__(self) -> None:
        """Refuse misspelt modes and splits, and a threshold that nothing would look at."""
        problems = Problems()
        problems.some_of(self, get_args(Split), "splits")
        if self.modes is not None:
            problems.some_of(self, (*MODES, *ABLATIONS), "modes")
        with problems.told(ValueError):
            check_trackers(self.report_to)
        problems.refuse("EvalScriptArguments", "correct the names")
        users = {"gate_threshold": (*GATE_MODES, JUDGE_MODE), "policy_threshold": (POLICY_MODE,)}
        for name, modes in users.items():
            threshold = getattr(self, name)
            if threshold is None or self.modes is None or set(self.modes) & set(modes):
                continue
            raise ValueError(
                f"{name} = {threshold} with modes = {self.modes}; expected one of {modes} among "
                "the modes; add it or drop the threshold"
            )

    @property
    def output(self) -> Path:
        """Where results go."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        folder = Path(self.model)
        if not folder.is_dir() and not folder.parent.is_dir():
            # A folder "owner/name" would be taken for the model the next time.
            folder = Path("outputs") / folder.name
        return folder / "evaluation"


def main(script: EvalScriptArguments, data: DataArguments) -> Path:
    """Evaluate, write, and return the folder of the results."""
    set_up_logging()
    set_seed(script.seed)
    if script.benchmark is not None:
        return measure_benchmark(script, data)
    with owned_run(script.output):
        check_models(script)
        splits = {name: data.load(name) for name in script.splits if data.has(name)}  # pyright: ignore[reportArgumentType]
        measure_splits(script, data, splits)
        join_processes().wait_for_everyone()
    return script.output


def check_models(script: EvalScriptArguments) -> None:
    """Refuse what is no model before records are read, or the demo's written."""
    for path in (script.model, script.before):
        if path is not None:
            check_model(path)


def measure_splits(
    script: EvalScriptArguments, data: DataArguments, splits: dict[str, Any]
) -> None:
    """Measure records by split on all processes; the main process writes and logs the results."""
    output, is_main = script.output, join_processes().is_main_process
    save_run(output, script, data)
    after = measure(script, splits, script.model, script.modes)
    if is_main:
        after.save(output)
        write_routing(output / ROUTING_FILE, after, seed=script.seed)
    before = None
    if script.before is not None:
        before = measure(script, splits, script.before, BEFORE_MODES)
        if is_main:
            before.save(output / "before")
    if is_main:
        publish(script, data, after, before, {name: len(own) for name, own in splits.items()})


def publish(
    script: EvalScriptArguments,
    data: DataArguments,
    after: Evaluation,
    before: Evaluation | None,
    counts: dict[str, int],
) -> None:
    """Write the report of what was measured, the model's card and trackers, and log the results."""
    output = script.output
    if script.report:
        with extra("eval"):
            from twn_rl.evaluation.report.page import write_report

        facts, settings = report_facts(output, script.model, data, queries=counts)
        write_report(
            output / "report.html",
            after,
            before=before,
            curves=learning_curves(script),
            facts=facts,
            settings=settings,
        )
    if output.parent == Path(script.model) and (output.parent / CONFIG_FILE).is_file():
        write_card(script.model)
    track_metrics(script.report_to, output, after.metrics)
    for line in summary_lines(after, before):
        logger.log(NOTICE, "%s", line)
    logger.log(NOTICE, "Metrics: %s", output / METRICS_FILE)
    if script.report:
        logger.log(NOTICE, "Report: %s", output / "report.html")


def measure(
    script: EvalScriptArguments, splits: dict, path: str, modes: Sequence[str] | None
) -> Evaluation:
    """Evaluate one model on every split, all processes together."""
    model = DualLoraModel.from_pretrained(path).to(join_processes().device)
    if modes is None:
        modes = default_modes(script, model.config, has_judge=model.judge(QUERY_SIDE) is not None)
    return merge_evaluations(
        evaluate(
            model,
            records,
            EvaluationSettings(
                split=name,
                modes=tuple(modes),
                batch_size=script.batch_size,
                num_thoughts=script.num_thoughts,
                gate_threshold=script.gate_threshold,
                policy_threshold=script.policy_threshold,
                seed=script.seed,
            ),
            processes=join_processes(),
        )
        for name, records in splits.items()
    )


def measure_benchmark(script: EvalScriptArguments, data: DataArguments) -> Path:
    """Run a benchmark on all processes; return the folder of its results."""
    assert script.benchmark is not None
    with extra("mteb"):
        from twn_rl.evaluation.mteb.benchmark import BenchmarkSettings, run_benchmark
        from twn_rl.evaluation.mteb.summary import flat_metrics, format_table
        from twn_rl.evaluation.mteb.tasks import EMOJI_SCENES

    output = script.output / re.sub(r"[^\w.-]+", "_", script.benchmark).strip("_")
    is_demo = script.benchmark == EMOJI_SCENES and data.is_demo()
    names = [name for name in script.splits if is_demo and data.has(name)]  # pyright: ignore[reportArgumentType]
    with owned_run(output):
        check_models(script)
        splits = {name: data.load(name) for name in names}  # pyright: ignore[reportArgumentType]
        save_run(output, script, data)
        settings = BenchmarkSettings(
            benchmark=script.benchmark,
            output_dir=output,
            tasks=script.tasks,
            think=script.think,
            think_documents=script.think_documents,
            gate_threshold=script.gate_threshold,
            max_think_tokens=script.max_think_tokens,
            batch_size=script.batch_size,
            data_root=data.data_root,
        )
        embedder = ThinkingEmbedder.from_pretrained(script.model, device=join_processes().device)
        summary = run_benchmark(embedder, settings, name=Path(script.model).name, splits=splits)
        if join_processes().is_main_process:
            track_metrics(script.report_to, output, flat_metrics(summary))
    logger.log(NOTICE, "%s:\n%s", output, format_table(summary))
    return output


def default_modes(
    script: EvalScriptArguments, config: TwnConfig, *, has_judge: bool = False
) -> tuple[str, ...]:
    """Return every mode the model has; a threshold asks for a gate, so that a missing one shows.

    A model with reason tokens and without gate has learned latent thoughts only.
    """
    has_gate = config.gate_threshold is not None or script.gate_threshold is not None
    has_policy = config.thinking_decision == "policy" or script.policy_threshold is not None
    if config.num_reason_tokens and not (has_gate or has_policy):
        return LATENT_MODES
    return (
        *PLAIN_MODES,
        *(("latent",) if config.num_reason_tokens else ()),
        *(GATE_MODES if has_gate else ()),
        *((JUDGE_MODE,) if has_gate and has_judge else ()),
        *((POLICY_MODE,) if has_policy else ()),
    )


def write_routing(path: Path, evaluation: Evaluation, *, seed: int = 0) -> None:
    """Write and log, by mode and split, what decisions are worth; no file if none was measured."""
    path.unlink(missing_ok=True)  # of an earlier evaluation
    summaries: dict[str, dict[str, Any]] = {}
    for mode, decider in DECIDERS.items():
        for split, queries in routed_queries(evaluation.queries, mode).items():
            threshold = evaluation.metrics[f"{split}/all/{mode}/{decider.threshold}"]
            summary = {"threshold": threshold, **routing_summary(queries, seed=seed)}
            logger.info("%s", describe_routing(split, summary, mode))
            summaries.setdefault(mode, {})[split] = summary
    if summaries:
        write_text(path, json.dumps(summaries, indent=1, allow_nan=False) + "\n")


def learning_curves(script: EvalScriptArguments) -> dict[str, Path]:
    """Return the metrics files that the stages of the model left, the first stage first."""
    stages = lineage(script.model)
    known = {folder.resolve() for folder in stages.values()}
    if script.before is not None and Path(script.before).resolve() not in known:
        others = {f"before: {name}": folder for name, folder in lineage(script.before).items()}
        stages = {**others, **stages}
    files = {name: folder / "metrics.jsonl" for name, folder in stages.items()}
    return {name: path for name, path in files.items() if path.exists()}


def named_benchmark(arguments: Sequence[str] | None = None) -> str | None:
    """Return the benchmark that the flags name: it decides which other flags there are."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--benchmark")
    return parser.parse_known_args(arguments)[0].benchmark


if __name__ == "__main__" and named_benchmark() == eval_mmeb_v2.BENCHMARK:
    sys.exit(eval_mmeb_v2.run())
elif __name__ == "__main__":
    start(main, (EvalScriptArguments, DataArguments), description=__doc__)
