"""Stage 2, GRPO with retrieval rewards: the policy writes CoTs, the frozen scorer rewards them.

TRL's GRPOTrainer (Shao et al., 2402.03300) on the reasoning adapter; the scorer is the embedding
adapter. Default reward: similarity of the think vector to its positive minus the mean of its K
hardest negatives in the whole target bank.

    accelerate launch recipes/grpo_embed.py
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/grpo_embed.py  # GPUs
    accelerate launch --config_file recipes/accelerate/zero3_cpu.yaml recipes/grpo_embed.py
    accelerate launch recipes/grpo_embed.py --rewards margin format --reward_weights 1 0.1
    accelerate launch recipes/grpo_embed.py --rewards mine.py:my_reward

Without arguments it reads recipes/configs/demo_grpo.yaml: the embedded emoji scenes, warm start
included if there is none yet, evaluation and report.html at the end; about ten minutes on two CPU
cores.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import set_seed

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.launch.program import start
from twn_rl.launch.progress import Stages
from twn_rl.launch.run_folder import owned_run, publish, set_up_logging, train_and_save
from twn_rl.launch.trackers import check_trackers
from twn_rl.launch.validation import validation_of
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.modeling.model import DualLoraModel
from twn_rl.recipes import eval_embed, sft_embed
from twn_rl.rewards import REWARDS
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.reading import decode_json
from twn_rl.training.grpo import (
    ROLLOUT_COLUMNS,
    EmbedGRPOConfig,
    EmbedGRPOTrainer,
    check_vllm,
    make_scorer,
)
from twn_rl.training.monitor import CollapseWatch, MetricsWriter
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.similarity_columns import SCORING_COLUMNS

logger = logging.getLogger(__name__)
DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_grpo.yaml"
REWARDS_HELP = f"Any of {', '.join(REWARDS)}, package.module:function or file.py:function."


@dataclass
class RewardedArguments:
    """Where a method that rewards sampled thoughts starts, and what it pays for."""

    # A file's weights and parameters are made for the rewards of that file.
    outdates: ClassVar[Mapping[str, Sequence[str]]] = {
        "rewards": ("reward_weights", "reward_parameters")
    }
    warm_start: str = field(
        default="outputs/sft",
        metadata={"help": "Warm-started model; trained first if it is not there."},
    )
    warm_start_config: str | None = field(
        default=None,
        metadata={
            "help": "YAML of recipes/sft_embed.py for that case; null: a missing model is an error."
        },
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Attention kernel; default: transformers' choice."}
    )
    rewards: list[str] = field(default_factory=lambda: ["margin"], metadata={"help": REWARDS_HELP})
    reward_parameters: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Reward name -> its keyword arguments (YAML, or JSON as a flag)."},
    )
    evaluate: bool = field(
        default=False, metadata={"help": "Evaluate before and after it and write report.html."}
    )

    def __post_init__(self) -> None:
        """Read parameters that came as a flag."""
        if isinstance(self.reward_parameters, str):
            try:
                self.reward_parameters = decode_json(self.reward_parameters)
            except ValueError as error:
                raise ValueError(
                    f"reward_parameters is no valid JSON ({error}); expected an object of rewards "
                    "and their parameters; correct it"
                ) from error


@dataclass
class GrpoScriptArguments(RewardedArguments):
    """What only this script needs."""

    stop_on_collapse: bool = field(
        default=False, metadata={"help": "End the run at the first warning of the collapse watch."}
    )


ARGUMENTS = (GrpoScriptArguments, DataArguments, EmbedGRPOConfig)


def main(
    script: GrpoScriptArguments,
    data: DataArguments,
    training: EmbedGRPOConfig,
    *,
    trainer_class: type[EmbedGRPOTrainer] = EmbedGRPOTrainer,
    columns: Sequence[str] = SCORING_COLUMNS,
) -> Path:
    """Warm-start if needed, train, save, evaluate; return the folder of the model.

    Args:
        script: What only this script needs.
        data: Records.
        training: Settings of `trainer_class`.
        trainer_class: Method of RL.
        columns: What its trainer scores rollouts by, for the rewards.
    """
    set_up_logging()
    output = Path(training.output_dir or "outputs/grpo")

    # First what may be missing: a misspelt name must show before anything is trained.
    available = [*columns, *ROLLOUT_COLUMNS]
    parameters: Any = script.reward_parameters
    rewards = load_rewards(script.rewards, REWARDS, parameters, available_columns=available)
    check_vllm(training)

    with owned_run(output, training):
        # Model and adapters
        is_missing = not (Path(script.warm_start) / CONFIG_FILE).is_file()
        stages = Stages(("warm start", is_missing), ("RL", True), ("evaluation", script.evaluate))
        if is_missing:
            stages.begin("warm start")
        ensure_warm_start(script, data, training)
        stages.begin("RL")
        set_seed(training.seed)
        model = DualLoraModel.from_pretrained(
            script.warm_start, is_trainable=True, attn_implementation=script.attn_implementation
        )

        # Data: every target of the RL records is embedded once.
        records = data.load("rl")
        scorer = make_scorer(model, records, training, output, is_shared=True)

        # Trainer
        watch = CollapseWatch(stop_on_collapse=script.stop_on_collapse)
        callbacks = [watch, MetricsWriter(output / "metrics.jsonl")]
        trainer = trainer_class(
            model,
            rewards,
            training,
            records,
            scorer,
            callbacks=callbacks,
            eval_dataset=validation_of(data, training),
        )

        # Train and save
        train_and_save(trainer, output, script, data, training)

        # Evaluate
        if script.evaluate:
            stages.begin("evaluation")
            evaluate(script, data, training, output)
        publish(trainer, output)
    return output


def evaluate(script: RewardedArguments, data: DataArguments, training: Any, output: Path) -> None:
    """Measure the model and the warm start it came from, and write the report."""
    evaluation = eval_embed.EvalScriptArguments(
        model=str(output), before=script.warm_start, num_thoughts=2
    )
    evaluation.report_to = check_trackers([*(training.report_to or [])])
    eval_embed.main(evaluation, data)


def ensure_warm_start(script: RewardedArguments, data: DataArguments, training: Any) -> None:
    """Run the warm start in this process group if its model is not there yet."""
    is_there = (Path(script.warm_start) / CONFIG_FILE).is_file()
    join_processes().wait_for_everyone()  # all have looked before one of them writes
    if is_there:
        return
    if script.warm_start_config is None:
        raise FileNotFoundError(
            f"warm_start = {script.warm_start!r} holds no {CONFIG_FILE}; expected a model of "
            "recipes/sft_embed.py; train it first, or pass --warm_start_config so that it is "
            "trained here"
        )
    logger.log(
        NOTICE, "No warm-started model in %s: running the warm start first", script.warm_start
    )
    config = ["--config", script.warm_start_config, "--output_dir", script.warm_start]
    if str(training.resume_from_checkpoint).lower() == "true":
        config += ["--resume_from_checkpoint", "true"]
    if training.deepspeed:
        config += ["--deepspeed", training.deepspeed]
    sft_script, model_args, _, sft_training = parse_arguments(sft_embed.ARGUMENTS, arguments=config)
    sft_embed.main(sft_script, model_args, data, sft_training)


if __name__ == "__main__":
    start(main, ARGUMENTS, default_config=DEFAULT_CONFIG, description=__doc__)
