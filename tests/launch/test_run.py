"""Settings from YAML and flags, records by split, and what a run leaves behind."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import yaml

from twn_rl.data.record import Item, Record
from twn_rl.data.record_files import write_records
from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.launch.arguments import DataArguments, ModelArguments, Split
from twn_rl.launch.parsing import packaged, parse_arguments
from twn_rl.launch.run_folder import checkpoint_to_resume, save_run
from twn_rl.recipes import (
    adaptive_embed,
    expert_iteration,
    gate_embed,
    grpo_embed,
    latent_embed,
    sft_embed,
)
from twn_rl.recipes.experiments import ablate, compare_selection, few_thoughts, new_domain
from twn_rl.training.adaptive import AdaptiveGRPOConfig
from twn_rl.training.grpo import EmbedGRPOConfig
from twn_rl.training.latent import LatentConfig
from twn_rl.training.sft import SftConfig
from twn_rl.training.whole_checkpoints import seal

ROOT = Path(__file__).parents[2]
CONFIGS = sorted((ROOT / "recipes" / "configs").glob("*.yaml"))


def write_yaml(folder: Path, **values) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump({"output_dir": str(folder / "out"), **values}), encoding="utf-8")
    return path


def parse(types: Sequence[type], path: Path, *flags: str):
    return parse_arguments(types, arguments=["--config", str(path), *flags])


def test_flags_override_yaml_and_yaml_overrides_defaults(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, temperature=0.07, reasoning_rank=5, embedding_rank=6)
    model, training = parse((ModelArguments, SftConfig), path, "--reasoning_rank", "7")
    assert training.temperature == 0.07
    assert training.num_hard_negatives == SftConfig.num_hard_negatives
    assert (model.reasoning_rank, model.embedding_rank) == (7, 6)


def test_the_default_file_is_read_only_without_a_config(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, reasoning_rank=5)
    (model, _) = parse_arguments(
        (ModelArguments, SftConfig), arguments=["--embedding_rank", "9"], default_config=path
    )
    assert (model.reasoning_rank, model.embedding_rank) == (5, 9)
    (tmp_path / "other").mkdir()
    other = write_yaml(tmp_path / "other", embedding_rank=3)
    for flags in (["--config", str(other)], [f"--config={other}"]):
        (model, _) = parse_arguments(
            (ModelArguments, SftConfig), arguments=flags, default_config=path
        )
        assert (model.reasoning_rank, model.embedding_rank) == (32, 3)


def test_an_unknown_yaml_key_is_named(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, temprature=0.07)
    with pytest.raises(ValueError, match="temprature"):
        parse((ModelArguments, SftConfig), path)


def test_an_unknown_flag_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((ValueError, SystemExit)) as caught:
        parse((ModelArguments, SftConfig), write_yaml(tmp_path), "--temprature", "0.07")
    assert "temprature" in f"{caught.value} {capsys.readouterr().err}"


@pytest.mark.parametrize(
    ("config", "values", "names"),
    [
        (SftConfig, {"temperature": 0, "contrastive_from": 2}, ["temperature", "contrastive_from"]),
        (SftConfig, {"num_hard_negatives": -1}, ["num_hard_negatives"]),
        (EmbedGRPOConfig, {"num_negatives": 0}, ["num_negatives"]),
    ],
)
def test_values_that_cannot_work_are_named_together(
    config: type, values: dict, names: list[str], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="change these fields") as caught:
        config(output_dir=str(tmp_path), use_cpu=True, report_to=[], **values)
    assert all(name in str(caught.value) for name in names)


def test_all_settings_are_refused_together(tmp_path: Path) -> None:
    path = write_yaml(tmp_path, temperature=0, reasoning_rank=5)
    with pytest.raises(ValueError, match="SftConfig: temperature") as caught:
        parse((ModelArguments, ThresholdRule, SftConfig), path, "--think_rate", "30")
    assert "ThresholdRule: think_rate = 30.0" in str(caught.value)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_shipped_config_is_parsed_by_its_recipe(path: Path) -> None:
    if "sft" in path.name or "refit" in path.name:
        types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
        values = parse(types, path)
        values[1].config()
    elif "grpo" in path.name:
        types = (grpo_embed.GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
        values = parse(types, path)
    elif "adaptive" in path.name:
        types = (adaptive_embed.AdaptiveScriptArguments, DataArguments, AdaptiveGRPOConfig)
        values = parse(types, path)
    elif "gate" in path.name:
        values = parse((gate_embed.GateScriptArguments, ThresholdRule, DataArguments), path)
    elif "selection" in path.name:
        values = parse((compare_selection.SelectionArguments, DataArguments), path)
    elif "latent" in path.name:
        types = (latent_embed.LatentScriptArguments, ModelArguments, DataArguments, LatentConfig)
        values = parse(types, path)
        values[1].config()
    elif "expert_iteration" in path.name:
        values = parse(expert_iteration.ARGUMENTS, path)
    elif "new_domain" in path.name:
        values = parse((new_domain.NewDomainArguments, DataArguments), path)
        for name in ("sft_config", "grpo_config", "expert_config"):
            assert (ROOT / getattr(values[0], name)).is_file()
    elif "few_thoughts" in path.name:
        values = parse((few_thoughts.FewThoughtsArguments, DataArguments), path)
        for name in ("sft_config", "grpo_config", "refit_config"):
            assert (ROOT / getattr(values[0], name)).is_file()
    elif path.name in ("wordnet_smollm2.yaml", "wordnet_kinds.yaml"):
        values = parse((ablate.AblateArguments, DataArguments), path)
        for name in ("sft_config", "grpo_config", "gate_config"):
            assert (ROOT / getattr(values[0], name)).is_file()
    else:
        pytest.fail(f"{path.name} belongs to no recipe this test knows; add it here")
    held = {name: setting for value in values for name, setting in vars(value).items()}
    written = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(written) - {"base"} <= set(held)
    if "base" in written:  # what it does not say is what its base says
        base = yaml.safe_load((path.parent / written["base"]).read_text(encoding="utf-8"))
        names = ("warmup_steps", "max_examples", "backbone", "arms")
        name = next(name for name in names if name in base and name not in written)
        assert held[name] == base[name]
        assert all(held[name] == written[name] for name in ("output_dir", "model") & written.keys())


def test_a_file_may_rest_on_another_that_lies_beside_it(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("reasoning_rank: 5\nembedding_rank: 6\n", encoding="utf-8")
    path = write_yaml(tmp_path, base="base.yaml", embedding_rank=7)
    (model, _) = parse((ModelArguments, SftConfig), path, "--num_readout_tokens", "2")
    assert (model.reasoning_rank, model.embedding_rank, model.num_readout_tokens) == (5, 7, 2)
    path = write_yaml(tmp_path, base="absent.yaml")
    with pytest.raises(FileNotFoundError, match=r"absent\.yaml is no file"):
        parse((ModelArguments, SftConfig), path)


def test_model_arguments_become_a_model_config() -> None:
    config = ModelArguments(backbone="some/vlm", reasoning_rank=3, embedding_rank=5).config()
    assert config.backbone == "some/vlm"
    assert (config.reasoning_lora.r, config.reasoning_lora.alpha) == (3, 6)
    assert (config.embedding_lora.r, config.embedding_lora.alpha) == (5, 10)
    assert config.renderer.system_prompt is None
    assert ModelArguments(system_prompt="Be brief.").config().renderer.system_prompt == "Be brief."
    with pytest.raises(ValueError, match="interface = 'other'"):
        ModelArguments(interface="other").config()


def test_save_run_leaves_what_a_reader_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["recipe.py", "--temperature", "0.3"])
    training = SftConfig(
        output_dir=str(tmp_path), temperature=0.3, use_cpu=True, report_to=[], hub_token="secret"
    )
    folder = tmp_path / "deep" / "run"
    save_run(folder, ModelArguments(reasoning_rank=3), DataArguments(), training)
    text = (folder / "run.yaml").read_text(encoding="utf-8")
    resolved = yaml.safe_load(text)
    assert resolved["ModelArguments"]["reasoning_rank"] == 3
    assert resolved["DataArguments"] == dataclasses.asdict(DataArguments())
    assert resolved["SftConfig"]["temperature"] == 0.3
    assert "secret" not in text
    environment = json.loads((folder / "environment.json").read_text(encoding="utf-8"))
    assert environment["command"] == ["recipe.py", "--temperature", "0.3"]
    assert environment["packages"]["torch"]
    assert environment["num_processes"] == 1
    assert {"git_commit", "python"} <= set(environment)


def test_save_run_works_where_git_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    save_run(tmp_path / "run", DataArguments())
    environment = json.loads((tmp_path / "run" / "environment.json").read_text(encoding="utf-8"))
    assert environment["git_commit"] is None


def test_checkpoint_to_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for off in (None, "false", "None", ""):
        assert checkpoint_to_resume(tmp_path, off) is None
    assert checkpoint_to_resume(tmp_path / "absent", "true") is None
    assert "starting at step 0" in caplog.text
    for step in (9, 10):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "state").write_text("x", encoding="utf-8")
        seal(tmp_path / f"checkpoint-{step}")
    newest = str(tmp_path / "checkpoint-10")
    assert checkpoint_to_resume(tmp_path, "true") == newest
    assert checkpoint_to_resume(tmp_path, "last") == newest
    assert checkpoint_to_resume(tmp_path, newest) == newest
    with pytest.raises(FileNotFoundError, match=r"resume_from_checkpoint = .*checkpoint-11"):
        checkpoint_to_resume(tmp_path, str(tmp_path / "checkpoint-11"))


def test_resuming_is_spelt_the_same_as_a_flag_and_in_yaml(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint-2" / "state").write_text("x", encoding="utf-8")
    seal(tmp_path / "out" / "checkpoint-2")
    last = str(tmp_path / "out" / "checkpoint-2")
    (by_flag,) = parse((SftConfig,), write_yaml(tmp_path), "--resume_from_checkpoint", "true")
    assert checkpoint_to_resume(by_flag.output_dir, by_flag.resume_from_checkpoint) == last
    for value in (True, "true", last):
        (by_yaml,) = parse((SftConfig,), write_yaml(tmp_path, resume_from_checkpoint=value))
        assert checkpoint_to_resume(by_yaml.output_dir, by_yaml.resume_from_checkpoint) == last


def write_file(folder: Path, name: str) -> str:
    path = folder / name
    write_records(
        path, [Record(name, "test", Item(text="a query"), Item(text=f"target of {name}"))]
    )
    return str(path)


def test_given_files_are_loaded_by_split(tmp_path: Path) -> None:
    train, test = (write_file(tmp_path, name) for name in ("train.jsonl", "test.jsonl"))
    data = DataArguments(train_file=train, test_file=test)
    assert not data.is_demo()
    assert data.load("train")[0].id == "train.jsonl"
    assert data.load("rl")[0].id == "train.jsonl"  # falls back
    assert data.load("test")[0].id == "test.jsonl"
    assert data.has("test")
    assert not data.has("ood")
    assert not data.has("three_hops")
    with pytest.raises(ValueError, match="only the emoji scenes have"):
        data.load("three_hops")
    with pytest.raises(ValueError, match=r"validation_file = None.*--validation_file"):
        data.load("validation")


def test_what_has_promises_load_keeps(tmp_path: Path) -> None:
    data = DataArguments(train_file=write_file(tmp_path, "train.jsonl"))
    assert data.has("rl")
    assert len(data.load("rl")) == 1


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    data = DataArguments(train_file=str(tmp_path / "absent.jsonl"))
    with pytest.raises((ValueError, OSError), match=r"absent\.jsonl"):
        data.load("train")


@pytest.mark.parametrize("split", ["validation", "ood"])
def test_one_given_file_of_any_split_switches_the_demo_off(tmp_path: Path, split: Split) -> None:
    """Otherwise the given file would be ignored without a word."""
    data = DataArguments()
    setattr(data, f"{split}_file", write_file(tmp_path, f"{split}.jsonl"))
    assert not data.is_demo()
    assert len(data.load(split)) == 1


def test_without_files_the_demo_is_written_at_the_asked_scale(tmp_path: Path) -> None:
    data = DataArguments(demo_dir=str(tmp_path / "demo"), demo_scale=0.001, teacher_swap_rate=0.0)
    assert data.is_demo()
    assert data.has("three_hops")
    assert not data.has("ood")
    with pytest.raises(ValueError, match="called ood is unseen_pairs"):
        data.load("ood")
    records = data.load("validation")
    assert len(records) == 8
    assert "swap" not in {record.metadata["teacher_mistake"] for record in data.load("rl")}


def test_a_shipped_configuration_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    types = (grpo_embed.GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
    arguments = ["--config", "recipes/configs/demo_grpo.yaml"]
    script, _, training = parse_arguments(types, arguments=arguments)
    assert training.output_dir == "outputs/demo/grpo"
    assert Path(packaged(script.warm_start_config)).is_file()
    # One's own file comes first, and what is nowhere is asked for by its own name.
    own = tmp_path / "recipes" / "configs"
    own.mkdir(parents=True)
    (own / "demo_grpo.yaml").write_text("output_dir: mine\n", encoding="utf-8")
    assert parse_arguments(types, arguments=arguments)[2].output_dir == "mine"
    assert packaged("recipes/configs/absent.yaml") == "recipes/configs/absent.yaml"


def test_a_file_that_is_no_mapping_is_refused_and_one_may_set_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("[1, 2]\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.yaml holds list; expected a mapping"):
        parse((ModelArguments,), path)
    monkeypatch.setenv("TWN_RL_TEST", "")
    path.write_text("env: {TWN_RL_TEST: 7}\nreasoning_rank: 3\n", encoding="utf-8")
    (model,) = parse((ModelArguments,), path)
    assert (model.reasoning_rank, os.environ["TWN_RL_TEST"]) == (3, "7")
