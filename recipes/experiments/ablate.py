"""Does RL help, or would more SFT do the same? SFT-only against SFT + GRPO over several seeds.

Every seed trains one warm start; from it each arm trains on the same records (split rl), for the
same number of optimiser steps and samples: `sft_only` goes on with the token loss on the teacher's
CoTs, `grpo` (or `grpo:REWARD`, one arm per reward, `grpo:REWARD=WEIGHT,REWARD=WEIGHT` for several)
samples its own and is rewarded by retrieval.
The embedding adapter is frozen in every arm. With `--refit_config` each of these models is then
followed by its refit: the embedding adapter learns to read the thoughts that the model writes now.

    twn-rl ablate --seeds 0 1 2
    twn-rl ablate --arms sft_only grpo grpo:info_nce --output_dir outputs/rewards
    twn-rl ablate --teacher_swap_rate 0 --output_dir outputs/ablation_random_noise
    twn-rl ablate --gate true
    twn-rl ablate --gate true --arms grpo --seeds 0 1 2 --perturbations 0 1 2
    twn-rl ablate --refit_config recipes/configs/demo_refit.yaml
    twn-rl ablate --config recipes/configs/wordnet_smollm2.yaml

Writes summary.json ({arm: {metric key: {mean, std, values}}}), tables and a plot; with --gate every
model gets its own routing gate first and is measured with the gate deciding, too. Finished runs are
kept: the same command goes on where it was stopped, and what was measured on a model is measured
again if the model, the gate or the modes have changed. About 15 minutes a seed on two CPU cores;
--parallel 2 runs two seeds side by side.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import (
    ExperimentArguments,
    Seed,
    decider,
    evaluation,
    report_arms,
    run_experiment,
)
from twn_rl.launch.parsing import parse_arguments
from twn_rl.launch.program import start
from twn_rl.launch.stage import Stage
from twn_rl.recipes.grpo_embed import ARGUMENTS as GRPO_ARGUMENTS
from twn_rl.recipes.grpo_embed import GrpoScriptArguments
from twn_rl.rewards import REWARDS
from twn_rl.runtime.problems import Problems
from twn_rl.training.grpo import EmbedGRPOConfig
from twn_rl.training.reward_loading import load_rewards

logger = logging.getLogger(__name__)

WARM_START = "warm_start"
REFIT = "{} refit"
GRPO_WITH = "grpo:"  # begins an arm that names its rewards
MODES = ("never", "always", "sampled", "gold", "shuffled", "foreign", "empty")
GATE_MODES = ("auto", "random", "oracle")


@dataclass
class AblateArguments(ExperimentArguments):
    """Arms, and how each is trained and measured.

    Attributes:
        output_dir: Where all runs go.
        arms: sft_only, grpo, or grpo:REWARD for another reward; several with their weights are
            grpo:margin=1,length=0.2. Parameters of rewards are those of `grpo_config`.
        sft_config: YAML of the warm start.
        grpo_config: YAML of RL.
        refit_config: YAML of what follows every arm and the warm start: the embedding adapter
            learns to read the thoughts that the model writes then; null is off.
        gate: Fit a routing gate on every model and measure with it.
        gate_config: YAML of the gate; default: that of recipes/gate_embed.py.
        modes: Modes to measure, see recipes/eval_embed.py; a gate adds its own.
    """

    output_dir: str = "outputs/ablation"
    arms: list[str] = field(default_factory=lambda: ["sft_only", "grpo"])
    sft_config: str = "recipes/configs/demo_sft.yaml"
    grpo_config: str = "recipes/configs/demo_grpo.yaml"
    refit_config: str | None = None
    gate: bool = False
    gate_config: str | None = None
    modes: list[str] = field(default_factory=lambda: list(MODES))

    def __post_init__(self) -> None:
        """Refuse arms that do not exist."""
        problems = Problems()
        known = ("sft_only", "grpo", *checked_rewards(self.arms, self.grpo_config, problems))
        problems.some_of(self, known, "arms")
        problems.refuse("AblateArguments")


def main(script: AblateArguments, data: DataArguments) -> Path:
    """Train and evaluate every arm for every seed, then summarise."""
    seeds = run_experiment(script, data, lambda seed: plan(script, seed))
    arms = [WARM_START, *script.arms]
    arms += [REFIT.format(arm) for arm in arms if script.refit_config]
    return report_arms(script, seeds, {arm: folder(arm) for arm in arms})


def plan(script: AblateArguments, seed: Seed) -> Iterator[Stage]:
    """Yield the stages of one seed: the warm start, then every arm from it, each measured."""
    warm = seed.root / WARM_START
    settings = {"config": script.sft_config, "output_dir": warm, **seed.initial_settings}
    yield Stage("sft_embed", warm, settings)
    yield from measured(script, warm, seed)
    budget = rl_budget(script.grpo_config)
    for arm in script.arms:
        target, rewards = seed.root / folder(arm), arm.partition(":")[2]
        common = {"output_dir": target, **seed.settings}
        if arm == "sft_only":
            own = {"checkpoint": warm, "split": "rl", "train_adapters": "reasoning"}
            settings = {"config": script.sft_config, **budget, **own, **common}
            yield Stage("sft_embed", target, settings)
        else:
            own = {"evaluate": False, "warm_start": warm}
            if rewards:
                own |= reward_settings(rewards, script.grpo_config)
            yield Stage("grpo_embed", target, {"config": script.grpo_config, **own, **common})
        yield from measured(script, target, seed)


def measured(script: AblateArguments, model: Path, seed: Seed) -> Iterator[Stage]:
    """Yield what measures one model and, if asked for, its refit."""
    yield from with_gate(script, model, seed)
    if script.refit_config:
        target = model.with_name(folder(REFIT.format(model.name)))
        own = {"config": script.refit_config, "checkpoint": model, "output_dir": target}
        yield Stage("sft_embed", target, {**own, **seed.settings})
        yield from with_gate(script, target, seed)


def with_gate(script: AblateArguments, model: Path, seed: Seed) -> Iterator[Stage]:
    """Yield what fits the gate of one model, if asked for, and what evaluates it."""
    modes = list(script.modes)
    if script.gate:
        yield decider("gate_embed", model, "gate", seed, config=script.gate_config)
        modes += GATE_MODES
    yield evaluation(model, seed, modes, num_thoughts=2)


def checked_rewards(
    arms: Sequence[str], grpo_config: str, problems: Problems, *, ending: str = ""
) -> list[str]:
    """Return the arms that name rewards; add a problem for each whose rewards do not exist.

    Args:
        arms: All arms.
        grpo_config: YAML of RL.
        problems: What is added to.
        ending: What an arm may end in that is no part of its rewards.
    """
    rewarded = [arm for arm in arms if arm.startswith(GRPO_WITH)]
    for arm in rewarded:
        rewards = arm.removeprefix(GRPO_WITH).removesuffix(ending)
        with problems.told(ValueError):
            load_rewards(reward_settings(rewards, grpo_config)["rewards"], REWARDS)
    return rewarded


def reward_settings(rewards: str, grpo_config: str) -> dict[str, Any]:
    """Return the settings of an arm's rewards.

    >>> reward_settings("margin=1,format=0.5", "recipes/configs/demo_grpo.yaml")
    {'rewards': ['margin', 'format'], 'reward_weights': [1.0, 0.5]}

    Raises:
        ValueError: If a weight is no number.
    """
    names: list[str] = []  # one named twice is refused where rewards are loaded
    weights: list[float] = []
    for part in rewards.split(","):
        name, _, weight = part.partition("=")
        names.append(name)
        try:
            weights.append(float(weight or 1.0))
        except ValueError as error:
            raise ValueError(
                f"arm grpo:{rewards} has the weight {weight!r}; expected a number, as in "
                "grpo:margin=1,length=0.2"
            ) from error
    settings: dict[str, Any] = {"rewards": names, "reward_weights": weights}
    # Rewards that are named on the command line drop the parameters of the file with its rewards.
    parameters: Any = read_grpo(grpo_config)[0].reward_parameters or {}
    if own := {name: value for name, value in parameters.items() if name in names}:
        settings["reward_parameters"] = json.dumps(own)
    return settings


def read_grpo(grpo_config: str) -> tuple[GrpoScriptArguments, EmbedGRPOConfig]:
    """Return the settings of RL that a file holds."""
    script, _, grpo = parse_arguments(GRPO_ARGUMENTS, arguments=["--config", grpo_config])
    return script, grpo


def rl_budget(grpo_config: str) -> dict[str, Any]:
    """Return settings that give SFT-only RL's optimiser steps, samples a step, learning rate."""
    grpo: Any = read_grpo(grpo_config)[1]  # after parsing its scheduler is an enum
    names = (
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
    )
    budget = {name: getattr(grpo, name) for name in names}
    return {**budget, "lr_scheduler_type": grpo.lr_scheduler_type.value}


def folder(arm: str) -> str:
    """Return the folder name of an arm.

    >>> folder("grpo:info_nce")
    'grpo_info_nce'
    """
    return "".join(c if c.isalnum() else "_" for c in arm)


if __name__ == "__main__":
    start(main, (AblateArguments, DataArguments), description=__doc__)
