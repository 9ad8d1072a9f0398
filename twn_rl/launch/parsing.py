"""A run's settings from a YAML file and flags, into dataclasses."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from transformers import HfArgumentParser

import twn_rl
from twn_rl.launch.command_line import program_name
from twn_rl.launch.source_settings import attributes_of
from twn_rl.runtime.nearest import hint, path_hint
from twn_rl.runtime.problems import Problems
from twn_rl.runtime.processes import join_processes
from twn_rl.runtime.reading import load_yaml

logger = logging.getLogger(__name__)

_LIBRARIES = ("transformers.", "trl.")
RECIPES = Path(twn_rl.__file__).parent / "recipes"


def parse_arguments(
    types: Sequence[Any],
    *,
    arguments: Sequence[str] | None = None,
    default_config: str | Path | None = None,
    description: str | None = None,
) -> Any:
    """Parse YAML, then flags, into one object per dataclass.

    Without `--config` the default file is read. Unknown keys and flags raise. `arguments` are the
    process's own if None. A mapping `env` in the file sets environment variables; `base` names a
    file beside it whose settings are taken where it has none of its own.

    Raises:
        ValueError: With the problems of all dataclasses together.
    """
    files = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    files.add_argument("--config", default=default_config)
    given, words = files.parse_known_args(arguments)
    config = {} if given.config is None else read_settings(given.config)
    environment = config.pop("env", {})
    os.environ.update({str(key): str(value) for key, value in environment.items()})
    try:
        parsed = _Parser(
            types,
            prog=program_name(),
            description=description,
            usage="%(prog)s [--config FILE] [--FIELD VALUE ...]",
            epilog="--config FILE reads settings from YAML; flags override them.",
            formatter_class=_Help,
        ).read(words, config)
    except ValueError as error:
        # The parser stops at the first dataclass that refuses its settings.
        problems = [problem for kind in types if (problem := _refusal(kind, words, config))]
        if len(problems) < 2:
            raise
        raise ValueError("\n".join(problems)) from error
    join_processes()  # for recipes without training arguments, which have joined by now
    return parsed


def packaged(path: str | Path) -> str:
    """Return a path; one in recipes/ that is not there is the file of that name in the package.

    So commands and configurations that name a shipped file work in any folder.
    """
    parts = Path(path).parts
    if parts[:1] == ("recipes",) and not Path(path).exists():
        inside = RECIPES.joinpath(*parts[1:])
        return str(inside if inside.exists() else path)
    return str(path)


class _Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Defaults of flags are shown, and a recipe's docstring keeps its lines."""


class _Parser(HfArgumentParser):
    """Flags whose defaults are a file's values, helped by metadata or the class's docstring."""

    def __init__(self, types: Sequence[Any], **settings: Any) -> None:
        super().__init__(types, allow_abbrev=False, **settings)
        self.add_argument("--help-all", action="help", help="same as --help")
        told = {name: line for kind in types for name, line in _attributes(kind).items()}
        for action in self._actions:
            action.help = action.help or told.get(action.dest)

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage, which is hundreds of lines."""
        raise ValueError(f"{message}; expected what --help says; correct the flag")

    def read(
        self, words: Sequence[str], config: Mapping[str, Any], *, is_partial: bool = False
    ) -> tuple[Any, ...]:
        """Return one object per dataclass; `is_partial` leaves unknown keys and flags alone."""
        names = {action.dest for action in self._actions}
        config = _without_outdated([*self.dataclass_types], words, config, is_told=not is_partial)
        for key in config if not is_partial else ():
            if key not in names:
                raise ValueError(
                    f"unknown key {key!r} in the configuration{hint(key, names)} Expected fields "
                    "of this recipe, see --help-all; correct or remove it"
                )
        self._refuse_types(config)
        for action in self._actions:
            if action.dest in config:
                action.default, action.required = config[action.dest], False
        if not is_partial:
            self._refuse_unknown(words)
        return self.parse_args_into_dataclasses(
            list(words), return_remaining_strings=is_partial, look_for_args_file=False
        )

    def _refuse_types(self, config: Mapping[str, Any]) -> None:
        """Refuse values of a file that are of another type than their fields; texts are parsed."""
        problems = Problems()
        values = {key: value for key, value in config.items() if not isinstance(value, str)}
        for kind in self.dataclass_types:
            try:
                hints = get_type_hints(kind)
            except NameError:  # an annotation of a library that only a type checker can read
                continue
            # Libraries write `str` for what may be a flag as well, such as resume_from_checkpoint.
            theirs = [each for each in kind.__mro__ if each.__module__.startswith(_LIBRARIES)]
            loose = {name for each in theirs for name in getattr(each, "__annotations__", {})}
            kinds = {
                name: hint
                for name, hint in hints.items()
                if name not in loose or str not in (hint, *get_args(hint))
            }
            problems.typed(values, kinds)
        problems.refuse("configuration", "correct these values")

    def _refuse_unknown(self, words: Sequence[str]) -> None:
        """Refuse flags that are none before any settings object is made: one joins processes."""
        unknown = self.parse_known_args(list(words))[1]
        if unknown:
            flag = unknown[0].split("=")[0]
            flags = [f"--{name}" for name in self._option_string_actions]
            # Each flag is known with dashes, too; one spelling of it is enough of a hint.
            flags = [each.replace("----", "--") for each in flags]
            flags = [each for each in flags if "-" not in each[2:] or each == "--help-all"]
            raise ValueError(
                f"unknown flag {' '.join(unknown)}{hint(flag, flags)} Expected a field of this "
                "recipe as --FIELD VALUE, see --help and --help-all; correct or remove it"
            )


def _without_outdated(
    types: Sequence[Any], words: Sequence[str], config: Mapping[str, Any], *, is_told: bool
) -> dict[str, Any]:
    """Return a file's values without those that belong to another value, which a flag replaces.

    A dataclass says so in `outdates`: flag -> names. The weights of a file's rewards are none of
    the rewards that a flag names.
    """
    given = {word.split("=")[0] for word in words}
    kept = dict(config)
    outdates = {flag: n for kind in types for flag, n in getattr(kind, "outdates", {}).items()}
    for flag, names in outdates.items():
        outdated = [name for name in names if name in kept]
        if f"--{flag}" in given and outdated:
            kept = {name: value for name, value in kept.items() if name not in outdated}
            if is_told:
                logger.info(
                    "--%s is given: %s of the configuration, made for its own, is left out",
                    *(flag, " and ".join(outdated)),
                )
    return kept


def _attributes(kind: type) -> dict[str, str]:
    """Return what the docstrings of a dataclass and its parents say of their fields."""
    told: dict[str, str] = {}
    for each in reversed(kind.__mro__):
        told |= attributes_of(each.__doc__ or "")
    return told


def read_settings(path: str) -> dict[str, Any]:
    """Return the settings of a YAML file on those of its `base`, `env` among them.

    Raises:
        FileNotFoundError: If there is no such file; the message names the nearest one.
        ValueError: If it holds something else.
    """
    path = packaged(path)
    if not Path(path).exists():
        shipped = [f"recipes/configs/{file.name}" for file in RECIPES.glob("configs/*.yaml")]
        near = hint(path, shipped) if path.startswith("recipes/") else path_hint(path)
        raise FileNotFoundError(f"--config {path} is no file{near} Correct the path")
    config = load_yaml(path)
    if not isinstance(config, dict):
        raise ValueError(
            f"{path} holds {type(config).__name__}; expected a mapping of settings; correct it"
        )
    environment, base = config.get("env", {}), config.pop("base", None)
    if not isinstance(environment, dict) or "\x00" in str(environment):
        raise ValueError(
            f"{path}: env = {environment!r:.80}; expected a mapping of names and values of "
            "environment variables; correct it"
        )
    shared: dict[str, Any] = {}
    if base is not None:
        below = Path(path).parent / str(base)
        below = below if below.exists() else Path(packaged(str(base)))
        if below.resolve() == Path(path).resolve():
            raise ValueError(f"{path}: base = {base!r} is the file itself; name another")
        shared = read_settings(str(below))
    both = {"env": {**shared["env"], **environment}} if "env" in shared else {}
    return {**shared, **config, **both}


def _refusal(kind: Any, words: Sequence[str], config: Mapping[str, Any]) -> str | None:
    """Return why one dataclass refuses its share of the settings, None if it takes them."""
    try:
        _Parser([kind]).read(words, config, is_partial=True)
    except ValueError as error:
        return str(error)
    return None
