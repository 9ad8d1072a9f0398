"""When and how should an embedder think? Every method from one warm start, in one table.

    twn-rl compare-methods --seeds 0 1 2 --parallel 2

| method | trained by | served with |
| --- | --- | --- |
| never | sft_embed | think="never" |
| always | sft_embed, grpo_embed | think="always" |
| gate (TWN) | sft_embed, grpo_embed, gate_embed | think="auto", the gate decides |
| policy (MMEmb-R1) | sft_embed, adaptive_embed | think="auto", its first token decides |
| latent (LaME) | latent_embed | think="latent" |
| direct | latent_embed --direct_only true | think="never"; latent without its reason tokens |

All methods see the same records of a seed; both kinds of RL start from the same warm start. The
thresholds of gate and policy are chosen on the validation split by the same rule. Writes
comparison.json ({method: {column: {mean, std, values}}}), comparison.md and comparison.png: hit@1
by hops and split, think rate and tokens, milliseconds a query, trained parameters and
training time. Milliseconds are measured last, all methods of a seed in turn in one process, with
nothing else running. Finished stages are kept: the same command goes on where it was stopped. About
25 minutes a seed on one CPU core.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from tqdm import tqdm

from twn_rl.evaluation.results import METRICS_FILE
from twn_rl.evaluation.seed_tables import (
    method_table,
    plot_methods,
    save_summary,
    served_metrics,
    summarize,
)
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import Think
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.experiment import (
    EVALUATION_FOLDER,
    ExperimentArguments,
    Seed,
    decider,
    evaluation,
    run_experiment,
    told_runs,
)
from twn_rl.launch.program import start
from twn_rl.launch.stage import Stage, seconds_of
from twn_rl.runtime.log_levels import NOTICE

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Method:
    """How one method is served and what it needs.

    Attributes:
        model: Folder of its model.
        stages: Folders of all stages it needs, whose training times add up.
        mode: Evaluation mode.
        think: Argument of the encoder.
        parts: Folders and files of the checkpoint whose parameters serve it.
    """

    model: str
    stages: tuple[str, ...]
    mode: str
    think: Think
    parts: tuple[str, ...]


BOTH = ("embedding", "reasoning")
METHODS = {
    "never": Method("grpo", ("warm_start",), "never", "never", ("embedding",)),
    "always": Method("grpo", ("warm_start", "grpo"), "always", "always", BOTH),
    "gate": Method(
        "grpo", ("warm_start", "grpo", "grpo/gate"), "auto", "auto", (*BOTH, "gate.safetensors")
    ),
    "policy": Method(
        "adaptive", ("warm_start", "adaptive", "adaptive/policy"), "policy", "auto", BOTH
    ),
    "latent": Method("latent", ("latent",), "latent", "latent", ("embedding",)),
    "direct": Method("direct", ("direct",), "never", "never", ("embedding",)),
}
# What decides in a mode of serving: recipe, its folder in the model's, modes measured beside it.
DECIDERS = {
    "auto": ("gate_embed", "gate", ("random", "oracle")),
    "policy": ("policy_threshold", "policy", ("never", "always", "oracle")),
}


@dataclass
class MethodsArguments(ExperimentArguments):
    """Methods, how each is trained, and what is timed.

    Attributes:
        output_dir: Where all runs go.
        sft_config: YAML of the warm start.
        grpo_config: YAML of RL.
        adaptive_config: YAML of RL in which the policy decides.
        latent_config: YAML of latent thoughts, and of its baseline without them.
        timed_queries: Queries of the test split whose encoding is timed.
        timed_rounds: Rounds over all methods, after one that warms up.
        batch_size: Queries a forward, when timed.
    """

    output_dir: str = "outputs/comparison"
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Some of {', '.join(METHODS)}; stages of the others are not run."},
    )
    sft_config: str = "recipes/configs/demo_sft.yaml"
    grpo_config: str = "recipes/configs/demo_grpo.yaml"
    adaptive_config: str = "recipes/configs/demo_adaptive.yaml"
    latent_config: str = "recipes/configs/demo_latent.yaml"
    timed_queries: int = 256
    timed_rounds: int = 3
    batch_size: int = 32

    def __post_init__(self) -> None:
        """Refuse methods that do not exist."""
        unknown = [name for name in self.methods if name not in METHODS]
        if unknown or not self.methods:
            raise ValueError(
                f"methods = {self.methods}; expected some of {list(METHODS)}; correct the list"
            )

    @property
    def chosen(self) -> dict[str, Method]:
        """The methods to compare."""
        return {name: METHODS[name] for name in self.methods}


def main(script: MethodsArguments, data: DataArguments) -> Path:
    """Train and evaluate every method for every seed, time them, then compare."""
    seeds = run_experiment(script, data, lambda seed: plan(script, seed))
    runs: dict[str, dict[str, dict[str, float]]] = {name: {} for name in script.methods}
    for seed in seeds:
        seconds = encoding_seconds(script, seed)
        for name, method in script.chosen.items():
            runs[name][f"{name} of {seed.root.name}"] = {
                **quality_and_cost(seed.root, method),
                "milliseconds": 1000 * seconds[name],
            }
    output, summary = Path(script.output_dir), summarize(runs)
    text = method_table(summary)
    save_summary(output / "comparison", summary, text)
    plot_methods(summary, output / "comparison.png")
    logger.log(NOTICE, "Mean and standard deviation over %s:\n%s", told_runs(script), text)
    return output


def plan(script: MethodsArguments, seed: Seed) -> Iterator[Stage]:
    """Yield what trains the models of one seed and measures each in the modes it serves."""
    new = seed.initial_settings
    rl = {"warm_start": seed.root / "warm_start", "evaluate": False, **seed.settings}
    models = {
        "warm_start": ("sft_embed", script.sft_config, new),
        "grpo": ("grpo_embed", script.grpo_config, rl),
        "adaptive": ("adaptive_embed", script.adaptive_config, rl),
        "latent": ("latent_embed", script.latent_config, new),
        "direct": ("latent_embed", script.latent_config, {"direct_only": True, **new}),
    }
    chosen = script.chosen.values()
    needed = {stage for method in chosen for stage in (method.model, *method.stages)}
    for name, (recipe, config, own) in models.items():
        if name not in needed:
            continue
        target = seed.root / name
        yield Stage(recipe, target, {"config": config, "output_dir": target, **own})
        modes = [method.mode for method in chosen if method.model == name]
        for mode, (recipe, folder, beside) in DECIDERS.items():
            if mode in modes:
                yield decider(recipe, target, folder, seed)
                modes += beside
        if modes:
            yield evaluation(target, seed, modes)


def encoding_seconds(script: MethodsArguments, seed: Seed) -> dict[str, float]:
    """Return the median seconds a query of each method's encoder, methods taking turns."""
    items = [record.query for record in list(seed.data.load("test"))[: script.timed_queries]]
    embedders = {
        name: ThinkingEmbedder.from_pretrained(str(seed.root / name))
        for name in dict.fromkeys(method.model for method in script.chosen.values())
    }
    seconds: dict[str, list[float]] = {name: [] for name in script.methods}
    rounds = tqdm(range(script.timed_rounds + 1), desc=f"timing seed {seed.number}", unit="round")
    for repeat in rounds:
        for name, method in script.chosen.items():
            started = time.perf_counter()
            embedders[method.model].encode_query(
                items,
                think=method.think,
                batch_size=script.batch_size,
            )
            if repeat:  # the first round warms up
                seconds[name].append((time.perf_counter() - started) / len(items))
    return {name: statistics.median(values) for name, values in seconds.items()}


def quality_and_cost(root: Path, method: Method) -> Mapping[str, float]:
    """Return what one method reached with one seed, its parameters and its training time."""
    path = root / method.model / EVALUATION_FOLDER / METRICS_FILE
    seconds = sum(seconds_of(root / stage) for stage in method.stages)
    return {
        **served_metrics(json.loads(path.read_text(encoding="utf-8")), method.mode),
        "trainable_parameters": float(count_parameters(root / method.model, method.parts)),
        "training_minutes": seconds / 60,
    }


def count_parameters(model: Path, parts: tuple[str, ...]) -> int:
    """Return how many numbers the named folders and files of a checkpoint hold."""
    total = 0
    for part in parts:
        path = model / part
        for file in [path] if path.is_file() else sorted(path.glob("*.safetensors")):
            with safe_open(file, "numpy") as tensors:
                names = tensors.keys()
                total += sum(math.prod(tensors.get_slice(name).get_shape()) for name in names)
    return total


if __name__ == "__main__":
    start(main, (MethodsArguments, DataArguments), description=__doc__)
