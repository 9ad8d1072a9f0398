"""What a comparison does with its stages: which are kept, run again, or refused."""

import json
import logging
import os
from dataclasses import replace
from pathlib import Path

import pytest
from comparison_runs import Launched, run_stages, seed_in

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.experiment import report_arms, run_experiment
from twn_rl.launch.parsing import parse_arguments
from twn_rl.launch.stage import FINISHED_FILE, Stage
from twn_rl.recipes import sft_embed
from twn_rl.recipes.experiments import ablate, few_thoughts, new_domain
from twn_rl.training.sft import SftConfig


def test_a_stage_that_fails_is_told_with_its_log(tmp_path: Path, launched: Launched) -> None:
    with pytest.raises(RuntimeError, match=r"sft_embed for .*ended with status 1") as caught:
        Stage("sft_embed", tmp_path / "model", {"seed": 13}).run([])
    assert "a line of the recipe" in str(caught.value)
    assert not (tmp_path / "model" / FINISHED_FILE).exists()


def test_a_stage_trains_over_its_own_model_and_over_no_other(
    tmp_path: Path, launched: Launched
) -> None:
    def is_told() -> bool:
        return "--overwrite_output_dir=true" in launched()[0]

    model, rests = tmp_path / "model", tmp_path / "refit"
    stage = Stage("sft_embed", model, {"seed": 0}, outdates=[rests])
    follows = Stage("sft_embed", rests, {"checkpoint": model})
    for folder in (model, rests):
        folder.mkdir()
        (folder / "twn_config.json").write_text("{}", encoding="utf-8")
    for _ in range(2):  # trained by hand: the recipe will refuse, as often as it is run
        stage.run([])
        assert not is_told()
        stage.finished_file.unlink()
    (model / "twn_config.json").unlink()
    stage.run([])
    (model / "twn_config.json").write_text("{}", encoding="utf-8")
    launched()
    follows.begun_file.write_text("{}", encoding="utf-8")  # killed after it had saved its model
    follows.run([])
    assert is_told()
    # What rests on a stage that ran again is trained again, over what it was.
    stage.finished_file.rename(stage.begun_file)
    stage.run([])
    assert is_told()
    follows.run([])
    assert is_told()


def test_a_finished_stage_of_a_script_by_path_is_kept(tmp_path: Path, launched: Launched) -> None:
    stage = Stage("sft_embed", tmp_path, {"seed": 0})
    command = ["python", "-m", "accelerate.commands.launch", "/a/recipes/sft_embed.py", "--seed=0"]
    (tmp_path / FINISHED_FILE).write_text(json.dumps({"command": command, "seconds": 1.0}))
    assert not stage.run([])
    assert launched() == []


def test_every_seed_has_its_folder_and_its_records(tmp_path: Path, launched: Launched) -> None:
    script = ablate.AblateArguments(output_dir=str(tmp_path), seeds=[1, 2], parallel=2)
    data = DataArguments(teacher_swap_rate=0.5)
    seeds = run_experiment(
        script, data, lambda seed: [Stage("sft_embed", seed.root / "model", seed.settings)]
    )
    assert [seed.root for seed in seeds] == [tmp_path / "seed1", tmp_path / "seed2"]
    for recipe, *flags in launched():
        assert recipe == "sft_embed"
        types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
        *_, own, training = parse_arguments(types, arguments=[*flags, f"--output_dir={tmp_path}"])
        assert own.demo_seed == training.seed
        assert own.demo_dir == str(tmp_path / f"seed{training.seed}" / "data")
        assert own.teacher_swap_rate == 0.5


def test_a_seed_runs_once_for_each_number_of_threads_on_equal_records(
    tmp_path: Path, launched: Launched, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    script = ablate.AblateArguments(output_dir=str(tmp_path), seeds=[1, 2], threads=[1, 2])
    runs = run_experiment(
        script, DataArguments(), lambda run: [Stage("sft_embed", run.root / "model", run.settings)]
    )
    named = ["seed1_threads1", "seed2_threads1", "seed1_threads2", "seed2_threads2"]
    assert [run.root.name for run in runs] == named
    assert [run.data.demo_seed for run in runs] == [run.number for run in runs] == [1, 2, 1, 2]
    assert len({run.data.demo_dir for run in runs}) == 4
    for run in runs:
        log = (run.root / "model" / "log.txt").read_text(encoding="utf-8")
        assert log == f"a line of the recipe on {run.threads} threads\n"
    Stage("sft_embed", tmp_path / "model", {}).run([])
    assert "on 7 threads" in (tmp_path / "model" / "log.txt").read_text(encoding="utf-8")
    script.threads = [0]
    with pytest.raises(ValueError, match=r"threads \[0\]; expected numbers from 1"):
        run_experiment(script, DataArguments(), lambda run: [])


def test_a_seed_runs_once_for_each_change_of_its_last_bits(
    tmp_path: Path, launched: Launched
) -> None:
    script = ablate.AblateArguments(
        output_dir=str(tmp_path), seeds=[1, 2], threads=[1], perturbations=[0, 7]
    )
    runs = run_experiment(
        script,
        DataArguments(),
        lambda run: [
            Stage("sft_embed", run.root / "model", run.initial_settings),
            Stage("grpo_embed", run.root / "rl", run.settings),
        ],
    )
    named = [f"seed{seed}_threads1{end}" for end in ("", "_perturbed7") for seed in (1, 2)]
    assert [run.root.name for run in runs] == named
    first, *_, warm, rl = launched()
    assert "--perturbation=7" in warm
    assert not any("perturbation" in flag for flag in rl)
    assert first[0] == "sft_embed"
    assert not any("perturbation" in flag for flag in first)
    types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
    _, model, *_ = parse_arguments(types, arguments=[*warm[1:], f"--output_dir={tmp_path}"])
    assert model.perturbation == 7


def test_a_gate_is_fitted_before_the_evaluation_and_both_are_kept(
    tmp_path: Path, launched: Launched
) -> None:
    model, seed = tmp_path / "model", seed_in(tmp_path)
    plain, gated = (
        list(ablate.measured(ablate.AblateArguments(gate=gate), model, seed))
        for gate in (False, True)
    )
    run_stages(plain)
    assert [words[0] for words in launched()] == ["eval_embed"]
    run_stages(gated)  # an evaluation without the gate is not taken for one with it
    assert [words[0] for words in launched()] == ["gate_embed", "eval_embed"]
    run_stages(gated)
    assert launched() == []
    (model / "gate" / FINISHED_FILE).unlink()  # a gate fitted anew is measured anew
    run_stages(gated)
    assert [words[0] for words in launched()] == ["gate_embed", "eval_embed"]


def test_training_anew_forgets_what_was_measured_and_other_flags_are_reported(
    tmp_path: Path, launched: Launched, caplog: pytest.LogCaptureFixture
) -> None:
    model, seed = tmp_path / "model", seed_in(tmp_path)
    measured = list(ablate.measured(ablate.AblateArguments(gate=True), model, seed))
    first, other = (Stage("sft_embed", model, {"seed": number}) for number in (0, 1))
    assert first.run(["--quiet"])
    run_stages(measured)
    with caplog.at_level(logging.WARNING):
        assert not first.run(["--quiet"])
        assert "other flags" not in caplog.text
        assert not other.run(["--quiet"])
    assert "other flags" in caplog.text
    assert len(launched()) == 3
    other.finished_file.unlink()
    assert other.run(["--quiet"])
    run_stages(measured)
    assert [words[0] for words in launched()] == ["sft_embed", "gate_embed", "eval_embed"]


def test_a_stage_of_changed_settings_or_of_another_model_is_not_taken_for_the_same(
    tmp_path: Path, launched: Launched, caplog: pytest.LogCaptureFixture
) -> None:
    base, own, model = tmp_path / "base.yaml", tmp_path / "own.yaml", tmp_path / "warm"
    base.write_text("max_steps: 5\nseed: 1\n", encoding="utf-8")
    own.write_text("base: base.yaml\nenv: {A_SETTING_OF_A_STAGE: '1'}\n", encoding="utf-8")
    weights = {name: f"{name}/adapter_model.safetensors" for name in ("embedding", "reasoning")}
    digests = {**dict.fromkeys(weights.values(), "first"), "gate.safetensors": "first"}
    model.mkdir()
    (model / "twn_config.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
    settings = {"warm_start": model, "config": own, "seed": 3}
    training = Stage("grpo_embed", tmp_path / "rl", settings)
    cheap = Stage("eval_embed", tmp_path / "eval", settings, is_cheap=True)
    run_stages([training, cheap])
    assert "A_SETTING_OF_A_STAGE" not in os.environ
    assert len(launched()) == 2

    # What does not count: a setting that a flag overrides, another gate, the order of flags.
    base.write_text("max_steps: 5\nseed: 2\n", encoding="utf-8")
    digests["gate.safetensors"] = "second"
    (model / "twn_config.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
    turned = replace(training, settings=dict(reversed(settings.items())))
    with caplog.at_level(logging.WARNING):
        run_stages([training, turned, cheap])
    assert launched() == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    base.write_text("max_steps: 7\nseed: 2\n", encoding="utf-8")
    run_stages([training, cheap])
    assert [words[0] for words in launched()] == ["eval_embed"]
    assert "run with config.max_steps = 5, now 7" in caplog.text
    caplog.clear()
    digests[weights["reasoning"]] = "second"
    (model / "twn_config.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
    run_stages([training, cheap])
    assert [words[0] for words in launched()] == ["eval_embed"]
    assert "warm_start.reasoning/adapter_model.safetensors = first, now second" in caplog.text
    assert "remove the folder to run it again" in caplog.text


def test_runs_of_one_seed_have_their_spread_in_tables_of_their_own(
    tmp_path: Path, launched: Launched
) -> None:
    script = ablate.AblateArguments(output_dir=str(tmp_path), seeds=[1, 2], perturbations=[0, 7])
    runs = run_experiment(script, DataArguments(), lambda run: [])
    for place, seed in enumerate(runs):
        folder = seed.root / "model" / "evaluation"
        folder.mkdir(parents=True)
        metrics = {"test/all/always/hit@1": 0.1 * place}
        (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    report_arms(script, runs, {"arm": "model"})
    values = {
        path.parent.name: json.loads(path.read_text(encoding="utf-8"))["arm"][
            "test/all/always/hit@1"
        ]["values"]
        for path in tmp_path.rglob("summary.json")
    }
    assert values.pop(tmp_path.name) == pytest.approx([0.0, 0.1, 0.2, 0.3])
    assert values.keys() == {"runs_of_seed1", "runs_of_seed2"}
    assert values["runs_of_seed1"] == pytest.approx([0.0, 0.2])
    assert values["runs_of_seed2"] == pytest.approx([0.1, 0.3])


def test_experiments_on_changed_emoji_scenes_refuse_other_records(tmp_path: Path) -> None:
    data = DataArguments(train_file="mine.jsonl", test_file="other.jsonl")
    for script in (new_domain.NewDomainArguments(), few_thoughts.FewThoughtsArguments()):
        script.output_dir = str(tmp_path)
        recipe = new_domain if isinstance(script, new_domain.NewDomainArguments) else few_thoughts
        with pytest.raises(ValueError, match="train_file, test_file given; expected none"):
            recipe.main(script, data)  # pyright: ignore[reportArgumentType]
