"""Does RL help, or would more SFT do the same? SFT-only against SFT + GRPO over several seeds.

Every seed trains one warm start; from it each arm trains on the same records (split rl), for the
same number of optimiser steps and samples: `sft_only` goes on with the token loss on the teacher's
CoTs, `grpo` (or `grpo:REWARD`, one arm per reward) samples its own and is rewarded by retrieval.
The embedding adapter is frozen in every arm.

    python recipes/experiments/ablate.py --seeds 0 1 2
    python recipes/experiments/ablate.py --arms sft_only grpo grpo:info_nce --output_dir outputs/b
    python recipes/experiments/ablate.py --teacher_swap_rate 0 --output_dir outputs/c
    python recipes/experiments/ablate.py --gate true
    python recipes/experiments/ablate.py --config recipes/configs/wordnet_smollm2.yaml

Writes summary.json ({arm: {metric key: {mean, std, values}}}), tables and a plot; with --gate every
model gets its own routing gate first and is measured with the gate deciding, too. Finished runs are
kept: the same command goes on where it was stopped, and what was measured on a model is measured
again if the model, the gate or the modes have changed. About 15 minutes a seed on two CPU cores;
--parallel 2 runs two seeds side by side.
"""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from twn_rl.evaluation.seed_tables import plot_summary, summarize_runs, tables
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.launch.stages import Stages, forget
from twn_rl.recipes.grpo_embed import GrpoScriptArguments
from twn_rl.runtime.whole_files import write_json, write_text
from twn_rl.training.grpo import EmbedGRPOConfig

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1]
WARM_START = "warm_start"
GATE_FOLDER = "gate"
EVALUATION_FOLDER = "evaluation"
GATE_MODES = ("auto", "random", "oracle")
EVALUATION_MODES = ("never", "always", "sampled", "gold", "shuffled", "foreign", "empty")


@dataclass
class AblateArguments:
    """Arms and seeds."""

    output_dir: str = field(default="outputs/ablation", metadata={"help": "Where all runs go."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; three or more."}
    )
    arms: list[str] = field(
        default_factory=lambda: ["sft_only", "grpo"],
        metadata={"help": "sft_only, grpo, or grpo:REWARD for another reward."},
    )
    sft_config: str = field(
        default=str(RECIPES / "configs" / "demo_sft.yaml"),
        metadata={"help": "YAML of the warm start."},
    )
    grpo_config: str = field(
        default=str(RECIPES / "configs" / "demo_grpo.yaml"), metadata={"help": "YAML of RL."}
    )
    gate: bool = field(
        default=False, metadata={"help": "Fit a routing gate on every model and measure with it."}
    )
    gate_config: str | None = field(
        default=None,
        metadata={"help": "YAML of the gate; default: that of recipes/gate_embed.py."},
    )
    modes: list[str] = field(
        default_factory=lambda: list(EVALUATION_MODES),
        metadata={"help": "Modes to measure, see recipes/eval_embed.py; a gate adds its own."},
    )
    parallel: int = field(default=1, metadata={"help": "Seeds trained side by side."})
    launcher: list[str] = field(
        default_factory=lambda: ["--num_processes", "1"],
        metadata={
            "help": "Arguments of accelerate launch, such as "
            "--config_file recipes/accelerate/zero2.yaml."
        },
    )


def main(script: AblateArguments, data: DataArguments) -> Path:
    """Train and evaluate every arm for every seed, then summarise."""
    set_up_logging()
    output = Path(script.output_dir)
    save_run(output, script, data)
    with ThreadPoolExecutor(max_workers=script.parallel) as pool:
        list(pool.map(lambda seed: run_seed(script, data, seed), script.seeds))
    arms = [WARM_START, *script.arms]
    runs = {
        arm: [output / f"seed{seed}" / folder(arm) / EVALUATION_FOLDER for seed in script.seeds]
        for arm in arms
    }
    summary = summarize_runs(runs)
    write_json(output / "summary.json", summary, indent=1)
    plot_summary(summary, output / "summary.png")
    text = tables(summary)
    write_text(output / "summary.md", text)
    logger.info("Mean and standard deviation over seeds %s:\n%s", script.seeds, text)
    return output


def run_seed(script: AblateArguments, data: DataArguments, seed: int) -> None:
    """Train the warm start of one seed and all arms from it."""
    root = Path(script.output_dir) / f"seed{seed}"
    shared = data.flags_of_seed(root, seed)
    seeded = [*shared, f"--seed={seed}"]
    stages, warm = Stages(RECIPES, script.launcher), root / WARM_START
    flags = [f"--config={script.sft_config}", f"--output_dir={warm}", *seeded]
    stages.run("sft_embed.py", flags, warm)
    measure(script, warm, shared, seed)
    budget = rl_budget(script.grpo_config)
    for arm in script.arms:
        target = root / folder(arm)
        if arm == "sft_only":
            recipe, flags = "sft_embed.py", [f"--config={script.sft_config}", *budget]
            flags += [f"--checkpoint={warm}", "--split=rl", "--train_adapters=reasoning"]
        else:
            recipe, flags = "grpo_embed.py", [f"--config={script.grpo_config}", "--evaluate=false"]
            flags += [f"--warm_start={warm}"]
            reward = arm.partition(":")[2]
            flags += ["--rewards", reward, "--reward_weights", "1.0"] if reward else []
        stages.run(recipe, [*flags, f"--output_dir={target}", *seeded], target)
        measure(script, target, shared, seed)


def rl_budget(grpo_config: str) -> list[str]:
    """Return flags that give SFT-only RL's optimiser steps, samples a step and learning rate."""
    types = (GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
    _, _, grpo = parse_arguments(types, arguments=["--config", grpo_config])
    names = (
        "max_steps",
        "per_device_train_batch_size",
        "gradient_accumulation_steps",
        "learning_rate",
        "warmup_steps",
    )
    flags = [f"--{name}={getattr(grpo, name)}" for name in names]
    return [*flags, f"--lr_scheduler_type={grpo.lr_scheduler_type.value}"]


def measure(script: AblateArguments, model: Path, shared: list[str], seed: int) -> None:
    """Fit the gate of one model if asked for, and evaluate it; do again what is out of date."""
    stages, evaluation = Stages(RECIPES, script.launcher), model / EVALUATION_FOLDER
    if script.gate:
        flags = gate_flags(script, model, shared, seed)
        if stages.run("gate_embed.py", flags, model / GATE_FOLDER, is_cheap=True):
            forget(evaluation)
    flags = evaluation_flags(script, model, shared)
    stages.run("eval_embed.py", flags, evaluation, is_cheap=True)


def gate_flags(script: AblateArguments, model: Path, shared: list[str], seed: int) -> list[str]:
    """Return the flags that fit a gate on one model with its own data and seed."""
    config = [] if script.gate_config is None else [f"--config={script.gate_config}"]
    return [*config, f"--model={model}", *shared, f"--seed={seed}"]


def evaluation_flags(script: AblateArguments, model: Path, shared: list[str]) -> list[str]:
    """Return the flags that evaluate one model into its folder."""
    modes = (*script.modes, *GATE_MODES) if script.gate else script.modes
    flags = [f"--model={model}", f"--output_dir={model / EVALUATION_FOLDER}", *shared]
    return [*flags, "--report=false", "--modes", *modes, "--num_thoughts=2"]


def folder(arm: str) -> str:
    """Return the folder name of an arm.

    >>> folder("grpo:info_nce")
    'grpo_info_nce'
    """
    return "".join(c if c.isalnum() else "_" for c in arm)


if __name__ == "__main__":
    main(*parse_arguments((AblateArguments, DataArguments), description=__doc__))
