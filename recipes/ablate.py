"""Does RL help, or would more SFT do the same? SFT-only against SFT + GRPO over several seeds.

Every seed trains one warm start; from it each arm trains on the same records (split rl), for the
same number of optimiser steps and samples: `sft_only` goes on with the token loss on the teacher's
CoTs, `grpo` (or `grpo:REWARD`, one arm per reward) samples its own and is rewarded by retrieval.
The embedding adapter is frozen in every arm.

    python recipes/ablate.py --seeds 0 1 2
    python recipes/ablate.py --arms sft_only grpo grpo:info_nce --output_dir outputs/rewards
    python recipes/ablate.py --teacher_swap_rate 0 --output_dir outputs/ablation_random_noise

Writes summary.json ({arm: {metric key: {mean, std, values}}}), a table and a plot. Finished runs
are kept: the same command goes on where it was stopped. About 15 minutes a seed on two CPU cores;
--parallel 2 runs two seeds side by side.
"""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

from grpo_embed import GrpoScriptArguments

from twn_rl.evaluation.ablation import plot_summary, summarize_runs, table
from twn_rl.grpo import EmbedGRPOConfig
from twn_rl.run import DataArguments, parse_arguments, save_run, set_up_logging

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parent
WARM_START = "warm_start"
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
        arm: [output / f"seed{seed}" / folder(arm) / "evaluation" for seed in script.seeds]
        for arm in arms
    }
    summary = summarize_runs(runs)
    (output / "summary.json").write_text(json.dumps(summary, indent=1), encoding="utf-8")
    plot_summary(summary, output / "summary.png")
    text = table(summary)
    (output / "summary.md").write_text(text, encoding="utf-8")
    logger.info("Mean and standard deviation over seeds %s:\n%s", script.seeds, text)
    return output


def run_seed(script: AblateArguments, data: DataArguments, seed: int) -> None:
    """Train the warm start of one seed and all arms from it."""
    root = Path(script.output_dir) / f"seed{seed}"
    own = {**asdict(data), "demo_dir": str(root / "data"), "demo_seed": seed}
    shared = [f"--{name}={value}" for name, value in own.items() if value is not None]
    seeded = [*shared, f"--seed={seed}"]
    warm = root / WARM_START
    launch(
        script,
        "sft_embed.py",
        [f"--config={script.sft_config}", f"--output_dir={warm}", *seeded],
        warm,
    )
    evaluate(script, warm, shared)
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
        launch(script, recipe, [*flags, f"--output_dir={target}", *seeded], target)
        evaluate(script, target, shared)


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


def launch(script: AblateArguments, recipe: str, flags: list[str], target: Path) -> None:
    """Run one recipe to its end with its own log file; a finished run is kept."""
    done = target / "finished.json"
    if done.exists():
        logger.info("Kept %s", target)
        return
    target.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "accelerate.commands.launch", *script.launcher]
    command += [str(RECIPES / recipe), *flags]
    logger.info("Running %s, log in %s", target, target / "log.txt")
    started = time.perf_counter()
    with (target / "log.txt").open("w", encoding="utf-8") as log:
        status = subprocess.run(
            command, stdout=log, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status != 0:
        tail = (target / "log.txt").read_text(encoding="utf-8", errors="replace")[-2000:]
        raise RuntimeError(
            f"{recipe} for {target} ended with status {status}; expected 0; "
            f"see {target / 'log.txt'}:\n{tail}"
        )
    seconds = time.perf_counter() - started
    done.write_text(json.dumps({"command": command, "seconds": seconds}), encoding="utf-8")


def evaluate(script: AblateArguments, model: Path, shared: list[str]) -> None:
    """Evaluate one model into its folder ``evaluation``."""
    target = model / "evaluation"
    flags = [f"--model={model}", f"--output_dir={target}", *shared, "--report=false"]
    flags += ["--modes", *EVALUATION_MODES, "--num_thoughts=2"]
    launch(script, "eval_embed.py", flags, target)


def folder(arm: str) -> str:
    """Return the folder name of an arm.

    >>> folder("grpo:info_nce")
    'grpo_info_nce'
    """
    return "".join(c if c.isalnum() else "_" for c in arm)


if __name__ == "__main__":
    main(*parse_arguments((AblateArguments, DataArguments), description=__doc__))
