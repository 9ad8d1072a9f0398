"""`twn-rl mine-negatives`: records -> the same records with hard negatives."""

from __future__ import annotations

import argparse
import logging

from twn_rl.cli.model_arguments import add_model_arguments, encode_settings, load_embedder
from twn_rl.inference.mine_negatives import mine_file
from twn_rl.inference.negative_choice import MiningSettings

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare files, filters and model."""
    default = MiningSettings()
    parser.add_argument("--input", required=True, help="records, .jsonl or .parquet")
    parser.add_argument("--output", required=True, help="records with negatives")
    parser.add_argument("--corpus", help="items to mine from; else the records' targets")
    parser.add_argument("--cache", help="folder of the vectors; else OUTPUT with suffix .cache")
    whole = {"num_negatives": "negatives to add", "range_min": "nearest candidates to skip"}
    for name, line in {**whole, "seed": "of random sampling"}.items():
        parser.add_argument(f"--{name}", type=int, default=getattr(default, name), help=line)
    parser.add_argument(
        "--range_max",
        type=int,
        default=default.range_max,
        help="nearest candidates to look at; 0 looks at all",
    )
    limits = {
        "max_score": "largest similarity of a negative",
        "absolute_margin": "least distance below the positive's similarity",
        "relative_margin": "same, as share of the positive's similarity; 0.05 is a good start",
    }
    for name, line in limits.items():
        parser.add_argument(f"--{name}", type=float, help=line)
    parser.add_argument(
        "--sampling", choices=("top", "random"), default=default.sampling, help="which to take"
    )
    add_model_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Mine and log what every filter dropped; return 1 if nothing was mined."""
    names = ("num_negatives", "range_min", "max_score", "absolute_margin", "relative_margin")
    settings = MiningSettings(
        **{name: getattr(arguments, name) for name in (*names, "sampling", "seed")},
        range_max=arguments.range_max or None,
    )
    encoding = encode_settings(arguments)
    report = mine_file(
        load_embedder(arguments),
        arguments.input,
        arguments.output,
        settings,
        corpus=arguments.corpus,
        data_root=arguments.data_root,
        cache=arguments.cache,
        encoding=encoding,
        limit=arguments.limit,
        overwrite=arguments.overwrite,
    )
    for line in report.lines():
        logger.info("%s", line)
    return int(report.mined == 0)
