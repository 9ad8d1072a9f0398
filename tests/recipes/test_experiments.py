"""Which recipes a comparison runs with which flags, what is kept, and what is run again."""

import json
import logging
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.experiment import FINISHED_FILE, Seed, Stage, report_arms, run_experiment
from twn_rl.launch.parsing import parse_arguments
from twn_rl.recipes import (
    eval_embed,
    expert_iteration,
    grpo_embed,
    select_thoughts,
    sft_embed,
)
from twn_rl.recipes.experiments import (
    ablate,
    compare_methods,
    compare_selection,
    few_thoughts,
    new_domain,
)
from twn_rl.training.grpo import EmbedGRPOConfig
from twn_rl.training.sft import SftConfig

Launched = Callable[[], list[list[str]]]


@pytest.fixture
def launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Launched:
    """Let `accelerate launch` be a program that leaves its recipe and flags in a file."""
    log, program, starter = (tmp_path / name for name in ("launched", "program.py", "python"))
    program.write_text(
        "import json, os, sys\n"
        "place = max(n for n, word in enumerate(sys.argv) if word == '-m')\n"
        "recipe = sys.argv[place + 1].removeprefix('twn_rl.recipes.')\n"
        f"with open({str(log)!r}, 'a') as file:\n"
        "    file.write(json.dumps([recipe, *sys.argv[place + 2:]]) + '\\n')\n"
        "print('a line of the recipe on', os.environ.get('OMP_NUM_THREADS'), 'threads')\n"
        "sys.exit('--seed=13' in sys.argv)\n",
        encoding="utf-8",
    )
    starter.write_text(f'#!/bin/sh\nexec {sys.executable} {program} "$@"\n', encoding="utf-8")
    starter.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(starter))

    def read() -> list[list[str]]:
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return read


def seed_in(folder: Path, number: int = 3, **data: object) -> Seed:
    own = replace(DataArguments(), **data).of_seed(folder, number)  # pyright: ignore[reportArgumentType]
    return Seed(number, folder, own)


def places(stages: list[Stage], root: Path) -> list[tuple[str, str]]:
    return [(stage.recipe, str(stage.target.relative_to(root))) for stage in stages]


def run(stages: list[Stage]) -> None:
    for stage in stages:
        stage.run(["--quiet"])


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


def test_the_gate_of_an_ablation_is_told_its_model_its_data_and_its_seed(tmp_path: Path) -> None:
    seed = seed_in(tmp_path)
    for config in (None, "gate.yaml"):
        script = ablate.AblateArguments(gate=True, gate_config=config)
        gate, _ = ablate.measured(script, tmp_path / "grpo", seed)
        assert (gate.recipe, gate.target) == ("gate_embed", tmp_path / "grpo" / "gate")
        assert ("--config=gate.yaml" in gate.flags) == (config is not None)
        assert {f"--model={tmp_path / 'grpo'}", "--demo_seed=3", "--seed=3"} <= set(gate.flags)


@pytest.mark.parametrize("gate", [False, True])
def test_an_evaluation_of_an_ablation_asks_for_the_gate_only_if_there_is_one(
    tmp_path: Path, gate: bool
) -> None:
    *_, evaluation = ablate.measured(ablate.AblateArguments(gate=gate), tmp_path, seed_in(tmp_path))
    types = (eval_embed.EvalScriptArguments, DataArguments)
    parsed, data = parse_arguments(types, arguments=evaluation.flags)
    assert data.demo_seed == 3
    assert (set(ablate.GATE_MODES) <= set(parsed.modes)) == gate
    assert ("auto" in parsed.modes) == gate


def test_the_arms_of_an_ablation_start_from_one_warm_start_with_one_budget(tmp_path: Path) -> None:
    script = ablate.AblateArguments(arms=["sft_only", "grpo", "grpo:info_nce"])
    stages = list(ablate.plan(script, seed_in(tmp_path)))
    assert places(stages, tmp_path) == [
        ("sft_embed", "warm_start"),
        ("eval_embed", "warm_start/evaluation"),
        ("sft_embed", "sft_only"),
        ("eval_embed", "sft_only/evaluation"),
        ("grpo_embed", "grpo"),
        ("eval_embed", "grpo/evaluation"),
        ("grpo_embed", "grpo_info_nce"),
        ("eval_embed", "grpo_info_nce/evaluation"),
    ]
    sft, grpo, other = stages[2].flags, stages[4].flags, stages[6].flags
    warm = tmp_path / "warm_start"
    assert {f"--checkpoint={warm}", "--max_steps=100", "--split=rl"} <= set(sft)
    assert {f"--warm_start={warm}", "--evaluate=false"} <= set(grpo)
    assert {*other} - {*grpo} == {
        f"--output_dir={tmp_path / 'grpo_info_nce'}",
        *("--rewards", "info_nce", "--reward_weights", "1.0"),
    }


def test_an_arm_names_several_rewards_with_weights_and_takes_their_parameters(
    tmp_path: Path,
) -> None:
    script = ablate.AblateArguments(
        arms=["grpo:margin=1,format=0.5,length=0.25"],
        grpo_config="recipes/configs/demo_grpo_short.yaml",
    )
    *_, rl, _ = ablate.plan(script, seed_in(tmp_path))
    types = (grpo_embed.GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
    parsed, *_, training = parse_arguments(types, arguments=rl.flags)
    assert parsed.rewards == ["margin", "format", "length"]
    assert training.reward_weights == [1.0, 0.5, 0.25]
    window = {"max_think_tokens": 32, "soft_window_tokens": 32}
    assert parsed.reward_parameters == {"length": window}
    assert training.per_device_train_batch_size == 128  # from the file it rests on
    twice = ablate.reward_settings("margin=1,margin=2", "recipes/configs/demo_grpo.yaml")
    assert twice["rewards"] == ["margin", "margin"], "for load_rewards to refuse"
    script.arms = ["grpo:margin=much"]
    with pytest.raises(ValueError, match="weight 'much'; expected a number"):
        list(ablate.plan(script, seed_in(tmp_path)))


def test_a_refit_follows_every_arm_and_the_warm_start(tmp_path: Path) -> None:
    config = "recipes/configs/demo_refit.yaml"
    script = ablate.AblateArguments(arms=["grpo"], refit_config=config, gate=True)
    stages = list(ablate.plan(script, seed_in(tmp_path)))
    names = ("warm_start", "warm_start_refit", "grpo", "grpo_refit")
    trained = [stage for stage in stages if stage.target in {tmp_path / name for name in names}]
    assert [stage.target.name for stage in trained] == [*names]
    assert {tmp_path / name / "gate" for name in names} <= {stage.target for stage in stages}
    chosen, _, data, sft = parse_arguments(sft_embed.ARGUMENTS, arguments=trained[-1].flags)
    assert chosen.checkpoint == str(tmp_path / "grpo")
    assert (chosen.train_adapters, chosen.split) == ("embedding", "train")
    assert (sft.self_written_from, sft.self_written_share, data.demo_seed) == (0.0, 1.0, 3)


def test_a_gate_is_fitted_before_the_evaluation_and_both_are_kept(
    tmp_path: Path, launched: Launched
) -> None:
    model, seed = tmp_path / "model", seed_in(tmp_path)
    plain, gated = (
        list(ablate.measured(ablate.AblateArguments(gate=gate), model, seed))
        for gate in (False, True)
    )
    run(plain)
    assert [words[0] for words in launched()] == ["eval_embed"]
    run(gated)  # an evaluation without the gate is not taken for one with it
    assert [words[0] for words in launched()] == ["gate_embed", "eval_embed"]
    run(gated)
    assert launched() == []
    (model / "gate" / FINISHED_FILE).unlink()  # a gate fitted anew is measured anew
    run(gated)
    assert [words[0] for words in launched()] == ["gate_embed", "eval_embed"]


def test_training_anew_forgets_what_was_measured_and_other_flags_are_reported(
    tmp_path: Path, launched: Launched, caplog: pytest.LogCaptureFixture
) -> None:
    model, seed = tmp_path / "model", seed_in(tmp_path)
    measured = list(ablate.measured(ablate.AblateArguments(gate=True), model, seed))
    first, other = (Stage("sft_embed", model, {"seed": number}) for number in (0, 1))
    assert first.run(["--quiet"])
    run(measured)
    with caplog.at_level(logging.WARNING):
        assert not first.run(["--quiet"])
        assert "other flags" not in caplog.text
        assert not other.run(["--quiet"])
    assert "other flags" in caplog.text
    assert len(launched()) == 3
    other.finished_file.unlink()
    assert other.run(["--quiet"])
    run(measured)
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
    run([training, cheap])
    assert "A_SETTING_OF_A_STAGE" not in os.environ
    assert len(launched()) == 2

    # What does not count: a setting that a flag overrides, another gate, the order of flags.
    base.write_text("max_steps: 5\nseed: 2\n", encoding="utf-8")
    digests["gate.safetensors"] = "second"
    (model / "twn_config.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
    turned = replace(training, settings=dict(reversed(settings.items())))
    with caplog.at_level(logging.WARNING):
        run([training, turned, cheap])
    assert launched() == []
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]

    base.write_text("max_steps: 7\nseed: 2\n", encoding="utf-8")
    run([training, cheap])
    assert [words[0] for words in launched()] == ["eval_embed"]
    assert "run with config.max_steps = 5, now 7" in caplog.text
    caplog.clear()
    digests[weights["reasoning"]] = "second"
    (model / "twn_config.json").write_text(json.dumps({"digests": digests}), encoding="utf-8")
    run([training, cheap])
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


@pytest.mark.parametrize(
    ("arm", "problem"),
    [
        ("sft-only", r"arms = \['sft-only'\].*did you mean sft_only"),
        ("expert_iteration", r"arms = \['expert_iteration'\]"),
        ("grpo:magin", "reward = 'magin'.*margin"),
        ("grpo:margin=x", "weight 'x'"),
        ("grpo:margin,margin=2", "more than once"),
    ],
)
def test_an_arm_of_an_ablation_that_does_not_exist_is_refused_at_once(
    arm: str, problem: str
) -> None:
    with pytest.raises(ValueError, match=problem):
        ablate.AblateArguments(arms=[arm])


def test_experiments_on_changed_emoji_scenes_refuse_other_records(tmp_path: Path) -> None:
    data = DataArguments(train_file="mine.jsonl", test_file="other.jsonl")
    for script in (new_domain.NewDomainArguments(), few_thoughts.FewThoughtsArguments()):
        script.output_dir = str(tmp_path)
        recipe = new_domain if isinstance(script, new_domain.NewDomainArguments) else few_thoughts
        with pytest.raises(ValueError, match="train_file, test_file given; expected none"):
            recipe.main(script, data)  # pyright: ignore[reportArgumentType]


def test_every_method_of_a_seed_sees_the_same_records_and_only_what_is_needed_runs(
    tmp_path: Path,
) -> None:
    script, seed = compare_methods.MethodsArguments(), seed_in(tmp_path)
    stages = list(compare_methods.plan(script, seed))
    assert places(stages, tmp_path) == [
        ("sft_embed", "warm_start"),
        ("grpo_embed", "grpo"),
        ("gate_embed", "grpo/gate"),
        ("eval_embed", "grpo/evaluation"),
        ("adaptive_embed", "adaptive"),
        ("policy_threshold", "adaptive/policy"),
        ("eval_embed", "adaptive/evaluation"),
        ("latent_embed", "latent"),
        ("eval_embed", "latent/evaluation"),
        ("latent_embed", "direct"),
        ("eval_embed", "direct/evaluation"),
    ]
    assert all(f"--demo_dir={tmp_path / 'data'}" in stage.flags for stage in stages)
    modes = {s.target.parent.name: s.settings["modes"] for s in stages if s.recipe == "eval_embed"}
    assert modes["grpo"] == ["never", "always", "auto", "random", "oracle"]
    assert modes["adaptive"] == ["policy", "never", "always", "oracle"]
    assert modes["latent"] == ["latent"]

    script = compare_methods.MethodsArguments(methods=["policy"])
    found = [place for _, place in places(list(compare_methods.plan(script, seed)), tmp_path)]
    assert found == ["warm_start", "adaptive", "adaptive/policy", "adaptive/evaluation"]
    with pytest.raises(ValueError, match=r"methods = \['thinking'\]"):
        compare_methods.MethodsArguments(methods=["thinking"])


def test_a_method_has_the_quality_of_its_mode_and_the_cost_of_what_serves_it(
    tmp_path: Path,
) -> None:
    adapter = {"a": np.zeros((2, 3)), "b": np.zeros(4)}
    for folder in (
        "grpo/embedding",
        "grpo/reasoning",
        "grpo/gate",
        "grpo/evaluation",
        "warm_start",
    ):
        (tmp_path / folder).mkdir(parents=True)
        if folder.endswith(("embedding", "reasoning")):
            save_file(adapter, tmp_path / folder / "adapter.safetensors")
    save_file({"w": np.zeros(5)}, tmp_path / "grpo" / "gate.safetensors")
    metrics = {"test/all/auto/hit@1": 0.5, "test/all/never/hit@1": 0.25}
    (tmp_path / "grpo" / "evaluation" / "metrics.json").write_text(json.dumps(metrics))
    for folder, seconds in (("warm_start", 60.0), ("grpo", 30.0), ("grpo/gate", 6.0)):
        (tmp_path / folder / FINISHED_FILE).write_text(json.dumps({"seconds": seconds}))
    measured = {
        name: compare_methods.quality_and_cost(tmp_path, compare_methods.METHODS[name])
        for name in ("never", "gate")
    }
    assert measured == {
        "never": {"test/all/hit@1": 0.25, "trainable_parameters": 10.0, "training_minutes": 1.0},
        "gate": {"test/all/hit@1": 0.5, "trainable_parameters": 25.0, "training_minutes": 1.6},
    }


def test_every_arm_of_a_selection_trains_equally_and_the_first_one_judges(
    tmp_path: Path, launched: Launched
) -> None:
    script = compare_selection.SelectionArguments(max_steps=7)
    root, seed = tmp_path, seed_in(tmp_path, teacher_swap_rate=0.55)
    run(list(compare_selection.plan(script, seed)))
    runs, steps = launched(), ["select_thoughts", "sft_embed", "eval_embed"]
    assert [words[0] for words in runs] == steps * 3
    selections, trainings, evaluations = runs[::3], runs[1::3], runs[2::3]
    parsed = [
        parse_arguments((select_thoughts.SelectScriptArguments, DataArguments), arguments=words[1:])
        for words in selections
    ]
    assert [script.rule for script, _ in parsed] == ["all", "random", "best"]
    assert [script.model for script, _ in parsed] == [None, None, str(root / "all")]
    for chosen, own in parsed:
        assert (chosen.demo_teachers, chosen.copies, chosen.seed) == (4, 4, 3)
        assert (own.demo_seed, own.teacher_swap_rate) == (3, 0.55)
        assert own.demo_dir == str(root / "data")
    differing = [
        {flag for flag in words if not flag.startswith(("--output_dir", "--train_file"))}
        for words in trainings
    ]
    assert differing[0] == differing[1] == differing[2]
    assert "--max_steps=7" in differing[0]
    for words, arm in zip(trainings, compare_selection.RULES, strict=True):
        assert f"--train_file={root / f'{arm}_thoughts' / 'selected.jsonl'}" in words
        types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
        _, _, own, training = parse_arguments(types, arguments=words[1:])
        assert (own.data_root, training.max_steps, training.seed) == (str(root / "data"), 7, 3)
    for words in evaluations:
        parse_arguments((eval_embed.EvalScriptArguments, DataArguments), arguments=words[1:])
    run(list(compare_selection.plan(script, seed)))
    assert launched() == [], "finished runs are kept"
    # Another threshold: selected again, trained again, evaluated again, and nothing else.
    script.threshold = 0.1
    run(list(compare_selection.plan(script, seed)))
    assert [words[0] for words in launched()] == steps
    # Another judge: what it judged is forgotten, whatever else is kept.
    (root / "selected_thoughts" / "scores").mkdir()
    (root / "all" / FINISHED_FILE).unlink()
    run(list(compare_selection.plan(script, seed)))
    assert [words[0] for words in launched()] == [*steps[1:], *steps]
    assert not (root / "selected_thoughts" / "scores").exists()


def test_a_selection_without_its_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="'all' too: its model selects"):
        compare_selection.SelectionArguments(arms=["selected"])


def test_the_arms_of_a_new_domain_have_one_start_and_equal_steps_and_samples(
    tmp_path: Path,
) -> None:
    script = new_domain.NewDomainArguments(arms=["more_sft", "expert_iteration", "grpo:info_nce"])
    script.look = ["grey"]
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.002)))
    assert places(stages, tmp_path) == [
        ("sft_embed", "warm_start"),
        ("eval_embed", "warm_start/look_grey"),
        ("eval_embed", "warm_start/evaluation"),
        ("sft_embed", "more_sft"),
        ("eval_embed", "more_sft/evaluation"),
        ("expert_iteration", "expert_iteration"),
        ("eval_embed", "expert_iteration/evaluation"),
        ("grpo_embed", "grpo_info_nce"),
        ("eval_embed", "grpo_info_nce/evaluation"),
    ]
    warm, more, expert, grpo = (stages[place] for place in (0, 3, 5, 7))
    start, data = tmp_path / "warm_start", tmp_path / "data"
    *_, own, _ = parse_arguments(sft_embed.ARGUMENTS, arguments=warm.flags)
    assert own.is_demo()
    chosen, _, taught, sft = parse_arguments(sft_embed.ARGUMENTS, arguments=more.flags)
    assert (chosen.checkpoint, chosen.split, chosen.train_adapters) == (
        *(str(start), "train", "reasoning"),
    )
    assert all(record.query_cot for record in taught.load("train"))
    first, pairs, rounds = parse_arguments(expert_iteration.ARGUMENTS, arguments=expert.flags)
    second, same, rl = parse_arguments(grpo_embed.ARGUMENTS, arguments=grpo.flags)
    assert first.warm_start == second.warm_start == str(start)
    assert second.rewards == ["info_nce"]
    assert first.rewards == ["margin", "format"]
    assert rounds.reward_weights == [1.0, 0.5]
    assert rounds.num_negatives == rl.num_negatives
    assert pairs == same == replace(taught, train_file=pairs.train_file)
    assert pairs.rl_file == str(data / "new_domain_reworded_train.jsonl")
    assert all(record.query_cot is None for record in pairs.load("rl"))
    assert sft.max_steps == rounds.max_steps == rl.max_steps == 100
    assert sft.learning_rate == rounds.learning_rate == rl.learning_rate
    batches = [each.per_device_train_batch_size for each in (sft, rounds, rl)]
    assert batches == [128] * 3
    samples = rounds.num_rounds * rounds.prompts_per_round * rounds.num_generations
    assert samples == rl.max_steps * rl.per_device_train_batch_size
    for stage in (stages[2], stages[4], stages[8]):
        parsed, measured = parse_arguments(
            (eval_embed.EvalScriptArguments, DataArguments), arguments=stage.flags
        )
        assert (measured.test_file, measured.ood_file) == (pairs.test_file, pairs.ood_file)
        assert {"always", "sampled"} <= set(parsed.modes)


def test_an_arm_with_old_pairs_samples_them_too_and_keeps_its_budget(tmp_path: Path) -> None:
    script = new_domain.NewDomainArguments(arms=["grpo", "grpo+old"], old_share=0.5)
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    assert places(stages, tmp_path)[2::2] == [("grpo_embed", "grpo"), ("grpo_embed", "grpo_old")]
    _, alone, budget = parse_arguments(grpo_embed.ARGUMENTS, arguments=stages[2].flags)
    _, mixed, same = parse_arguments(grpo_embed.ARGUMENTS, arguments=stages[4].flags)
    assert (same.max_steps, same.seed) == (budget.max_steps, budget.seed)
    new, both, old = alone.load("rl"), mixed.load("rl"), alone.load("train")
    assert [record.id for record in both] == [
        record.id for record in [*new, *(old[place] for place in range(len(new)))]
    ]
    assert all(record.query_cot is None for record in both)
    assert all(record.query.images for record in both), "pictures are found from the new file"
    assert mixed.rl_file.endswith("new_domain_reworded_train_50_percent_old.jsonl")
    # What measures the arms is the same.
    assert stages[3].settings["test_file"] == stages[5].settings["test_file"]
    assert stages[3].settings["rl_file"] == stages[5].settings["rl_file"]


def test_more_old_pairs_than_there_are_are_refused(tmp_path: Path) -> None:
    script = new_domain.NewDomainArguments(arms=["grpo+old"], old_share=0.9)
    with pytest.raises(ValueError, match=r"a share of 0.9 needs .* old pairs.*lower old_share"):
        list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))


def test_arms_and_domains_that_do_not_exist_are_named_together() -> None:
    named = r"domain = 'moon'.*look = .*'magin'.*arms = .*'more_sft\+old'.*old_share = 1"
    arms = ["grpo:magin+old", "more_sft+old"]
    with pytest.raises(ValueError, match=named):
        new_domain.NewDomainArguments(domain="moon", look=["sun"], arms=arms, old_share=1.0)


def test_an_arm_of_a_new_domain_may_weigh_its_rewards(tmp_path: Path) -> None:
    arms = ["grpo:info_nce=0.02,format=0.5", "grpo:rank_gap+old"]
    script = new_domain.NewDomainArguments(arms=arms)
    stages = list(new_domain.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    named = {stage.target.name: stage.settings for stage in stages if stage.recipe == "grpo_embed"}
    weighted, mixed = named["grpo_info_nce_0_02_format_0_5"], named["grpo_rank_gap_old"]
    assert (weighted["rewards"], weighted["reward_weights"]) == (
        ["info_nce", "format"],
        [0.02, 0.5],
    )
    assert (mixed["rewards"], mixed["reward_weights"]) == (["rank_gap"], [1.0])
    for wrong, problem in {
        "grpo:magin=1": "reward = 'magin'",
        "grpo:margin=1,lenght=2": "reward = 'lenght'",
        "more_sft=1": r"arms = \['more_sft=1'\]",
        "expert_iteration:margin=1": r"arms = \['expert_iteration:margin=1'\]",
    }.items():
        with pytest.raises(ValueError, match=problem):
            new_domain.NewDomainArguments(arms=[wrong])


def test_few_thoughts_teach_to_write_and_all_pairs_to_read(tmp_path: Path) -> None:
    script = few_thoughts.FewThoughtsArguments(shares=[0.1, 1.0], read_steps=7)
    stages = list(few_thoughts.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    each = [
        ("sft_embed", "taught"),
        ("sft_embed", "before_rl"),
        ("eval_embed", "before_rl/evaluation"),
    ]
    each += [("grpo_embed", "rl"), ("sft_embed", "after_rl"), ("eval_embed", "after_rl/evaluation")]
    expected = [(recipe, f"{n}_percent/{place}") for n in (10, 100) for recipe, place in each]
    assert places(stages, tmp_path) == expected
    for share, first in ((0.1, 0), (1.0, 6)):
        taught, before, _, rl, after, _ = stages[first : first + 6]
        chosen, _, few, training = parse_arguments(sft_embed.ARGUMENTS, arguments=taught.flags)
        assert (chosen.checkpoint, chosen.train_adapters) == (None, "reasoning")
        assert training.max_steps == 560
        known = few.load("train")
        assert all(record.query_cot for record in known)
        start, _, pairs, reading = parse_arguments(sft_embed.ARGUMENTS, arguments=before.flags)
        assert (start.checkpoint, start.train_adapters) == (str(taught.target), "embedding")
        assert (reading.self_written_from, reading.self_written_share) == (0, 1)
        assert reading.think_without_cot
        assert reading.max_steps == 7
        everything = pairs.load("train")
        assert len(known) == round(share * len(everything))
        assert not any(record.query_cot for record in everything)
        policy, _, _ = parse_arguments(grpo_embed.ARGUMENTS, arguments=rl.flags)
        assert policy.warm_start == str(before.target)
        refit, _, same, last = parse_arguments(sft_embed.ARGUMENTS, arguments=after.flags)
        assert (refit.checkpoint, refit.train_adapters) == (str(rl.target), "embedding")
        assert same == pairs
        assert last.think_without_cot
        assert last.max_steps == 240
    # The demo's folder is still its own: other settings write it anew.
    other = seed_in(tmp_path, demo_scale=0.03)
    few_thoughts.with_thoughts(few_thoughts.pairs_of(other), 0.5)
    assert len(list(other.data.load("test"))) == 30
    alone = few_thoughts.FewThoughtsArguments(shares=[0.1], rounds=0)
    assert len(list(few_thoughts.plan(alone, seed_in(tmp_path, demo_scale=0.02)))) == 3


def test_rl_and_the_refit_take_turns(tmp_path: Path) -> None:
    script = few_thoughts.FewThoughtsArguments(shares=[0.1], rounds=2)
    stages = list(few_thoughts.plan(script, seed_in(tmp_path, demo_scale=0.02)))
    after, rl_2, after_2 = stages[4], stages[6], stages[7]
    assert rl_2.target.name == "rl_2"
    policy, _, _ = parse_arguments(grpo_embed.ARGUMENTS, arguments=rl_2.flags)
    assert policy.warm_start == str(after.target)
    assert after_2.target.name == "after_rl_2"
    refit, *_ = parse_arguments(sft_embed.ARGUMENTS, arguments=after_2.flags)
    assert refit.checkpoint == str(rl_2.target)
    assert stages[8].target == after_2.target / "evaluation"


def test_shares_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"shares = \[0, 0.5\].*read_steps = 0"):
        few_thoughts.FewThoughtsArguments(shares=[0, 0.5], read_steps=0)
