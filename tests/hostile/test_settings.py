"""Configurations of runs and the JSON of model folders: every wrong value named, or taken as is."""

import json
import os
import random
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_backbones import BACKBONES, awaken

from hostile.judging import attempt, judge
from hostile.table import Tally
from hostile.test_inputs import QUICK_AND_ALL
from hostile.texts import damaged, hostile_json, hostile_values, repeats_a_key
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.parsing import RECIPES, parse_arguments
from twn_rl.modeling.backbone import Backbone
from twn_rl.modeling.config import CONFIG_FILE, LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.sft import SftConfig

COUNTS = {
    "configs": {"quick": 40, "all": 160},
    "model folders": {"quick": 10, "all": 70},
}
TYPES = (ModelArguments, DataArguments, SftConfig)
KEYS = (
    "num_readout_tokens",
    "num_reason_tokens",
    "reasoning_rank",
    "embedding_rank",
    "lora_dropout",
    "max_think_tokens",
    "max_length",
    "max_image_pixels",
    "interface",
    "latent_bottleneck",
    "on_bad_record",
    "demo_scale",
    "learning_rate",
    "max_steps",
    "per_device_train_batch_size",
    "temperature",
    "contrastive_weight",
    "num_hard_negatives",
    "train_file",
    "system_prompt",
)


def hostile_config(case: int, key: str, value: Any, die: random.Random, whole: str) -> bytes:
    """Return the bytes of a configuration that is hostile in one way."""
    ways = {
        0: f"{key}: 1\n{key}: 2\n",
        1: f"{key}: &a [*a]\n" if die.random() < 0.5 else f"a: &a [x]\n{key}: *a\n",
        2: f"{key}: {'[' * 4000}{']' * 4000}\n",
        3: f"{key}_: 1\n",
        4: f"{key}: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    }
    if case % 4 == 3:
        return ways[case // 4 % len(ways)].encode()
    if case % 8 == 6:
        return damaged(whole.encode(), die)
    return yaml.safe_dump({key: value}, allow_unicode=True).encode()


@pytest.mark.parametrize("size", QUICK_AND_ALL)
@pytest.mark.filterwarnings("ignore")  # of settings that are allowed and unwise
def test_configs(tally: Tally, tmp_path: Path, size: str) -> None:
    whole = (RECIPES / "configs" / "demo_sft.yaml").read_text()
    die, count = random.Random(31), COUNTS["configs"][size]
    before = dict(os.environ)
    for case, value in enumerate(hostile_values(31, count)):
        key = KEYS[case % len(KEYS)]
        path = tmp_path / f"config{case}.yaml"
        path.write_bytes(hostile_config(case, key, value, die, whole))
        flags = ["--config", str(path), "--output_dir", str(tmp_path), "--use_cpu"]
        if case % 16 == 15:
            path.unlink()
            os.mkfifo(path)

        def build(flags: list[str] = flags) -> Any:
            model, data, training = parse_arguments(TYPES, arguments=flags)
            return model.config(), data, training

        def complaint(parsed: Any, case: int = case, key: str = key, value: Any = value) -> str:
            if case % 4 == 3:
                return "one meaning of several was taken"
            if case % 8 == 6:
                return ""
            config, data, training = parsed
            for owner in (data, training):
                taken = getattr(owner, key, value)
                # A text is parsed as on the command line; anything else is taken as it is.
                if not isinstance(value, str) and taken != value:
                    return f"{key} = {taken!r}"
            return "" if config.num_readout_tokens <= 1024 else "far too many read-outs"

        names = [key, path.name, *re_fields(case)]
        shown = f"{case}: {key} = {value!a:.40}"
        tally.add("configs", shown, *judge(attempt(build), names, complaint))
        os.environ.clear()
        os.environ.update(before)
    assert not Path("/tmp/owned").exists()
    tally.check(at_least=count)


def re_fields(case: int) -> tuple[str, ...]:
    """Return other fields that a damaged configuration may name: its own, cut or misspelt."""
    return ("configuration", "LoraSettings", "TwnConfig") if case % 8 == 6 else ("LoraSettings",)


@cache
def backbone() -> Backbone:
    return BACKBONES["llama"]()


@pytest.mark.parametrize("size", QUICK_AND_ALL)
def test_model_folders(tally: Tally, tmp_path: Path, size: str) -> None:
    lora = LoraSettings(r=2, alpha=4)
    config = TwnConfig(reasoning_lora=lora, embedding_lora=lora, num_readout_tokens=2)
    model = DualLoraModel.from_backbone(BACKBONES["llama"](), config)
    awaken(model)
    model.eval().save_pretrained(tmp_path / "whole")
    settings = json.loads((tmp_path / "whole" / CONFIG_FILE).read_text())
    die, count = random.Random(32), COUNTS["model folders"][size]
    for case, value in enumerate(hostile_values(32, count)):
        folder = tmp_path / f"model{case}"
        shutil.copytree(tmp_path / "whole", folder)
        path, key = folder / CONFIG_FILE, sorted(settings)[case % len(settings)]
        if case % 4 == 0:
            path.write_text(hostile_json(die, settings))
        elif case % 4 == 1:
            path.write_bytes(damaged(path.read_bytes(), die))
        elif case % 16 == 2:
            path.unlink()
            os.mkfifo(path)
        else:
            path.write_text(json.dumps(settings | {key: value}))
        outcome = attempt(
            lambda folder=folder: DualLoraModel.from_pretrained(
                folder, backbone=BACKBONES["llama"]()
            )
        )

        def complaint(loaded: DualLoraModel, path: Path = path) -> str:
            if repeats_a_key(path.read_text()):
                return "one of two values of a key was taken"
            kept = (loaded.config.num_readout_tokens, loaded.config.reasoning_lora.r)
            return "" if kept == (2, 2) else f"read-outs and rank = {kept}"

        shown = f"{case}: {key} = {value!a:.40}"
        tally.add(
            "model folders", shown, *judge(outcome, [folder.name, key, "LoraSettings."], complaint)
        )
        shutil.rmtree(folder)
    tally.check(at_least=count)
