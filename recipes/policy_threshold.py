"""How sure must a policy be before it thinks? Chosen on the validation split, like a gate's.

A policy that decides by its first token (recipes/adaptive_embed.py, recipes/sft_embed.py on records
some of which have no CoT) thinks where the probability of opening a thought is above
`policy_threshold`, 0.5 after training. Every validation query is embedded without and with its
thought, and the threshold is the cheapest whose quality is within half a point of the best.

    accelerate launch recipes/policy_threshold.py --model outputs/demo/adaptive
    accelerate launch recipes/policy_threshold.py --model DIR --validation_file validation.jsonl
    accelerate launch recipes/policy_threshold.py --model DIR --think_rate 0.3

The threshold goes into twn_config.json of the model; MODEL/policy/ gets curve.csv, curve.png and
metrics.json. More RL sets it back to 0.5. About a minute on one CPU core for the embedded default.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from transformers import set_seed

from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.gate_threshold import ChosenThreshold, ThresholdRule, choose_threshold
from twn_rl.evaluation.results import query_values
from twn_rl.evaluation.routing import RoutedQuery, routed_queries, routing_curve
from twn_rl.evaluation.threshold_files import log_choice, write_thresholds
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.launch.run_folder import owned_run, save_run, set_up_logging
from twn_rl.modeling.checkpoint import check_model
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import join_processes

logger = logging.getLogger(__name__)
MODE = FOLDER = "policy"


@dataclass
class PolicyScriptArguments:
    """What only this script needs."""

    model: str = field(
        default="outputs/demo/adaptive",
        metadata={"help": "Model whose policy decides; it gets the threshold."},
    )
    validation_split: str = field(
        default="validation", metadata={"help": "Records to choose the threshold on."}
    )
    batch_size: int = field(default=32, metadata={"help": "Queries a forward."})
    seed: int = field(default=0, metadata={"help": "Of the libraries; nothing is drawn."})


def main(script: PolicyScriptArguments, rule: ThresholdRule, data: DataArguments) -> Path:
    """Measure both ways of embedding each query, choose, save; return the folder of the model."""
    set_up_logging()
    set_seed(script.seed)
    path = Path(script.model)
    with owned_run(path):
        check_model(path)
        records = data.load(script.validation_split)  # pyright: ignore[reportArgumentType]
        model = DualLoraModel.from_pretrained(path).to(join_processes().device)
        save_run(path / FOLDER, script, rule, data)
        settings = EvaluationSettings(
            split=script.validation_split,
            modes=("never", "always", MODE),
            batch_size=script.batch_size,
            seed=script.seed,
        )
        rows = evaluate(model, records, settings, processes=join_processes()).queries
        if join_processes().is_main_process:
            found = choose(routed_queries(rows, MODE)[script.validation_split], rule)
            write_thresholds(path / FOLDER, {MODE: found}, rule.metric)
            log_choice(MODE, found, rule.metric)
            assert found.chosen.threshold is not None
            model.config.policy_threshold = found.chosen.threshold
            model.config.save(path)
            logger.log(NOTICE, "policy_threshold = %.3f saved to %s", found.chosen.threshold, path)
        join_processes().wait_for_everyone()
    return path


def choose(queries: Sequence[RoutedQuery], rule: ThresholdRule) -> ChosenThreshold:
    """Return the point of the rule among all thresholds on these queries."""
    before, after = (
        np.array([query_values(row)[rule.metric] for row in rows])
        for rows in ([q.never for q in queries], [q.always for q in queries])
    )
    return choose_threshold(
        rule,
        routing_curve(queries, metric=rule.metric),
        probability=np.array([query.probability for query in queries]),
        is_worth_it=after > before,
        rows=[query.never for query in queries],
    )


if __name__ == "__main__":
    start(main, (PolicyScriptArguments, ThresholdRule, DataArguments), description=__doc__)
