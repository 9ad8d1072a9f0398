"""What the comparison of methods runs, and whose quality and cost it takes."""

import json
from pathlib import Path

import numpy as np
import pytest
from comparison_runs import places, seed_in
from safetensors.numpy import save_file

from twn_rl.launch.stage import FINISHED_FILE
from twn_rl.recipes.experiments import compare_methods


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
