"""The recipe of latent thoughts under a real launch: one and two processes, K = 0, evaluation."""

import json
from pathlib import Path

import pytest
import torch
from launching import TORCHRUN, launch, skip_without_compiler

from twn_rl.data.record_files import load_records
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.modeling.adapters import EMBEDDING_ADAPTER, adapter_parameters
from twn_rl.modeling.model import DualLoraModel

pytestmark = [pytest.mark.slow, pytest.mark.distributed]
DATA = ["--demo_scale=0.01", "--demo_dir=data"]
FLAGS = {
    "max_steps": 2,
    "warm_up_share": 0.5,
    "logging_steps": 1,
    "warmup_steps": 0,
    "output_dir": "latent",
    "latent_bottleneck": "true",
    "num_reason_tokens": 2,
}


def run(folder: Path, config: str | None, processes: int, **flags: object) -> list[dict]:
    """Train for two steps and return the lines of the metrics file."""
    folder.mkdir(exist_ok=True)
    settings = {**FLAGS, "per_device_train_batch_size": 8 // processes, **flags}
    words = [*DATA, *(f"--{name}={value}" for name, value in settings.items())]
    done = launch("latent_embed.py", words, config=config, cwd=folder)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    lines = (folder / "latent" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


Run = tuple[Path, list[dict]]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return the folder of a run on one process, and the lines of its metrics file."""
    folder = tmp_path_factory.mktemp("alone")
    return folder, run(folder, None, 1)


def test_two_processes_train_like_one_and_the_model_serves_and_evaluates(
    alone: Run, tmp_path: Path
) -> None:
    folder, one = alone
    two = run(tmp_path / "two", TORCHRUN, 2)
    for name in ("loss", "loss_contrastive", "loss_reconstruction"):
        wanted = [row[name] for row in one if name in row]
        assert len(wanted) == 2
        assert [row[name] for row in two if name in row] == pytest.approx(wanted, rel=2e-3), name
    check = json.loads((folder / "latent/reconstruction.json").read_text(encoding="utf-8"))
    assert {"reconstruction_own", "reconstruction_shuffled"} <= set(check)
    assert one[-1]["reconstruction_own"] == check["reconstruction_own"]
    embedder = ThinkingEmbedder.from_pretrained(tmp_path / "two/latent")
    records = load_records(tmp_path / "two/data/test.jsonl")
    vectors = embedder.encode_query([record.query for record in records], convert_to_tensor=True)
    assert torch.isfinite(vectors).all()

    done = launch(
        "eval_embed.py",
        ["--model=latent", "--splits=test", *DATA],
        config=None,
        cwd=folder,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    measured = folder / "latent/evaluation"
    metrics = json.loads((measured / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["test/all/latent/think_tokens"] == 0
    assert "test/all/always/hit@1" not in metrics
    assert "latent thoughts" in (measured / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("config", ["zero2_cpu.yaml", "zero3_cpu.yaml"])
def test_sharded_training_is_that_of_one_process(alone: Run, config: str, tmp_path: Path) -> None:
    skip_without_compiler(config)
    single, one = alone
    two = run(tmp_path / "two", config, 2)
    for name in ("loss", "loss_contrastive", "loss_reconstruction", "reconstruction_own"):
        wanted = [row[name] for row in one if name in row]
        assert [row[name] for row in two if name in row] == pytest.approx(wanted, rel=2e-3), name
    weights = [
        adapter_parameters(DualLoraModel.from_pretrained(folder).peft_model, EMBEDDING_ADAPTER)
        for folder in (single / "latent", tmp_path / "two/latent")
    ]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=2e-3, rtol=2e-2)


def test_no_reason_tokens_end_the_recipe_before_anything_is_read(tmp_path: Path) -> None:
    flags = ["--num_reason_tokens=0", "--demo_dir=data", "--output_dir=latent"]
    done = launch("latent_embed.py", flags, config=None, cwd=tmp_path)
    assert done.returncode != 0
    assert "num_reason_tokens = 0; expected K >= 1" in done.stderr
    assert not (tmp_path / "data").exists()
    baseline = run(tmp_path / "direct", None, 1, direct_only="true", max_steps=1)
    assert "loss_contrastive" in baseline[0]
    assert "loss_reconstruction" not in baseline[0]
    assert not (tmp_path / "direct/latent/reconstruction.json").exists()
