"""When and how should an embedder think? Every method from one warm start, in one table.

    python recipes/experiments/compare_methods.py --seeds 0 1 2 --parallel 2

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
by hops in and out of domain, think rate and tokens, milliseconds a query, trained parameters and
training time. Milliseconds are measured last, all methods of a seed in turn in one process, with
nothing else running. Finished stages are kept: the same command goes on where it was stopped. About
25 minutes a seed on one CPU core.
"""

from __future__ import annotations

import json
import logging
import statistics
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from tqdm import tqdm

from twn_rl.evaluation.comparison import (
    Measured,
    compare,
    comparison_table,
    plot_comparison,
)
from twn_rl.evaluation.results import METRICS_FILE
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.options import Think
from twn_rl.launch.arguments import DataArguments, parse_arguments
from twn_rl.launch.run_folder import save_run, set_up_logging
from twn_rl.launch.stages import Stages, forget, seconds_of
from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

RECIPES = Path(__file__).parents[1]
EVALUATION_FOLDER = "evaluation"


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


METHODS = {
    "never": Method("grpo", ("warm_start",), "never", "never", ("embedding",)),
    "always": Method(
        "grpo", ("warm_start", "grpo"), "always", "always", ("embedding", "reasoning")
    ),
    "gate": Method(
        "grpo",
        ("warm_start", "grpo", "grpo/gate"),
        "auto",
        "auto",
        ("embedding", "reasoning", "gate.safetensors"),
    ),
    "policy": Method(
        "adaptive",
        ("warm_start", "adaptive", "adaptive/policy"),
        "policy",
        "auto",
        ("embedding", "reasoning"),
    ),
    "latent": Method("latent", ("latent",), "latent", "latent", ("embedding",)),
    "direct": Method("direct", ("direct",), "never", "never", ("embedding",)),
}


@dataclass
class CompareArguments:
    """Seeds and configurations."""

    output_dir: str = field(default="outputs/comparison", metadata={"help": "Where all runs go."})
    seeds: list[int] = field(
        default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds; three or more."}
    )
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": f"Some of {', '.join(METHODS)}; stages of the others are not run."},
    )
    sft_config: str = field(
        default=str(RECIPES / "configs" / "demo_sft.yaml"),
        metadata={"help": "YAML of the warm start."},
    )
    grpo_config: str = field(
        default=str(RECIPES / "configs" / "demo_grpo.yaml"), metadata={"help": "YAML of RL."}
    )
    adaptive_config: str = field(
        default=str(RECIPES / "configs" / "demo_adaptive.yaml"),
        metadata={"help": "YAML of RL in which the policy decides."},
    )
    latent_config: str = field(
        default=str(RECIPES / "configs" / "demo_latent.yaml"),
        metadata={"help": "YAML of latent thoughts, and of its baseline without them."},
    )
    parallel: int = field(default=1, metadata={"help": "Seeds trained side by side."})
    timed_queries: int = field(
        default=256, metadata={"help": "Queries of the test split whose encoding is timed."}
    )
    timed_rounds: int = field(
        default=3, metadata={"help": "Rounds over all methods, after one that warms up."}
    )
    batch_size: int = field(default=32, metadata={"help": "Queries a forward, when timed."})
    launcher: list[str] = field(
        default_factory=lambda: ["--num_processes", "1"],
        metadata={"help": "Arguments of accelerate launch."},
    )

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


def main(script: CompareArguments, data: DataArguments) -> Path:
    """Train and evaluate every method for every seed, time them, then compare."""
    set_up_logging()
    output = Path(script.output_dir)
    save_run(output, script, data)
    with ThreadPoolExecutor(max_workers=script.parallel) as pool:
        list(pool.map(lambda seed: run_seed(script, data, seed), script.seeds))
    runs: dict[str, list[Measured]] = {name: [] for name in script.methods}
    for seed in script.seeds:
        root = output / f"seed{seed}"
        seconds = encoding_seconds(script, data, seed)
        for name, method in script.chosen.items():
            runs[name].append(measured(root, method, seconds[name]))
    comparison = compare(runs)
    text = comparison_table(comparison)
    write_text(output / "comparison.json", json.dumps(comparison, indent=1) + "\n")
    write_text(output / "comparison.md", text)
    plot_comparison(comparison, output / "comparison.png")
    logger.info("Mean and standard deviation over seeds %s:\n%s", script.seeds, text)
    return output


def run_seed(script: CompareArguments, data: DataArguments, seed: int) -> None:
    """Train all models of one seed and evaluate each in the modes it serves."""
    root = Path(script.output_dir) / f"seed{seed}"
    shared = data.flags_of_seed(root, seed)
    warm = root / "warm_start"
    plans = {
        "warm_start": ("sft_embed.py", script.sft_config, []),
        "grpo": (
            "grpo_embed.py",
            script.grpo_config,
            [f"--warm_start={warm}", "--evaluate=false"],
        ),
        "adaptive": (
            "adaptive_embed.py",
            script.adaptive_config,
            [f"--warm_start={warm}", "--evaluate=false"],
        ),
        "latent": ("latent_embed.py", script.latent_config, []),
        "direct": ("latent_embed.py", script.latent_config, ["--direct_only=true"]),
    }
    stages = Stages(RECIPES, script.launcher)
    chosen = script.chosen.values()
    needed = {stage for method in chosen for stage in (method.model, *method.stages)}
    for name, (recipe, config, own) in plans.items():
        if name not in needed:
            continue
        target = root / name
        flags = [f"--config={config}", *own, f"--output_dir={target}", *shared, f"--seed={seed}"]
        stages.run(recipe, flags, target)
        for folder, decider in (("gate", "gate_embed.py"), ("policy", "policy_threshold.py")):
            if f"{name}/{folder}" in needed:
                flags = [f"--model={target}", *shared, f"--seed={seed}"]
                if stages.run(decider, flags, target / folder, is_cheap=True):
                    # What was measured before was decided otherwise.
                    forget(target / EVALUATION_FOLDER)
        modes = [method.mode for method in chosen if method.model == name]
        if modes:
            modes += ["never", "always", "oracle"] if "policy" in modes else []
            modes += ["random", "oracle"] if "auto" in modes else []
            evaluation = target / EVALUATION_FOLDER
            flags = [f"--model={target}", f"--output_dir={evaluation}", *shared, "--report=false"]
            flags += ["--modes", *modes]
            stages.run("eval_embed.py", flags, evaluation, is_cheap=True)


def encoding_seconds(script: CompareArguments, data: DataArguments, seed: int) -> dict[str, float]:
    """Return the median seconds a query of each method's encoder, methods taking turns."""
    root = Path(script.output_dir) / f"seed{seed}"
    own = DataArguments(**{**asdict(data), "demo_dir": str(root / "data"), "demo_seed": seed})
    items = [record.query for record in list(own.load("test"))[: script.timed_queries]]
    embedders = {
        name: ThinkingEmbedder.from_pretrained(str(root / name))
        for name in dict.fromkeys(method.model for method in script.chosen.values())
    }
    seconds: dict[str, list[float]] = {name: [] for name in script.methods}
    for repeat in tqdm(range(script.timed_rounds + 1), desc=f"timing seed {seed}", unit="round"):
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


def measured(root: Path, method: Method, seconds: float) -> Measured:
    """Return what one method reached with one seed."""
    metrics: Mapping[str, Any] = json.loads(
        (root / method.model / EVALUATION_FOLDER / METRICS_FILE).read_text(encoding="utf-8")
    )
    return Measured(
        metrics,
        method.mode,
        milliseconds=1000 * seconds,
        trainable_parameters=count_parameters(root / method.model, method.parts),
        training_seconds=sum(seconds_of(root / stage) for stage in method.stages),
    )


def count_parameters(model: Path, parts: tuple[str, ...]) -> int:
    """Return how many numbers the named folders and files of a checkpoint hold."""
    total = 0
    for part in parts:
        path = model / part
        files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
        for file in files:
            with safe_open(file, "numpy") as tensors:
                for key in tensors.keys():  # noqa: SIM118  (no mapping)
                    size = 1
                    for length in tensors.get_slice(key).get_shape():
                        size *= length
                    total += size
    return total


if __name__ == "__main__":
    main(*parse_arguments((CompareArguments, DataArguments), description=__doc__))
