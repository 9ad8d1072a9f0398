"""Rollouts of a real vLLM on a CPU, in the process and behind a server: whose policy they are of.

Skipped where vLLM is missing; `make test-vllm` runs it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

if find_spec("vllm") is None:
    pytest.skip("needs vLLM: run `make test-vllm`", allow_module_level=True)

import torch
from picture_rollouts import mixed_records, plain_logps
from safetensors import safe_open
from short_runs import SHORT_RUN, moved, weights
from vllm_models import make_vllm_model
from vllm_servers import running_server

from twn_rl.data.record_files import RecordSet, load_records, write_records
from twn_rl.modeling.adapters import REASONING_ADAPTER, adapter_parameters
from twn_rl.modeling.model import DualLoraModel
from twn_rl.training.adaptive import AdaptiveGRPOConfig, AdaptiveGRPOTrainer
from twn_rl.training.grpo import EmbedGRPOConfig, EmbedGRPOTrainer, freeze_scorer
from twn_rl.training.rollout_scorer import RolloutScorer

pytestmark = pytest.mark.filterwarnings("ignore")  # vLLM's own, and many
STEPS = 3
NEAR = 2e-4  # nats; float32, other kernels


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Return (name, model) -> address of its server, one a backbone."""
    folder, running = tmp_path_factory.mktemp("servers"), {}
    with ExitStack() as stack:

        def server_of(name: str, model: DualLoraModel) -> str:
            if name not in running:
                server = running_server(model, folder / f"{name}.log")
                running[name] = stack.enter_context(server)
            return running[name]

        yield server_of


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return where backbones are written, once for all tests and servers."""
    return tmp_path_factory.mktemp("backbones")


def variety(completions: list, *, completion_ids: list, **kwargs: Any) -> list[float | None]:
    """Differs between any two rollouts of a group that are not the same: every step must train."""
    return [sum(ids) % 31 / 31 for ids in completion_ids]


def make_records(folder: Path, *, has_pictures: bool) -> RecordSet:
    records = mixed_records(folder)
    if has_pictures:
        return records
    texts = [
        replace(record, query=replace(record.query, images=(), video=()), negatives=())
        for record in records
    ]
    write_records(folder / "texts.jsonl", texts)
    return load_records(folder / "texts.jsonl")


def make_trainer(
    model: DualLoraModel,
    records: RecordSet,
    folder: Path,
    trainer_class: type[EmbedGRPOTrainer] = EmbedGRPOTrainer,
    config_class: type[EmbedGRPOConfig] = EmbedGRPOConfig,
    **settings: Any,
) -> EmbedGRPOTrainer:
    freeze_scorer(model)
    settings = {
        "per_device_train_batch_size": 8,
        "num_generations": 2,
        "max_completion_length": 8,
        "max_steps": STEPS,
        "temperature": 1.0,
        "beta": 0.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_vllm": True,
        "vllm_max_model_length": 256,
        "vllm_server_timeout": 10.0,
        **SHORT_RUN,
        "learning_rate": 3e-2,
        **settings,
    }
    config = config_class(output_dir=str(folder / "run"), **settings)
    scorer = RolloutScorer(model, records, folder / "bank", num_negatives=3)
    return trainer_class(model, [variety], config, records, scorer)


class Watch:
    """What went to vLLM and came back, beside plain forwards of the policy as it was then."""

    def __init__(self, trainer: Any, records: RecordSet) -> None:
        self.trainer, self.records = trainer, records
        self.model: DualLoraModel = trainer.dual_model
        engine = trainer.vllm_generation.engine
        self.names: list[str] = []
        self.keys: list[list[str]] = []
        self.probes: list[tuple[Any, Any]] = []
        self.written: list[list[int]] = []
        self.rows: list[int] = []
        self.worst: list[float] = []
        collate = self.model.collate
        self.row_of = {
            tuple(collate([record.query])["input_ids"][0].tolist()): row
            for row, record in enumerate(records)
        }
        self._load, self._generate = engine.load, trainer._generate_single_turn
        engine.load, trainer._generate_single_turn = self.load, self.generate

    def load(self, name: str, folder: Path) -> None:
        self.names.append(name)
        with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
            self.keys.append(list(stored.keys()))
        self._load(name, folder)

    def generate(self, prompt_ids: list[list[int]], *rest: Any) -> Any:
        completions, logprobs = self._generate(prompt_ids, *rest)
        self.probes.append(self.trainer.vllm_generation._probed)
        for prompt, ids, found in zip(prompt_ids, completions, logprobs, strict=True):
            row = self.row_of[tuple(prompt)]
            expected = plain_logps(self.model, self.records, row, ids)
            self.worst.append((torch.tensor(found) - expected).abs().max().item())
            self.written.append(ids)
            self.rows.append(row)
        return completions, logprobs


def vectors(model: DualLoraModel, records: RecordSet) -> torch.Tensor:
    """Return vectors of all queries with a thought, by the scorer."""
    thoughts: list[Any] = ["<think> tree </think>"] * len(records)
    with torch.no_grad():
        return model.embed(model.collate([record.query for record in records], thoughts))


@pytest.mark.parametrize("mode", ["colocate", "server"])
@pytest.mark.parametrize("name", ["embedded", "qwen3", "qwen3_vl"])
def test_rollouts_are_of_the_trainers_policy_before_and_after_each_sync(
    name: str, mode: str, backbones: Path, servers: Any, tmp_path: Path
) -> None:
    model = make_vllm_model(name, backbones / name)
    records = make_records(tmp_path, has_pictures=name != "qwen3")
    settings: dict[str, Any] = {"vllm_mode": mode}
    if mode == "server":
        settings["vllm_server_base_url"] = servers(name, model)
    trainer = make_trainer(model, records, tmp_path, **settings)
    watch, before, scored = Watch(trainer, records), weights(model), vectors(model, records)
    trainer.train()

    # What is sampled has the trainer's log-probabilities, pictures or none.
    assert len(watch.worst) == STEPS * 8
    assert max(watch.worst) < NEAR
    queries = [records[row].query for row in set(watch.rows)]
    counts = {len(query.images) + len(query.video) for query in queries}
    assert counts == ({0} if name == "qwen3" else {0, 1, 2})
    forbidden = set(model.suppressed_token_ids)
    assert not [token for ids in watch.written for token in ids if token in forbidden]

    # Each sync has a name of its own, and the reasoning adapter alone.
    assert len(watch.names) == len(set(watch.names)) == STEPS
    own = adapter_parameters(model.peft_model, REASONING_ADAPTER)
    for keys in watch.keys:
        assert len(keys) == len(own)
        assert all(key.endswith(("lora_A.weight", "lora_B.weight")) for key in keys)
    assert not (tmp_path / "run" / ".vllm").exists()

    # vLLM's policy moved with the trainer's at each sync, and far beyond the noise.
    found = [torch.tensor(probe[1]) for probe in watch.probes]
    for previous, now in pairwise(found):
        assert (previous - now).abs().max() > 10 * NEAR
    assert max(trainer.vllm_generation.probe_differences) < NEAR

    # The scorer did not move by a bit, nor anything but the reasoning adapter.
    assert torch.equal(vectors(model, records), scored)
    assert moved(before, weights(model)) <= set(own)
    assert moved(before, weights(model))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert all(entry["sampling/sampling_logp_difference/max"] < NEAR for entry in log)


def test_in_bfloat16_rollouts_differ_by_its_noise_only(backbones: Path, tmp_path: Path) -> None:
    model = make_vllm_model("embedded", backbones / "embedded", dtype="bfloat16")
    records = make_records(tmp_path, has_pictures=True)
    trainer = make_trainer(model, records, tmp_path)
    watch, scored = Watch(trainer, records), vectors(model, records)
    trainer.train()
    assert len(watch.worst) == STEPS * 8
    assert sum(watch.worst) / len(watch.worst) < 0.1
    assert max(trainer.vllm_generation.probe_differences) < 0.1
    assert torch.equal(vectors(model, records), scored)


def test_at_another_temperature_rollouts_are_sampled_by_it(backbones: Path, tmp_path: Path) -> None:
    model = make_vllm_model("qwen3", backbones / "qwen3")
    records = make_records(tmp_path, has_pictures=False)
    trainer = make_trainer(model, records, tmp_path, temperature=0.5, max_steps=1)
    rollouts = trainer.vllm_generation
    rollouts.sync_weights()
    prompt = model.collate([records[0].query])["input_ids"]
    _, (ids,), (found,), _ = rollouts.generate([prompt[0].tolist()], None, 1)
    rollouts.close()
    with torch.no_grad():
        whole = torch.cat([prompt, torch.tensor([ids])], 1)
        logits = model.backbone.model(input_ids=whole).logits[0, prompt.shape[1] - 1 : -1] / 0.5
    logits[:, model.suppressed_token_ids] = float("-inf")
    expected = logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])
    torch.testing.assert_close(torch.tensor(found), expected, rtol=0, atol=NEAR)


def test_a_sync_that_does_not_arrive_ends_the_run(backbones: Path, tmp_path: Path) -> None:
    model = make_vllm_model("qwen3", backbones / "qwen3")
    records = make_records(tmp_path, has_pictures=False)
    trainer = make_trainer(model, records, tmp_path)
    engine: Any = trainer.vllm_generation.engine
    load, names = engine.load, []

    def load_once(name: str, folder: Path) -> None:
        names.append(name)
        if len(names) == 1:
            load(name, folder)

    engine.load = load_once
    with pytest.raises(RuntimeError, match="sync 2 of the policy to vLLM: vLLM's policy stayed"):
        trainer.train()


def test_a_backbone_that_reads_pictures_otherwise_ends_the_run(
    backbones: Path, tmp_path: Path
) -> None:
    model = make_vllm_model("qwen3_vl", backbones / "qwen3_vl")
    records = make_records(tmp_path, has_pictures=True)
    trainer = make_trainer(model, records, tmp_path)
    # As TRL does: picture tokens that are written out already.
    rollouts: Any = trainer.vllm_generation
    rollouts.name_prompts = lambda whole, short: None
    with pytest.raises(RuntimeError, match="vLLM read a prompt of"):
        trainer.train()


def test_a_server_of_other_log_probabilities_is_refused(
    backbones: Path, servers: Any, tmp_path: Path
) -> None:
    model = make_vllm_model("qwen3", backbones / "qwen3")
    records = make_records(tmp_path, has_pictures=False)
    address = {"vllm_mode": "server", "vllm_server_base_url": servers("qwen3", model)}
    trainer = make_trainer(model, records, tmp_path, temperature=0.5, **address)
    with pytest.raises(RuntimeError, match="expected processed_logprobs; start it by: VLLM_NO"):
        trainer.train()


def test_rollouts_that_were_put_into_another_mode_have_no_sampling_weights(
    backbones: Path, tmp_path: Path
) -> None:
    model = make_vllm_model("qwen3_vl", backbones / "qwen3_vl")
    records = make_records(tmp_path, has_pictures=True)
    trainer = make_trainer(
        model, records, tmp_path, AdaptiveGRPOTrainer, AdaptiveGRPOConfig, max_steps=2
    )
    inner, outputs = trainer._generate_and_score_completions, []

    def watch(inputs: Any) -> Any:
        outputs.append(inner(inputs))
        return outputs[-1]

    trainer._generate_and_score_completions = watch
    trainer.train()
    assert len(outputs) == 2
    for output in outputs:
        mask, pinned = output["completion_mask"].bool(), output["is_pinned"]
        assert pinned.any()
        sampled, own = output["sampling_per_token_logps"], output["old_per_token_logps"]
        assert sampled[pinned][mask[pinned]].isnan().all()
        kept = mask & ~sampled.isnan()
        if kept.any():
            assert (sampled - own)[kept].abs().max() < NEAR
