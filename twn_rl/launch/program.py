"""How a recipe starts: its help, its settings, its `main`. Imports nothing heavy before help."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from twn_rl.launch.command_line import errors_in_a_line, program_name, take_switches
from twn_rl.launch.help import recipe_help


def start(
    main: Callable[..., Any],
    types: Sequence[type],
    *,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Any:
    """Run a recipe with the words of the command line; what `main` returns.

    Args:
        main: Takes one object of each of `types`.
        types: Dataclasses of settings.
        default_config: YAML file read if `--config` names no other.
        description: The recipe's docstring.
    """
    words = take_switches(sys.argv[1:])
    if {"-h", "--help"} & {*words}:
        show_help(Path(main.__code__.co_filename), words)
    with errors_in_a_line(is_same_everywhere=True):
        from twn_rl.launch import parsing
        from twn_rl.launch.progress import quieten

        quieten()

        settings = parsing.parse_arguments(
            types, arguments=words, default_config=default_config, description=description
        )
    with errors_in_a_line():
        return main(*settings)


def show_help(path: Path, words: Sequence[str]) -> NoReturn:
    """Print the help of the recipe at `path`, with the defaults of `--config`, and end."""
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config")
    config = files.parse_known_args([word for word in words if word != "--help"])[0].config
    sys.stdout.write(recipe_help(path, program_name(), config))
    raise SystemExit(0)
