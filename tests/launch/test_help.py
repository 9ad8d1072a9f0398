"""Help of recipes is read from their sources: it must say what the dataclasses say, and at once."""

import dataclasses
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from twn_rl import cli
from twn_rl.launch import parsing
from twn_rl.launch.help import USUAL, recipe_help
from twn_rl.launch.parsing import _attributes
from twn_rl.launch.source_settings import PACKAGE, Unknown, read_recipe
from twn_rl.training.grpo import EmbedGRPOConfig

ROOT = Path(__file__).parents[2]
MODULES = [module for module, _ in cli.RECIPES.values()]


class Parsed(Exception):  # noqa: N818 -- ends a recipe before it runs
    """The types a recipe parses."""


def file_of(module: str) -> Path:
    return PACKAGE / "recipes" / f"{module.replace('.', '/')}.py"


def types_of(module: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Return the dataclasses that a recipe itself hands to the parser."""
    import runpy

    def stop(types: Any, **kwargs: Any) -> None:
        raise Parsed(*types)

    monkeypatch.setattr(parsing, "parse_arguments", stop)
    monkeypatch.setattr(sys, "argv", [module])
    with pytest.raises(Parsed) as caught:
        runpy.run_path(str(file_of(module)), run_name="__main__")
    return caught.value.args


@pytest.mark.parametrize("module", MODULES)
def test_what_is_read_from_the_source_is_what_the_dataclasses_say(
    module: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, sections, _ = read_recipe(file_of(module))
    types = types_of(module, monkeypatch)
    assert [section.name for section in sections] == [kind.__name__ for kind in types]
    for section, kind in zip(sections, types, strict=True):
        fields = {field.name: field for field in dataclasses.fields(kind)}
        told = _attributes(kind)
        for setting in section.settings:
            field = fields.pop(setting.name)
            assert setting.help == field.metadata.get("help", told.get(field.name, ""))
            default = field.default
            if field.default_factory is not dataclasses.MISSING:
                default = field.default_factory()
            if default is dataclasses.MISSING:
                default = Unknown("")
            assert setting.default == default, (setting, default)
        if not section.is_trainer:
            assert not fields, f"{kind.__name__}: {sorted(fields)} are missing in the help"
        else:  # the rest is the trainer's, the usual ones of which have a line
            own = [c for c in kind.__mro__ if c.__module__.startswith("twn_rl")]
            mine = {name for c in own for name in vars(c).get("__annotations__", {})}
            assert not mine & set(fields)


def test_the_usual_settings_are_the_trainers() -> None:
    assert set(USUAL) < {field.name for field in dataclasses.fields(EmbedGRPOConfig)}


def test_groups_defaults_and_examples_are_those_of_who_asks(tmp_path: Path) -> None:
    text = recipe_help(file_of("grpo_embed"), "twn-rl grpo")
    groups = ["this stage:", "data:", "method:", "rewards:", "trainer:", "general:", "examples:"]
    places = [text.index(f"\n{group}") for group in groups]
    assert places == sorted(places)
    assert text.startswith("usage: twn-rl grpo [--config FILE]")
    assert "--rewards margin format" in text
    assert "    twn-rl grpo --rewards margin format --reward_weights 1 0.1" in text
    assert "--adam_beta1" not in text
    own = tmp_path / "own.yaml"
    own.write_text("rewards: [think_gain]\nmax_grad_norm: 3\n", encoding="utf-8")
    text = recipe_help(file_of("grpo_embed"), "grpo_embed.py", str(own))
    assert "--rewards think_gain" in text
    assert "--max_grad_norm 3" in text
    assert "accelerate launch recipes/grpo_embed.py\n" in text


def test_help_comes_without_torch_and_within_two_seconds() -> None:
    code = (
        "import sys, twn_rl.cli as cli\n"
        "try: cli.main(['adaptive', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert time.perf_counter() - started < 2
    assert "usage: twn-rl adaptive" in done.stdout


def test_help_all_lists_the_trainers_settings(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = importlib.import_module("twn_rl.recipes.grpo_embed")
    with pytest.raises(SystemExit) as caught:
        parsing.parse_arguments(recipe.ARGUMENTS, arguments=["--help-all"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f"--{name}" in text for name in ("adam_beta1", "epsilon_high", "warm_start"))
