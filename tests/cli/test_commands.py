"""`twn-rl`: every command is there, is imported when chosen, and gets the words after its name."""

import sys
from pathlib import Path

import pytest

from twn_rl import cli
from twn_rl.cli import COMMANDS, RECIPES, main
from twn_rl.cli.demo import MAX_THREADS, stages, usual_threads


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    assert all(f" {name}" in text for name in (*COMMANDS, *RECIPES))


def test_every_command_has_its_module() -> None:
    folder = Path(cli.__file__).parent
    assert all((folder / f"{module}.py").is_file() for module, _ in COMMANDS.values())
    recipes = folder.parent / "recipes"
    for module, _ in RECIPES.values():
        assert (recipes / f"{module.replace('.', '/')}.py").is_file()


def test_a_recipe_gets_the_words_after_its_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["twn-rl"])
    monkeypatch.delitem(sys.modules, "twn_rl.recipes.prepare.wordnet", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["prepare-wordnet", "--help"])
    assert caught.value.code == 0
    assert "reverse dictionary" in capsys.readouterr().out
    monkeypatch.delitem(sys.modules, "twn_rl.recipes.prepare.wordnet", raising=False)
    with pytest.raises(SystemExit) as caught:
        main(["prepare-wordnet", "--num_tests", "3"])
    assert caught.value.code == 2
    assert "--num_tests 3; did you mean '--num_test'" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["sing"]])
def test_wrong_usage_is_told(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_a_shipped_file_is_named_and_an_absent_one_refused(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert main(["where", "recipes/configs/demo_grpo.yaml"]) == 0
    assert Path(capsys.readouterr().out.strip()).is_file()
    assert main(["where", "recipes/configs/absent.yaml"]) == 2
    assert "'recipes/configs/absent.yaml' is not" in caplog.text


def test_the_demo_has_five_stages_that_rest_on_each_other(tmp_path: Path) -> None:
    warm_start, rl, refit, gate, evaluation = stages(tmp_path, None, 3).values()
    assert f"--warm_start={warm_start.target}" in rl.flags
    assert f"--checkpoint={rl.target}" in refit.flags
    assert {"--max_steps=3"} <= {*warm_start.flags} & {*rl.flags} & {*refit.flags}
    assert f"--model={refit.target}" in gate.flags
    assert {f"--model={refit.target}", f"--before={warm_start.target}"} <= {*evaluation.flags}
    assert refit.target in rl.outdates
    assert evaluation.target in gate.outdates
    every = (warm_start, rl, refit, gate, evaluation)
    assert all(f"--demo_dir={tmp_path / 'data'}" in stage.flags for stage in every)
    assert not any("seed=" in flag for stage in every for flag in stage.flags)
    seeded = stages(tmp_path, None, 3, seed=5).values()
    assert all("--demo_seed=5" in stage.flags for stage in seeded)
    assert ["--seed=5" in stage.flags for stage in seeded] == [True, True, True, True, False]
    assert not any("interface=" in flag for stage in every for flag in stage.flags)
    made = stages(tmp_path, None, 3, interface="shared_prefill").values()
    told = ["--interface=shared_prefill" in stage.flags for stage in made]
    assert told == [True, False, False, False, False]  # the rest read it from the model


def test_the_demo_uses_the_cores_at_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for cores, threads in ((1, 1), (2, 2), (64, MAX_THREADS)):
        monkeypatch.setattr("os.sched_getaffinity", lambda process, n=cores: set(range(n)))
        assert usual_threads() == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert usual_threads() is None
