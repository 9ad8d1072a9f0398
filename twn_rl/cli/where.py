"""`twn-rl where`: the path of a file that comes with the package."""

import argparse
import sys
from pathlib import Path

import twn_rl


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the name."""
    parser.add_argument("name", nargs="?", default="", help="as recipes/configs/demo_grpo.yaml")


def run(arguments: argparse.Namespace) -> int:
    """Print the path; refuse what is not there."""
    path = Path(twn_rl.__file__).parent / arguments.name
    if not path.exists():
        raise FileNotFoundError(f"{arguments.name!r} is not in {path.parent}; correct the name")
    sys.stdout.write(f"{path}\n")
    return 0
