"""Is RL needed where no thought was ever written? Pairs alone of a new domain, over several seeds.

Every seed trains one warm start on the emoji scenes with right thoughts. Then comes a domain of
which only pairs of query and target exist (`twn_rl.demo.new_domains`), and each arm goes on from
the warm start with the same optimizer steps, the embedding adapter frozen: `more_sft` with the old
domain's thoughts, `expert_iteration` and `grpo` with as many thoughts sampled about the new
domain's pairs (by one process), and rewarded alike; `grpo:REWARD` or
`grpo:REWARD=WEIGHT,REWARD=WEIGHT` with other rewards. An arm whose name ends in `+old` spends
`--old_share` of its samples on the old domain's pairs, against forgetting; the teacher's thoughts
about them are not used.

    twn-rl new-domain
    twn-rl new-domain --domain grey --seeds 0 1 2 --output_dir outputs/new_domain_grey
    twn-rl new-domain --arms more_sft grpo grpo:rank_gap=1,format=0.5
    twn-rl new-domain --arms expert_iteration expert_iteration+old grpo grpo+old
    twn-rl new-domain --seeds 0 --look reworded inverse three_hops

Without arguments it reads recipes/configs/demo_new_domain.yaml. Writes summary.json ({arm: {metric
key: {mean, std, values}}}), tables and a plot; the split `test` is the old domain, `ood` the new
one. `--look` measures the warm start on the validation part of domains, to choose one. Finished
runs are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from twn_rl.demo.dataset import write_demo
from twn_rl.demo.new_domains import DOMAINS, DomainSizes, add_old_pairs, write_domain
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import (
    ExperimentArguments,
    Seed,
    evaluation,
    report_arms,
    run_experiment,
)
from twn_rl.launch.parsing import parse_arguments
from twn_rl.launch.program import start
from twn_rl.launch.stage import Stage
from twn_rl.recipes.experiments.ablate import (
    WARM_START,
    checked_rewards,
    folder,
    read_grpo,
    reward_settings,
    rl_budget,
)
from twn_rl.recipes.expert_iteration import ARGUMENTS as EXPERT_ARGUMENTS
from twn_rl.runtime.problems import Problems

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "demo_new_domain.yaml"
ARMS = ("more_sft", "expert_iteration", "grpo")
WITH_OLD = "+old"
# What an arm changes, and what is the same for all: the embedding adapter is frozen.
MODES = ("always", "sampled")
SHARED_MODES = ("never", "gold")


@dataclass
class NewDomainArguments(ExperimentArguments):
    """Domain, arms, and how each is trained.

    Attributes:
        output_dir: Where all runs go.
        look: Domains on whose validation part the warm start is measured.
        old_share: Share of the old domain's pairs in the arms that end in +old.
        sft_config: YAML of the warm start.
        grpo_config: YAML of RL, whose steps and samples every arm gets.
        expert_config: YAML of expert iteration.
    """

    output_dir: str = "outputs/new_domain"
    domain: str = field(default="reworded", metadata={"help": f"One of {', '.join(DOMAINS)}."})
    arms: list[str] = field(
        default_factory=lambda: list(ARMS),
        metadata={
            "help": f"Some of {', '.join(ARMS)}, grpo:REWARD, grpo:REWARD=WEIGHT,REWARD=WEIGHT, "
            "and those that sample +old."
        },
    )
    look: list[str] = field(default_factory=list)
    old_share: float = 0.25
    sft_config: str = "recipes/configs/demo_sft.yaml"
    grpo_config: str = "recipes/configs/demo_grpo.yaml"
    expert_config: str = "recipes/configs/demo_expert_iteration.yaml"

    def __post_init__(self) -> None:
        """Refuse domains and arms that do not exist."""
        problems = Problems()
        problems.one_of(self, tuple(DOMAINS), "domain")
        if self.look:
            problems.some_of(self, tuple(DOMAINS), "look")
        with_old = (f"{arm}{WITH_OLD}" for arm in ARMS[1:])
        named = checked_rewards(self.arms, self.grpo_config, problems, ending=WITH_OLD)
        problems.some_of(self, (*ARMS, *with_old, *named), "arms")
        problems.expect(self, "in (0, 1)", "old_share")
        problems.refuse("NewDomainArguments")


def main(script: NewDomainArguments, data: DataArguments) -> Path:
    """Train and evaluate every arm for every seed, then summarise."""
    data.require_demo()
    seeds = run_experiment(script, data, lambda seed: plan(script, seed))
    return report_arms(script, seeds, {arm: folder(arm) for arm in (WARM_START, *script.arms)})


def plan(script: NewDomainArguments, seed: Seed) -> Iterator[Stage]:
    """Yield the stages of one seed: the warm start, what it is looked at, then every arm."""
    warm = seed.root / WARM_START
    settings = {"config": script.sft_config, "output_dir": warm, **seed.initial_settings}
    yield Stage("sft_embed", warm, settings)
    for domain in script.look:
        looked = of_domain(seed, domain)
        place = warm / f"look_{domain}"
        own = {"splits": ["validation"], "num_thoughts": 8, "output_dir": place}
        measured = evaluation(warm, looked, (*SHARED_MODES, *MODES), **own)
        yield replace(measured, target=place)
    new = of_domain(seed, script.domain)
    yield evaluation(warm, new, (*SHARED_MODES, *MODES), num_thoughts=2)
    for arm in script.arms:
        target = seed.root / folder(arm)
        records = with_old(new, script.old_share) if arm.endswith(WITH_OLD) else new
        yield training_of(arm.removesuffix(WITH_OLD), script, warm, target, records)
        yield evaluation(target, new, MODES, num_thoughts=2)


def of_domain(seed: Seed, domain: str) -> Seed:
    """Return a seed whose files are the old domain (train, test) and a new one (the others)."""
    root, settings = Path(seed.data.demo_dir), seed.data.demo_settings()
    old = write_demo(root, settings)
    scale = seed.data.demo_scale
    sizes = {name: max(8, round(size * scale)) for name, size in vars(DomainSizes()).items()}
    new = write_domain(root, domain, settings, DomainSizes(**sizes))
    files = {
        "train_file": old["rl"],
        "test_file": old["test"],
        "rl_file": new["train"],
        "validation_file": new["validation"],
        "ood_file": new["test"],
        "data_root": root,
    }
    paths = {name: str(path) for name, path in files.items()}
    return replace(seed, data=replace(seed.data, **paths))


def with_old(new: Seed, share: float) -> Seed:
    """Return a seed whose pairs to train on are the new domain's and some of the old one's."""
    data = new.data
    mixed = add_old_pairs(Path(str(data.rl_file)), Path(str(data.train_file)), share)
    return replace(new, data=replace(data, rl_file=str(mixed)))


def training_of(arm: str, script: NewDomainArguments, warm: Path, target: Path, new: Seed) -> Stage:
    """Return the stage that trains one arm."""
    common = {"output_dir": target, **new.settings}
    if arm == "more_sft":
        own = {"checkpoint": warm, "split": "train", "train_adapters": "reasoning"}
        own |= rl_budget(script.grpo_config)
        return Stage("sft_embed", target, {"config": script.sft_config, **own, **common})
    own = {"evaluate": False, "warm_start": warm}
    if arm == "expert_iteration":
        own |= expert_budget(script)
        return Stage("expert_iteration", target, {"config": script.expert_config, **own, **common})
    if rewards := arm.partition(":")[2]:
        own |= reward_settings(rewards, script.grpo_config)
    return Stage("grpo_embed", target, {"config": script.grpo_config, **own, **common})


def expert_budget(script: NewDomainArguments) -> dict[str, Any]:
    """Return settings that give expert iteration RL's steps, batch, samples and rewards.

    Raises:
        ValueError: If RL's samples are not whole groups a round.
    """
    rl, grpo = read_grpo(script.grpo_config)
    _, _, expert = parse_arguments(EXPERT_ARGUMENTS, arguments=["--config", script.expert_config])
    steps, batch = grpo.max_steps, grpo.per_device_train_batch_size
    samples = steps * batch * grpo.gradient_accumulation_steps
    prompts, rest = divmod(samples, grpo.num_generations * expert.num_rounds)
    if rest:
        raise ValueError(
            f"{samples} samples of RL for {expert.num_rounds} rounds of groups of "
            f"{grpo.num_generations}; expected a whole number of groups; change num_rounds"
        )
    return {
        **rl_budget(script.grpo_config),
        "num_generations": grpo.num_generations,
        "prompts_per_round": prompts,
        "sampling_temperature": grpo.temperature,
        "rewards": rl.rewards,
        "reward_weights": grpo.reward_weights,
        "reward_parameters": json.dumps(rl.reward_parameters) if rl.reward_parameters else None,
        "num_negatives": grpo.num_negatives,
    }


if __name__ == "__main__":
    start(
        main,
        (NewDomainArguments, DataArguments),
        default_config=DEFAULT_CONFIG,
        description=__doc__,
    )
