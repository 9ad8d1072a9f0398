"""Measure a model: no-think, always-think, the better of both; do vectors read their thoughts?

    accelerate launch recipes/eval_embed.py --model outputs/demo/grpo --before outputs/demo/sft
    accelerate launch recipes/eval_embed.py --model outputs/demo/grpo --gate_threshold 0.3
    accelerate launch recipes/eval_embed.py --benchmark mmeb_v2 --data_root MMEB-V2 --model DIR

A model with a routing gate (recipes/gate_embed.py) is also measured with the gate deciding and with
chance deciding at the same rate; routing.json then says what the gate is worth. With --benchmark
the recipe of that benchmark runs instead, with flags of its own.

Writes metrics.json (flat: <split>/<group>/<mode>/<metric>, such as test/hop2/always/hit@1),
per_query.jsonl, targets.json and a self-contained report.html. Ties count against the model and
non-finite vectors are refused. About a minute a model on two CPU cores for the embedded default.
"""

from __future__ import annotations

import json
import logging
import runpy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from accelerate import PartialState
from transformers import set_seed

from twn_rl.config import TwnConfig
from twn_rl.evaluation.modes import ABLATIONS, THINKING_TARGETS
from twn_rl.evaluation.report import write_report
from twn_rl.evaluation.results import Evaluation, merge_evaluations, write_text
from twn_rl.evaluation.routing import describe_routing, routed_queries, routing_summary
from twn_rl.evaluation.runner import EvaluationSettings, evaluate
from twn_rl.model import DualLoraModel
from twn_rl.run import DataArguments, parse_arguments, save_run, set_up_logging

logger = logging.getLogger(__name__)

# Name after --benchmark -> recipe beside this one.
BENCHMARKS = {"mmeb_v2": "eval_mmeb_v2.py"}
REPORTED_SPLITS = ("test", "ood")
# The model before RL shares the frozen embedding adapter: only its own thoughts differ.
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
ROUTING_FILE = "routing.json"


@dataclass
class EvalScriptArguments:
    """What to measure and where to write it."""

    model: str = field(default="outputs/demo/grpo", metadata={"help": "Model to measure."})
    before: str | None = field(
        default=None, metadata={"help": "Model it was trained from; the report shows both."}
    )
    output_dir: str = field(
        default="outputs/demo/grpo/evaluation", metadata={"help": "Where metrics and report go."}
    )
    splits: list[str] = field(
        default_factory=lambda: list(REPORTED_SPLITS), metadata={"help": "Splits to measure."}
    )
    modes: list[str] | None = field(
        default=None,
        metadata={
            "help": "Modes of thinking and ablations of the CoT; default: all, auto and random if "
            "the model has a gate."
        },
    )
    gate_threshold: float | None = field(
        default=None,
        metadata={"help": "Probability above which mode auto thinks; default: the model's."},
    )
    batch_size: int = field(default=64, metadata={"help": "Queries or targets a forward."})
    num_thoughts: int = field(default=4, metadata={"help": "Sampled CoTs per query, mode sampled."})
    seed: int = field(default=0, metadata={"help": "Of sampling, borrowed CoTs and the bootstrap."})
    report: bool = field(default=True, metadata={"help": "Write report.html."})

    def __post_init__(self) -> None:
        """Refuse a threshold that nothing would look at."""
        is_used = self.modes is None or set(self.modes) & set(GATE_MODES)
        if self.gate_threshold is not None and not is_used:
            raise ValueError(
                f"gate_threshold = {self.gate_threshold} with modes = {self.modes}; expected one "
                f"of {GATE_MODES} among the modes; add it or drop the threshold"
            )


def main(script: EvalScriptArguments, data: DataArguments) -> Path:
    """Evaluate, write, and return the folder of the results."""
    set_up_logging()
    set_seed(script.seed)
    output = Path(script.output_dir)
    splits = {name: data.load(name) for name in script.splits if data.has(name)}  # pyright: ignore[reportArgumentType]
    if PartialState().is_main_process:
        save_run(output, script, data)
        after = measure(script, splits, script.model, script.modes)
        after.save(output)
        write_routing(output / ROUTING_FILE, after, seed=script.seed)
        before = None
        if script.before is not None:
            before = measure(script, splits, script.before, BEFORE_MODES)
            before.save(output / "before")
        if script.report:
            write_report(
                output / "report.html",
                after,
                before=before,
                curves=learning_curves(script),
            )
            logger.info("Report: %s", output / "report.html")
        log_summary(before, after)
    PartialState().wait_for_everyone()
    return output


def measure(
    script: EvalScriptArguments, splits: dict, path: str, modes: Sequence[str] | None
) -> Evaluation:
    """Evaluate one model on every split."""
    model = DualLoraModel.from_pretrained(path)
    if modes is None:
        modes = default_modes(script, model.config)
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
                seed=script.seed,
            ),
        )
        for name, records in splits.items()
    )


def default_modes(script: EvalScriptArguments, config: TwnConfig) -> tuple[str, ...]:
    """Return every mode the model has; a threshold asks for a gate, so that a missing one shows."""
    has_gate = config.gate_threshold is not None or script.gate_threshold is not None
    return (*PLAIN_MODES, *GATE_MODES) if has_gate else PLAIN_MODES


def write_routing(path: Path, evaluation: Evaluation, *, seed: int = 0) -> None:
    """Write and log, for each split, what the gate is worth; no file if none was measured."""
    path.unlink(missing_ok=True)  # of an earlier evaluation
    summaries = {}
    for split, queries in routed_queries(evaluation.queries).items():
        threshold = evaluation.metrics[f"{split}/all/auto/gate_threshold"]
        summary = {"threshold": threshold, **routing_summary(queries, seed=seed)}
        logger.info("%s", describe_routing(split, summary))
        summaries[split] = summary
    if summaries:
        write_text(path, json.dumps(summaries, indent=1, allow_nan=False) + "\n")


def learning_curves(script: EvalScriptArguments) -> dict[str, Path]:
    """Return the metrics files that training left beside the models."""
    named = {"SFT": script.before, "GRPO": script.model}
    files = {name: Path(path) / "metrics.jsonl" for name, path in named.items() if path}
    return {name: path for name, path in files.items() if path.exists()}


def log_summary(before: Evaluation | None, after: Evaluation) -> None:
    """Log hit@1 by group and mode of serving, before and after."""
    for key in sorted(after.metrics):
        parts = key.split("/")
        if parts[-1] == "hit@1" and parts[2] in ("never", "always", "auto"):
            old = before.metrics.get(key) if before else None
            was = "" if old is None else f" (before {100 * old:.1f})"
            logger.info("%-48s %5.1f%s", key, 100 * after.metrics[key], was)


def benchmark_recipe(arguments: Sequence[str]) -> Path | None:
    """Return the recipe that --benchmark asks for, None without one."""
    words = [word for argument in arguments for word in argument.split("=", 1)]
    if "--benchmark" not in words:
        return None
    name = "".join(words[words.index("--benchmark") + 1 :][:1])
    if name not in BENCHMARKS:
        raise ValueError(f"benchmark = {name!r}; expected one of {list(BENCHMARKS)}; correct it")
    return Path(__file__).with_name(BENCHMARKS[name])


if __name__ == "__main__" and (recipe := benchmark_recipe(sys.argv[1:])) is not None:
    runpy.run_path(str(recipe), run_name="__main__")
elif __name__ == "__main__":
    main(*parse_arguments((EvalScriptArguments, DataArguments), description=__doc__))
