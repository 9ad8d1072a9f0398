"""RL after MMEmb-R1, in which the policy also learns when to think, by its first token.

GRPO of recipes/grpo_embed.py with adaptive control (arXiv 2604.06156): the policy opens a thought
or ends its turn at once, every group of rollouts holds both, and the reward is 0.1 format + 1.0
margin + 0.5 adaptive, the sign of what thinking gained less the length of the thought. Served with
think="auto", the model then needs no gate.

    accelerate launch recipes/adaptive_embed.py
    accelerate launch recipes/adaptive_embed.py --warm_start outputs/demo/grpo
    accelerate launch --config_file recipes/accelerate/zero2.yaml recipes/adaptive_embed.py  # GPUs
    accelerate launch --config_file recipes/accelerate/zero3_cpu.yaml recipes/adaptive_embed.py
    accelerate launch recipes/adaptive_embed.py --rewards margin adaptive --reward_weights 1 0.5

Without arguments it reads recipes/configs/demo_adaptive.yaml: the embedded emoji scenes, warm start
included if there is none yet, evaluation and report.html at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.program import start
from twn_rl.recipes import grpo_embed
from twn_rl.training.adaptive import ADAPTIVE_COLUMNS, AdaptiveGRPOConfig, AdaptiveGRPOTrainer

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "demo_adaptive.yaml"


@dataclass
class AdaptiveScriptArguments(grpo_embed.GrpoScriptArguments):
    """What only this script needs: that of recipes/grpo_embed.py with other rewards."""

    rewards: list[str] = field(
        default_factory=lambda: ["format", "margin", "adaptive"],
        metadata={"help": grpo_embed.REWARDS_HELP},
    )


ARGUMENTS = (AdaptiveScriptArguments, DataArguments, AdaptiveGRPOConfig)


def main(
    script: AdaptiveScriptArguments, data: DataArguments, training: AdaptiveGRPOConfig
) -> Path:
    """Run recipes/grpo_embed.py with the trainer whose policy decides; return its folder."""
    training.output_dir = training.output_dir or "outputs/adaptive"
    return grpo_embed.main(
        script, data, training, trainer_class=AdaptiveGRPOTrainer, columns=ADAPTIVE_COLUMNS
    )


if __name__ == "__main__":
    start(main, ARGUMENTS, default_config=DEFAULT_CONFIG, description=__doc__)
