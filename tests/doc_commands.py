"""How the commands of the documentation are tried: run with fewer steps, or parsed only.

A command is run in this process, by the program it names, with the flags of `SHORTER` at its end.
If it needs a GPU, the network, data that are not there, several processes or a long time, its own
parser takes its arguments, and no more.
"""

import argparse
import re
import runpy
import sys
import tomllib
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from doc_pages import ROOT

from twn_rl import cli
from twn_rl.launch import parsing
from twn_rl.training.vllm_server import serve_command

_DEMO = ["--demo_scale", "0.01"]
# A page may be read after the demo: its models are there.
_TRAINING = [*_DEMO, "--save_strategy", "no", "--overwrite_output_dir", "true"]
_GRPO = [*_TRAINING, "--max_steps", "1", "--per_device_train_batch_size", "4"]
_GRPO += ["--num_generations", "2", "--max_completion_length", "4", "--evaluate", "false"]

# Program -> flags that shorten it; a program that is not here is parsed only.
SHORTER: dict[str, list[str]] = {
    "recipes/sft_embed.py": [*_TRAINING, "--max_steps=2", "--per_device_train_batch_size=4"],
    "recipes/latent_embed.py": [*_TRAINING, "--max_steps=2", "--per_device_train_batch_size=4"],
    "recipes/grpo_embed.py": _GRPO,
    "recipes/adaptive_embed.py": _GRPO,
    "recipes/gate_embed.py": [*_DEMO, "--max_examples", "16", "--batch_size", "8"],
    "recipes/policy_threshold.py": _DEMO,
    "recipes/select_thoughts.py": _DEMO,
    "recipes/eval_embed.py": [*_DEMO, "--splits=test", "--modes", "never", "always", "auto"],
    "recipes/experiments/probe_cot.py": [*_DEMO, "--splits", "test"],
    "benchmarks/interfaces.py": ["--batch_size", "2", "--repeats", "1"],
    "benchmarks/encode.py": [*_DEMO, "--queries", "4", "--repeats", "1"],
    "benchmarks/pictures.py": ["--pictures", "2", "--megapixels", "0.1", "--repeats", "1"],
    "benchmarks/targets.py": ["--sizes", "2000", "--width", "32", "--repeats", "1"],
    "benchmarks/reward_cost.py": [
        *(*_DEMO, "--tiny", "true", "--queries", "2", "--tokens", "4"),
        *("--targets", "500", "--repeats", "1"),
    ],
    "twn-rl convert": [],
    "twn-rl check-data": [],
    "twn-rl encode": ["--limit", "4"],
    "twn-rl search": [],
    "twn-rl index": ["--limit", "2"],
    "twn-rl where": [],
    "twn-rl mine-negatives": ["--range_max", "0"],
}
# What a command needs that is not here: such commands are parsed only.
ABSENT = (
    r"Qwen/|qwen3_vl|smolvlm",  # the network
    r"http://",  # a server
    r"MMEB-V2|mrmr|ViDoRe",  # benchmarks' data
    r"outputs/wordnet",  # WordNet and SmolLM2
    r"--deepspeed|--config_file|torchrun|--ray_actors",  # several processes
    r"\bDIR\b|\bMODEL\b",  # stands for a folder
)
_OTHERS = {
    ".": r"\.venv(-\w+)?/bin/activate",
    "python3": r"-m venv \.venv(-\w+)?",
    "apt-get": r"install [\w-]+",
}


class Parsed(Exception):  # noqa: N818 -- not an error: it ends a program after its parser
    """The program has taken its arguments."""


def unlaunched(command: list[str]) -> list[str]:
    """Return the command that one process of a launched `twn-rl` runs.

    >>> unlaunched(["torchrun", "--nproc_per_node", "8", "-m", "twn_rl.cli", "encode"])
    ['twn-rl', 'encode']
    """
    if command[0] == "torchrun" and "twn_rl.cli" in command:
        return ["twn-rl", *command[command.index("twn_rl.cli") + 1 :]]
    return list(command)


def program_of(command: list[str]) -> tuple[str, list[str]]:
    """Return the program a command runs in the end, a recipe by its file, and its arguments."""
    words = unlaunched(command)
    if words[0] == "twn-rl" and words[1] in cli.RECIPES:
        return f"recipes/{cli.RECIPES[words[1]][0].replace('.', '/')}.py", words[2:]
    if words[:2] == ["accelerate", "launch"] or words[0] in ("torchrun", "python"):
        script = next(i for i, word in enumerate(words) if word.endswith(".py"))
        return words[script], words[script + 1 :]
    if words[0] == "twn-rl" and not words[1].startswith("-"):
        return f"twn-rl {words[1]}", words[2:]
    return words[0], words[1:]


def try_command(
    command: list[str], monkeypatch: pytest.MonkeyPatch, *, may_run: bool = True
) -> str:
    """Run or parse a command in the current folder; return "run" or "parsed".

    Raises:
        ValueError: For a command that is neither.
        AssertionError: If it fails, or names what does not exist.
    """
    line = " ".join(command)
    program, words = program_of(command)
    if command[0] == "make":
        targets = re.findall(r"^([\w-]+)[ \w.-]*:(?!=)", (ROOT / "Makefile").read_text(), re.M)
        assert set(words) <= set(targets), f"{line}: the Makefile has only {targets}"
        return "parsed"
    if command[0] == "pip":
        _check_install(line)
        return "parsed"
    if "vllm" in command[:3]:
        _check_server(command)
        return "parsed"
    if command[:3] == ["python", "-m", "pytest"]:
        assert all((ROOT / path).exists() for path in command[3:]), line
        return "parsed"
    if command[0] in _OTHERS:
        assert re.fullmatch(_OTHERS[command[0]], " ".join(command[1:])), line
        return "parsed"
    if not (program.startswith("twn-rl") or (ROOT / program).is_file()):
        raise ValueError(f"{line}: neither run nor parsed; teach tests/doc_commands.py how")
    if "--config_file" in command:
        assert (ROOT / command[command.index("--config_file") + 1]).is_file(), line
    is_run = program in SHORTER and not any(re.search(need, line) for need in ABSENT)
    is_run = is_run and may_run
    shorter = SHORTER[program] if is_run and "--help" not in words else []
    if shorter and "--metric_for_best_model" in words:  # which wants checkpoints
        shorter = [*shorter, "--save_strategy", "steps", "--validation_records", "4"]
    with monkeypatch.context() as patch:
        if not is_run:
            stop_after_parsing(patch)
        try:
            _start(command, shorter, patch)
        except Parsed:
            return "parsed"
        except SystemExit as done:
            if done.code:
                raise AssertionError(f"{line}: exit status {done.code}") from done
    assert is_run or "--help" in words or program == "twn-rl", f"{line} was to be parsed only"
    return "run"


def stop_after_parsing(patch: pytest.MonkeyPatch) -> None:
    """Let every parser of a program end it once all its arguments are taken."""
    parse, parse_args = parsing.parse_arguments, argparse.ArgumentParser.parse_args

    def parse_settings(*args: Any, **kwargs: Any) -> NoReturn:
        parse(*args, **kwargs)
        raise Parsed

    def parse_words(*args: Any, **kwargs: Any) -> NoReturn:
        parse_args(*args, **kwargs)
        raise Parsed

    for name, module in list(sys.modules.items()):
        if name.startswith("twn_rl.") and vars(module).get("parse_arguments") is parse:
            patch.setattr(module, "parse_arguments", parse_settings)
    patch.setattr(argparse.ArgumentParser, "parse_args", parse_words)


def _start(command: list[str], more: list[str], patch: pytest.MonkeyPatch) -> None:
    """Run the program of a command with more flags at its end."""
    command = unlaunched(command)
    if command[0] == "twn-rl":
        patch.setattr(sys, "argv", sys.argv)  # recipes find theirs replaced
        status = cli.main([*command[1:], *more])
        assert status == 0, f"{command}: exit status {status}"
        return
    program, words = program_of(command)
    patch.setattr(sys, "argv", [program, *words, *more])
    runpy.run_path(str(Path(program)), run_name="__main__")


def _check_server(command: list[str]) -> None:
    """Check that a server of vLLM is started as a trainer asks for it."""
    name = next(word for word in command if "/" in word)
    asked = serve_command(name, None, torch.bfloat16, 32, temperature=1.0).split()
    assert command[: len(asked)] == asked, f"{command}: a trainer asks for {asked}"


def _check_install(line: str) -> None:
    """Check that extras and files of a `pip install` are there."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    extras = project["project"]["optional-dependencies"]
    for named in re.findall(r"\.\[([\w,]+)\]", line):
        assert set(named.split(",")) <= set(extras), f"{line}: extras are {sorted(extras)}"
    for name in re.findall(r"-c (\S+)", line):
        assert (ROOT / name).is_file(), line
