"""`twn-rl`: every recipe, and what people do with a model and its data, as one command.

A command of this package is a module that offers `add_arguments(parser)` and `run(arguments) ->
int`, the exit status; a recipe is a module of `twn_rl.recipes` that reads the words after its name.
Refuses to know what any of them does: names and help lines only, and imports when one is chosen.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from twn_rl import __version__
from twn_rl.launch.command_line import (
    INPUT_ERRORS,
    USAGE_STATUS,
    LineParser,
    errors_in_a_line,
    is_for_people,
    message_of,
    program_name,
    show_logs,
    take_switches,
)
from twn_rl.launch.program import show_help
from twn_rl.launch.source_settings import PACKAGE

# Command -> (module of this package, one line of help). `twn-rl --help` must not load torch.
COMMANDS: dict[str, tuple[str, str]] = {
    "demo": ("demo", "train and measure the embedded default, 14 to 20 minutes on two cores"),
    "encode": ("encode", "embed the items of a file into a file of vectors"),
    "search": ("search", "find the nearest vectors of one file to those of another"),
    "serve": ("serve", "answer OpenAI's embeddings requests over HTTP, thinking where it helps"),
    "ui": ("ui", "serve a page on which one sees the model think"),
    "export": ("export", "write a model in a form that other programs load"),
    "index": ("index", "make the items of a file a collection that a server searches"),
    "convert": ("convert", "turn data of another format into records"),
    "check-data": ("check_data", "verify a file of records and print what it holds"),
    "mine-negatives": ("mine_negatives", "add hard negatives to a file of records"),
    "where": ("where", "print the path of a shipped file, such as recipes/accelerate/zero2.yaml"),
}
# Command -> (module of `twn_rl.recipes`, one line of help).
RECIPES: dict[str, tuple[str, str]] = {
    "sft": ("sft_embed", "warm start: token loss on thoughts, contrast with and without them"),
    "grpo": ("grpo_embed", "reinforce thoughts that help retrieval"),
    "expert-iteration": ("expert_iteration", "teach the best of the model's own thoughts"),
    "adaptive": ("adaptive_embed", "the same, while the policy learns whether to think"),
    "latent": ("latent_embed", "learn latent thoughts instead of written ones"),
    "gate": ("gate_embed", "fit the gate that decides who thinks"),
    "policy-threshold": ("policy_threshold", "choose how sure a deciding policy must be"),
    "select-thoughts": ("select_thoughts", "keep the thoughts that pay for their records"),
    "eval": ("eval_embed", "measure a model, on records or on a benchmark"),
    "probe": ("experiments.probe_cot", "ask whether vectors read their thoughts"),
    "probe-injection": ("experiments.probe_injection", "ask how far texts can steer a vector"),
    "compare-checks": ("experiments.compare_checks", "ask what notices a thought of no use"),
    "ablate": ("experiments.ablate", "compare SFT only with SFT and GRPO over seeds"),
    "compare-methods": ("experiments.compare_methods", "compare ways to think over seeds"),
    "compare-selection": ("experiments.compare_selection", "compare what is taught over seeds"),
    "few-thoughts": ("experiments.few_thoughts", "compare shares of records with a thought"),
    "new-domain": ("experiments.new_domain", "compare what pairs without thoughts can teach"),
    "prepare-smollm2": ("prepare.smollm2", "convert SmolLM2 to a backbone"),
    "prepare-wordnet": ("prepare.wordnet", "write WordNet's reverse dictionary as records"),
    "prepare-wordnet-kinds": ("prepare.wordnet_kinds", "write questions over WordNet's kinds"),
    "pretrain-demo": ("prepare.demo_backbone", "train the backbone of the embedded default"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; return 0 for success, 1 if what was asked for has an error to correct.

    Wrong usage and wrong input end with status 2 and one line that says what to change.
    """
    words = take_switches(sys.argv[1:] if arguments is None else arguments)
    show_logs(logging.INFO)
    if words and words[0] in RECIPES:
        return _run_recipe(*words)
    chosen = next((word for word in words if not word.startswith("-")), None)
    parser = LineParser(
        prog="twn-rl",
        description="Train, measure and serve embedding models that may think.",
        epilog="Every command takes --help, --verbose (all logs) and --debug (tracebacks).",
    )
    parser.add_argument("--version", action="version", version=f"twn-rl {__version__}")
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (_, line) in {**COMMANDS, **RECIPES}.items():
        subparser = subparsers.add_parser(
            name,
            help=line,
            description=line,
            formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        )
        if name == chosen and name in COMMANDS:
            program_name(f"twn-rl {name}")
            with errors_in_a_line():
                _module(name).add_arguments(subparser)
    parsed = parser.parse_args(words)
    try:
        return int(_module(parsed.command).run(parsed))
    except INPUT_ERRORS as error:
        if not is_for_people(error):
            raise
        logging.getLogger(__name__).error("%s", message_of(error))
        return USAGE_STATUS


def _module(name: str) -> Any:
    return importlib.import_module(f"twn_rl.cli.{COMMANDS[name][0]}")


def _run_recipe(name: str, *words: str) -> int:
    """Run a recipe as a program in this process, with the words after its name."""
    module = RECIPES[name][0]
    program_name(f"twn-rl {name}")
    # A benchmark has flags of its own, which only the recipe knows.
    if {"-h", "--help"} & {*words} and not any(word.startswith("--benchmark") for word in words):
        show_help(PACKAGE / "recipes" / f"{module.replace('.', '/')}.py", words)
    sys.argv = [name, *words]
    with errors_in_a_line():  # such as a missing extra, which its imports meet
        runpy.run_module(f"twn_rl.recipes.{module}", run_name="__main__", alter_sys=True)
    return 0
