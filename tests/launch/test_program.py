"""What people misspell ends in one line with the nearest names and status 2, and faults do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from twn_rl import cli
from twn_rl.launch.arguments import DataArguments
from twn_rl.launch.command_line import errors_in_a_line, take_switches
from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import adaptive_embed, grpo_embed

CONFIG = Path(grpo_embed.__file__).parent / "configs" / "demo_grpo.yaml"


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return an empty folder to start programs in, without switches of others."""
    for name in ("TWN_RL_DEBUG", "TWN_RL_VERBOSE"):
        monkeypatch.setenv(name, "")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["twn-rl"])
    (tmp_path / "train.jsonl").write_text("", encoding="utf-8")
    return tmp_path


WRONG = {
    "grpo --rewrds margin": ("--rewrds margin", "--rewards"),
    "grpo --rewards margn": ("margn", "'margin'"),
    "grpo --rewards mine.py:reward": ("mine.py", "existing path/to/file.py"),
    "grpo --config recipes/configs/demo_gpro.yaml": ("demo_gpro.yaml", "demo_grpo.yaml"),
    "grpo --max_steps ten": ("invalid int value: 'ten'", "--max_steps"),
    "sft --train_file tran.jsonl": ("tran.jsonl", "'train.jsonl'"),
    "sft --train_adapters reasonin": ("reasonin", "'reasoning'"),
    "eval --modes alwys": ("alwys", "always"),
    "eval --splits tst": ("tst", "test"),
    "eval --model absent": ("absent/twn_config.json", "written by save_pretrained"),
    "gate --sides qery": ("qery", "query"),
    "grpo --per_device_train_batch 2": ("train_batch 2;", "--per_device_train_batch_size"),
    "grpo --max_step 2": ("did you mean '--max_steps' or '--save_steps'?",),
    "encode --inp x": ("--inp;", "'--input'"),
    "encode --model x": ("--input", "required"),
    "encode --think alwys --model x --input y --output z": ("alwys", "always"),
    "search --querys x --queries q --index i --output o": ("--querys", "--queries"),
    "check-data tran.jsonl": ("tran.jsonl", "'train.jsonl'"),
    "evl": ("evl", "'eval'"),
}


@pytest.mark.parametrize("line", WRONG)
def test_a_misspelt_word_ends_in_one_line_with_status_2(
    line: str,
    plain: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if line.split()[0] in cli.RECIPES:  # run as a program, not as the module others imported
        module = f"twn_rl.recipes.{cli.RECIPES[line.split()[0]][0]}"
        monkeypatch.delitem(sys.modules, module, raising=False)
    try:
        status = cli.main(line.split())
    except SystemExit as end:
        status = end.code
    assert status == 2
    told = [row for row in capsys.readouterr().err.splitlines() if "error: " in row]
    assert len(told) == 1
    assert all(part in told[0] for part in WRONG[line]), told[0]


def test_nothing_else_is_printed_also_under_accelerate_launch(plain: Path) -> None:
    words = ["--train_file", "tran.jsonl", "--use_cpu", "true"]
    recipe = Path(grpo_embed.__file__).with_name("sft_embed.py")
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--quiet",
            "--num_processes=1",
            str(recipe),
            *words,
        ],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert done.returncode != 0
    assert "sft_embed.py: error: 'tran.jsonl' does not exist" in done.stderr
    assert "did you mean 'train.jsonl'?" in done.stderr
    assert "Traceback" not in done.stderr


def test_debug_shows_the_traceback_and_a_fault_always_has_one(
    plain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit), errors_in_a_line():
        Path("absent").read_text()
    with pytest.raises(ValueError, match="a fault"), errors_in_a_line():
        raise ValueError("a fault")  # not raised by the package about its input
    assert take_switches(["--debug", "--a", "1"]) == ["--a", "1"]
    with pytest.raises(FileNotFoundError), errors_in_a_line():
        Path("absent").read_text()
    monkeypatch.setenv("TWN_RL_DEBUG", "")
    assert take_switches(["--debug", "underflow_overflow"]) == ["--debug", "underflow_overflow"]


@pytest.mark.parametrize("types", [grpo_embed.ARGUMENTS, adaptive_embed.ARGUMENTS])
def test_weights_of_a_file_belong_to_its_own_rewards(types: tuple, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    text = CONFIG.read_text(encoding="utf-8") + "reward_parameters: {margin: {top_k: 4}}\n"
    file.write_text(text, encoding="utf-8")
    words = ["--config", str(file), "--output_dir", str(tmp_path / "out")]
    script, _, training = parse_arguments(types, arguments=words)
    assert training.reward_weights == [1.0, 0.5]
    assert script.reward_parameters
    script, _, training = parse_arguments(types, arguments=[*words, "--rewards", "mine.py:f"])
    assert (script.rewards, training.reward_weights) == (["mine.py:f"], None)
    assert script.reward_parameters is None
    flags = ["--rewards=margin", "--reward_weights", "2"]
    _, _, training = parse_arguments(types, arguments=[*words, *flags])
    assert training.reward_weights == [2.0]


def test_an_unknown_flag_is_refused_before_settings_are_made(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"unknown flag --demo_sed 3; did you mean '--demo_seed'"):
        parse_arguments([DataArguments], arguments=["--demo_sed", "3"])
