"""Stage 3 after MMEmb-R1: RL in which the policy also learns when to think, by its first token.

GRPO of recipes/grpo_embed.py with adaptive control (arXiv 2604.06156): the policy opens a thought
or ends its turn at once, every group of rollouts holds both, and the reward is 0.1 format + 1.0
margin + 0.5 adaptive, the sign of what thinking gained less the length of the thought. Served with
think="auto", the model then needs no gate.

    accelerate launch recipes/adaptive_embed.py
    accelerate launch recipes/adaptive_embed.py --warm_start outputs/demo/grpo
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/adaptive_embed.py
    accelerate launch recipes/adaptive_embed.py --rewards margin adaptive --reward_weights 1 0.5

Without arguments it reads recipes/configs/demo_adaptive.yaml: the embedded emoji scenes, warm start
included if there is none yet, evaluation and report.html at the end.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass, field
from pathlib import Path

import eval_embed
from accelerate import PartialState
from grpo_embed import GrpoScriptArguments, ensure_warm_start
from transformers import set_seed

from rewards import REWARDS
from twn_rl.adaptive import ADAPTIVE_COLUMNS, AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from twn_rl.grpo import ROLLOUT_COLUMNS, freeze_scorer
from twn_rl.model import DualLoraModel
from twn_rl.monitor import CollapseThresholds, CollapseWatch, MetricsWriter
from twn_rl.reward_loading import load_rewards
from twn_rl.rollouts import RolloutScorer
from twn_rl.run import (
    DataArguments,
    checkpoint_to_resume,
    parse_arguments,
    save_run,
    set_up_logging,
)

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_adaptive.yaml"


@dataclass
class AdaptiveScriptArguments(GrpoScriptArguments):
    """What only this script needs: that of recipes/grpo_embed.py with other rewards."""

    rewards: list[str] = field(
        default_factory=lambda: ["format", "margin", "adaptive"],
        metadata={
            "help": f"Any of {', '.join(REWARDS)}, package.module:function or file.py:function."
        },
    )


def main(
    script: AdaptiveScriptArguments, data: DataArguments, training: AdaptiveGRPOConfig
) -> Path:
    """Warm-start if needed, train, save, evaluate; return the folder of the model."""
    set_up_logging()
    output = Path(training.output_dir or "outputs/adaptive")

    # Rewards first: a misspelt name must show before anything is trained.
    parameters = script.reward_parameters
    reward_funcs = load_rewards(
        script.rewards,
        REWARDS,
        json.loads(parameters) if isinstance(parameters, str) else parameters,
        available_columns=[*ADAPTIVE_COLUMNS, *ROLLOUT_COLUMNS],
    )

    # Model and adapters
    ensure_warm_start(script, data)
    set_seed(training.seed)
    model = DualLoraModel.from_pretrained(script.warm_start, is_trainable=True)
    freeze_scorer(model)

    # Data: every target of the RL records is embedded once.
    records = data.load("rl")
    scorer = RolloutScorer(
        model,
        records,
        training.bank_dir or output / "bank",
        num_negatives=training.num_negatives,
        batch_size=training.scorer_batch_size,
        processes=PartialState(),
    )

    # Trainer
    watch = CollapseWatch(CollapseThresholds(), stop_on_collapse=script.stop_on_collapse)
    trainer = AdaptiveGRPOTrainer(
        model,
        reward_funcs,
        training,
        records,
        scorer,
        callbacks=[watch, MetricsWriter(output / "metrics.jsonl")],
    )

    # Train
    save_run(output, script, data, training)
    trainer.train(
        resume_from_checkpoint=checkpoint_to_resume(output, training.resume_from_checkpoint)
    )

    # Save
    trainer.save_model(str(output))
    logger.info("Policy saved to %s", output)

    # Evaluate
    if script.evaluate:
        eval_embed.main(
            eval_embed.EvalScriptArguments(
                model=str(output),
                before=script.warm_start,
                output_dir=str(output / "evaluation"),
                num_thoughts=2,
            ),
            data,
        )
    return output


if __name__ == "__main__":
    main(
        *parse_arguments(
            (AdaptiveScriptArguments, DataArguments, AdaptiveGRPOConfig),
            default_config=DEFAULT_CONFIG,
            description=__doc__,
        )
    )
