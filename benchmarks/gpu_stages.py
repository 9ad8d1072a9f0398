"""The stages that the GPU battery runs: their ready configurations, their trainers, timed steps."""

from __future__ import annotations

from typing import Any

from gpu_sizes import Bench, StepClock

from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import gate_embed, grpo_embed, sft_embed
from twn_rl.rewards import REWARDS
from twn_rl.training.grpo import ROLLOUT_COLUMNS, EmbedGRPOConfig, EmbedGRPOTrainer, make_scorer
from twn_rl.training.reward_loading import load_rewards
from twn_rl.training.similarity_columns import SCORING_COLUMNS

STAGES = {
    "sft": sft_embed.ARGUMENTS,
    "grpo": grpo_embed.ARGUMENTS,
    "gate": (gate_embed.GateScriptArguments, ThresholdRule, DataArguments),
}


def configured(bench: Bench, stage: str, *, of: str = "qwen3_vl_2b", **flags: Any) -> Any:
    """Return a stage's arguments from its ready configuration, with other values for some fields.

    Args:
        bench: Gives device, folder and sizes.
        stage: sft, grpo or gate.
        of: Whose configuration.
        **flags: Values of fields; those the stage does not have are an error.
    """
    if stage != "gate":
        flags = {
            "output_dir": bench.folder / stage,
            "save_strategy": "no",
            "logging_steps": 1,
            "disable_tqdm": True,
            "use_cpu": not bench.is_gpu,
            "dataloader_pin_memory": bench.is_gpu,
            **({} if bench.is_gpu else {"bf16": False}),
            **flags,
        }
    if of == "demo" and bench.sizes.demo_batch:
        flags["per_device_train_batch_size"] = bench.sizes.demo_batch
    if stage == "sft" and of != "demo":
        # Every step has all its losses, and none waits for thoughts that the model writes.
        whole = {"contrastive_from": 0.0, "self_written_from": 1.0}
        flags = {**whole, **bench.sizes.flags, **flags}
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    file = f"recipes/configs/{of}_{stage}.yaml"
    return parse_arguments(STAGES[stage], arguments=["--config", file, *words])


def train(bench: Bench, trainer: Any, clock: StepClock, prefix: str = "", **options: Any) -> float:
    """Train, tell what a step took, and return its seconds."""
    trainer.add_callback(clock)
    bench.forget_peak()
    clock.last = bench.now()
    trainer.train(**options)
    seconds, waits = clock.timed()
    last = [row for row in trainer.state.log_history if "loss" in row][-1]
    bench.tell(
        **{
            f"{prefix}seconds_a_step": seconds,
            f"{prefix}waiting_seconds_a_step": waits,
            f"{prefix}timed_steps": len(clock.steps) - clock.warm_up,
            f"{prefix}last_loss": last["loss"],
            f"{prefix}last_grad_norm": last["grad_norm"],
        },
        **bench.peak(f"{prefix}peak"),
    )
    return seconds


def grpo_trainer(
    bench: Bench, script: Any, training: EmbedGRPOConfig, records: Any, model: Any
) -> EmbedGRPOTrainer:
    """Return GRPO's trainer with the rewards of its configuration."""
    columns = [*SCORING_COLUMNS, *ROLLOUT_COLUMNS]
    rewards = load_rewards(script.rewards, REWARDS, available_columns=columns)
    scorer = make_scorer(model, records, training, bench.folder / "grpo")
    return EmbedGRPOTrainer(model, rewards, training, records, scorer)
