"""How many records need a thought? Few teach to write, all pairs teach to read, then RL.

For every share of the training records that keep their thought, and every seed: the reasoning
adapter learns to write from these alone (`taught`), over as many epochs as the steps give; the
embedding adapter learns to read what it writes, on all pairs (`before_rl`); RL goes on from there,
and a refit reads what it made of the thoughts (`after_rl`), again and again if `--rounds` says so
(`after_rl_2`, ...): who reads better also rewards better. Steps are equal for every share.

    twn-rl few-thoughts
    twn-rl few-thoughts --shares 0.05 1 --seeds 0 --output_dir outputs/few_thoughts_quick

Without arguments it reads recipes/configs/demo_few_thoughts.yaml. Writes summary.json ({arm:
{metric key: {mean, std, values}}}, an arm is a share before or after RL), tables and a plot.
Finished runs are kept: the same command goes on where it was stopped.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from twn_rl.data.record_files import load_records, write_records
from twn_rl.demo.dataset import FEW_THOUGHTS_PREFIX, write_demo
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import (
    ExperimentArguments,
    Seed,
    evaluation,
    report_arms,
    run_experiment,
)
from twn_rl.launch.program import start
from twn_rl.launch.stage import Stage
from twn_rl.runtime.problems import Problems

DEFAULT_CONFIG = Path(__file__).parents[1] / "configs" / "demo_few_thoughts.yaml"
MODES = ("never", "always", "sampled", "gold")
TAUGHT, BEFORE, RL, AFTER = "taught", "before_rl", "rl", "after_rl"


@dataclass
class FewThoughtsArguments(ExperimentArguments):
    """Shares of records with a thought, and how each stage is trained.

    Attributes:
        output_dir: Where all runs go.
        read_steps: Steps in which the embedding adapter learns to read, before RL.
        rounds: How many times RL and the refit take turns; 0 for neither.
        sft_config: YAML of the warm start, whose two adapters are trained one after the other.
        grpo_config: YAML of RL.
        refit_config: YAML of what follows RL.
    """

    output_dir: str = "outputs/few_thoughts"
    shares: list[float] = field(
        default_factory=lambda: [0.02, 0.05, 0.2, 1.0],
        metadata={"help": "Shares of the training records that keep their thought."},
    )
    read_steps: int = 450
    rounds: int = 1
    sft_config: str = "recipes/configs/demo_sft.yaml"
    grpo_config: str = "recipes/configs/demo_grpo.yaml"
    refit_config: str = "recipes/configs/demo_refit.yaml"

    def __post_init__(self) -> None:
        """Refuse shares of nothing and of more than there is."""
        problems = Problems()
        problems.unless(
            self.shares and all(0 < share <= 1 for share in self.shares),
            f"shares = {self.shares}, expected numbers above 0 and at most 1",
        )
        problems.expect(self, ">= 1", "read_steps")
        problems.expect(self, ">= 0", "rounds")
        problems.refuse("FewThoughtsArguments")


def main(script: FewThoughtsArguments, data: DataArguments) -> Path:
    """Train and evaluate every share for every seed, then summarise."""
    data.require_demo()
    seeds = run_experiment(script, data, lambda seed: plan(script, seed))
    measured = (BEFORE, *(numbered(AFTER, turn) for turn in range(1, script.rounds + 1)))
    places = [(name(share), when) for share in script.shares for when in measured]
    return report_arms(script, seeds, {" ".join(place): "/".join(place) for place in places})


def name(share: float) -> str:
    """Return what a share is called.

    >>> name(0.05)
    '5_percent'
    """
    return f"{100 * share:g}_percent"


def plan(script: FewThoughtsArguments, seed: Seed) -> Iterator[Stage]:
    """Yield the stages of one seed: for every share writing, reading, RL, reading again."""
    pairs = pairs_of(seed)
    for share in script.shares:
        root, settings = seed.root / name(share), {"config": script.sft_config}
        few = with_thoughts(pairs, share)
        own = {"train_adapters": "reasoning", "output_dir": root / TAUGHT}
        yield Stage("sft_embed", root / TAUGHT, {**settings, **few.initial_settings, **own})
        reading = {"train_adapters": "embedding", "self_written_from": 0, "self_written_share": 1}
        reading |= {"think_without_cot": True, **pairs.settings}
        own = {"checkpoint": root / TAUGHT, "output_dir": root / BEFORE}
        steps = {"max_steps": script.read_steps}
        yield Stage("sft_embed", root / BEFORE, {**settings, **reading, **own, **steps})
        yield evaluation(root / BEFORE, pairs, MODES, num_thoughts=2)
        reader = root / BEFORE
        for turn in range(1, script.rounds + 1):
            policy, after = root / numbered(RL, turn), root / numbered(AFTER, turn)
            own = {"config": script.grpo_config, "warm_start": reader, "output_dir": policy}
            yield Stage("grpo_embed", policy, {**own, "evaluate": False, **pairs.settings})
            own = {"config": script.refit_config, "checkpoint": policy, "output_dir": after}
            yield Stage("sft_embed", after, {**reading, **own})
            yield evaluation(after, pairs, MODES, num_thoughts=2)
            reader = after


def numbered(name: str, turn: int) -> str:
    """Return the name of a stage's folder in some round; the first one has no number.

    >>> numbered("rl", 1), numbered("rl", 2)
    ('rl', 'rl_2')
    """
    return name if turn == 1 else f"{name}_{turn}"


def pairs_of(seed: Seed) -> Seed:
    """Return a seed whose training records are the demo's without their thoughts."""
    root = Path(seed.data.demo_dir)
    files = write_demo(root, seed.data.demo_settings())
    pairs = root / f"{FEW_THOUGHTS_PREFIX}pairs.jsonl"
    records = load_records(files["train"])
    write_records(pairs, (replace(record, query_cot=None) for record in records))
    given = {f"{split}_file": str(files[split]) for split in ("rl", "validation", "test")}
    given |= {"train_file": str(pairs), "ood_file": str(files["unseen_pairs"])}
    return replace(seed, data=replace(seed.data, **given, data_root=str(root)))


def with_thoughts(seed: Seed, share: float) -> Seed:
    """Return a seed whose training records are those of the demo that keep their thought."""
    root = Path(seed.data.demo_dir)
    records = load_records(write_demo(root, seed.data.demo_settings())["train"])
    kept = root / f"{FEW_THOUGHTS_PREFIX}{name(share)}.jsonl"
    write_records(kept, (records[row] for row in range(max(1, round(share * len(records))))))
    return replace(seed, data=replace(seed.data, train_file=str(kept)))


if __name__ == "__main__":
    start(
        main,
        (FewThoughtsArguments, DataArguments),
        default_config=DEFAULT_CONFIG,
        description=__doc__,
    )
