"""MMEB-V2 from folders to score files: resume, bad tasks, costs, two processes."""

import json
import shutil
from pathlib import Path

import mmeb_files as files
import numpy as np
import pytest
import torch
from launching import TORCHRUN, launch
from tiny_backbones import awaken, make_idefics3

from twn_rl.evaluation.mmeb_v2.leaderboard import MixedScoresError
from twn_rl.evaluation.mmeb_v2.run_tasks import run_tasks
from twn_rl.evaluation.mmeb_v2.sweep import sweep_thresholds
from twn_rl.evaluation.mmeb_v2.task_files import BenchmarkFolder
from twn_rl.evaluation.mmeb_v2.tasks import load_tasks
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.vector_meta import read_meta
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.model import DualLoraModel

TASKS = load_tasks()
NEVER = EncodeSettings(think="never", shard_size=16, batch_size=16)
SHARDS = EncodeSettings(think="never", shard_size=3)


@pytest.fixture(scope="module")
def embedder() -> ThinkingEmbedder:
    """A random tiny model with a random gate."""
    config = TwnConfig(
        reasoning_lora=LoraSettings(r=2, alpha=4),
        embedding_lora=LoraSettings(r=3, alpha=6),
        num_readout_tokens=3,
        max_think_tokens=4,
        gate_threshold=0.5,
    )
    model = DualLoraModel.from_backbone(make_idefics3(), config, seed=0)
    awaken(model)
    torch.manual_seed(0)
    gate = Gate(model.hidden_size)
    with torch.no_grad():
        for parameter in gate.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.gates["query"] = gate
    return ThinkingEmbedder(model.eval())


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mmeb")
    files.one_of_each_family(folder)
    return folder


def run(embedder, root: Path, output: Path, names, settings=NEVER, **options):
    tasks = [TASKS[name] for name in names]
    folder = BenchmarkFolder(root, root)
    return run_tasks(embedder, tasks, folder, output, settings, show_progress_bar=False, **options)


def score_of(output: Path, name: str) -> dict:
    path = output / TASKS[name].group / f"{name}_score.json"
    return json.loads(path.read_text(encoding="utf-8"))


def vectors_of(folder: Path, side: str) -> np.ndarray:
    return np.concatenate([np.load(path) for path in sorted(folder.glob(f"{side}-*.npy"))])


def test_every_family_is_scored_from_its_own_vectors(embedder, root, tmp_path) -> None:
    names = files.one_of_each_family(root)
    report = run(embedder, root, tmp_path, names)
    assert report.failed == {}
    assert report.measured == names
    for name in names:
        score, task = score_of(tmp_path, name), TASKS[name]
        assert score["label_set"] == "page-fixed"
        assert (score["main_metric"], score["think_rate"]) == (task.metric, 0.0)
        assert 0.0 <= score[task.metric] <= 1.0
        cost = json.loads((tmp_path / task.group / f"{name}_cost.json").read_text())
        assert cost["seconds_per_query"] > 0
        # The official formula over the stored vectors; what is tied with a right one comes first.
        folder = tmp_path / "vectors" / task.group / name
        queries, targets = vectors_of(folder, "query"), vectors_of(folder, "document")
        lines = (tmp_path / task.group / f"{name}_pred.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        assert len(rows) == len(queries) == score["num_pred"]
        assert score["num_targets"] == len(targets)
        assert score[task.metric] == pytest.approx(np.mean([row[task.metric] for row in rows]))
        if task.metric == "hit@1":
            hits = [row["prediction"][0] in row["label"] for row in rows]
            assert score["hit@1"] == pytest.approx(np.mean(hits), abs=1e-6)


def test_a_second_run_keeps_scores_and_makes_only_what_is_missing(embedder, root, tmp_path) -> None:
    names = ["MSVD", "OK-VQA"]
    run(embedder, root, tmp_path, names, SHARDS)
    before = score_of(tmp_path, "MSVD")
    vectors = tmp_path / "vectors/video/MSVD"
    old = (vectors / "document-00000.npy").stat().st_mtime_ns
    lost = vectors / "document-00001.npy"
    content = np.load(lost)
    for path in vectors.glob("document-00001.*"):
        path.unlink()
    (tmp_path / "video/MSVD_score.json").unlink()  # killed after the first part
    report = run(embedder, root, tmp_path, names, SHARDS)
    assert (report.measured, report.kept) == (["MSVD"], ["OK-VQA"])
    assert score_of(tmp_path, "MSVD") == before
    assert (vectors / "document-00000.npy").stat().st_mtime_ns == old
    np.testing.assert_array_equal(np.load(lost), content)
    with pytest.raises(MixedScoresError, match="think = 'always'"):
        run(embedder, root, tmp_path, ["MSVD"], EncodeSettings(think="always"))
    with pytest.raises(MixedScoresError, match="OK-VQA"):
        run(
            embedder,
            root,
            tmp_path,
            ["CIRR"],
            EncodeSettings(think="always"),
            averaged_with=[TASKS["OK-VQA"]],
        )


def test_a_bad_task_costs_its_own_score_only(embedder, tmp_path) -> None:
    root = tmp_path / "data"
    files.text_task(root, "OK-VQA")
    files.msvd(root)
    folder = files.documents(root, "vidore/docvqa_test_subsampled_beir")
    broken = files.png(1)[:60]  # whole enough to be opened, not to be decoded
    rows = [{"corpus-id": i, "image": {"bytes": files.png(i), "path": None}} for i in range(1, 5)]
    rows[2]["image"]["bytes"] = broken
    files.write_table(folder / "corpus/test-00000-of-00001.parquet", rows)
    shutil.rmtree(root / "video-tasks/frames/video_ret/MSVD/m2")
    report = run(embedder, root, tmp_path / "out", ["ViDoRe_docvqa", "MSVD", "OK-VQA"])
    assert report.measured == ["OK-VQA"]
    assert list(report.failed) == ["ViDoRe_docvqa", "MSVD"]
    assert "test-00000-of-00001.parquet, row 3" in report.failed["ViDoRe_docvqa"]
    assert "truncated" in report.failed["ViDoRe_docvqa"]
    assert "row 3" in report.failed["MSVD"]
    assert "FAILED MSVD" in str(report)
    assert score_of(tmp_path / "out", "OK-VQA")["num_pred"] == 4


def test_a_model_that_gives_nan_has_no_score(embedder, root, tmp_path) -> None:
    weight = next(
        p for n, p in embedder.model.peft_model.named_parameters() if "lora_B" in n and "embed" in n
    )
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(float("nan"))
    try:
        report = run(embedder, root, tmp_path, ["OK-VQA"])
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    assert "NaN or infinity" in report.failed["OK-VQA"]
    assert not (tmp_path / "image/OK-VQA_score.json").exists()


def test_the_gate_thinks_where_asked_and_costs_stand_beside_the_score(embedder, root, tmp_path):
    settings = EncodeSettings(think="auto", think_threshold=0.0, shard_size=8)
    run(embedder, root, tmp_path, ["MSVD"], settings)
    score = score_of(tmp_path, "MSVD")
    assert score["think_rate"] == 1.0
    assert score["think_tokens"] > 0
    row = json.loads((tmp_path / "video/MSVD_pred.jsonl").read_text().splitlines()[0])
    assert row["gate_probability"] > 0
    meta = read_meta(tmp_path / "vectors/video/MSVD/document-00000.npy")
    assert meta is not None
    assert meta["plan"]["settings"]["think"] == "never", "targets never think"


def test_without_a_gate_auto_is_refused_before_anything_is_embedded(embedder, root, tmp_path):
    gate = embedder.model.gates["query"]
    del embedder.model.gates["query"]
    try:
        with pytest.raises(ValueError, match="no query gate"):
            run(embedder, root, tmp_path, ["MSVD"], EncodeSettings(think="auto"))
    finally:
        embedder.model.gates["query"] = gate
    assert not (tmp_path / "vectors").exists()


def test_the_sweep_goes_from_never_to_always_and_is_drawn(embedder, root, tmp_path) -> None:
    tasks = [TASKS["MSVD"], TASKS["OK-VQA"]]
    folder = BenchmarkFolder(root, root)
    failed = sweep_thresholds(embedder, tasks, folder, tmp_path, NEVER, show_progress_bar=False)
    assert failed == {}
    assert (tmp_path / "threshold_sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "threshold_sweep.csv").read_text(encoding="utf-8").splitlines()
    names = lines[0].split(",")
    rows = [dict(zip(names, line.split(","), strict=True)) for line in lines[1:]]
    run(embedder, root, tmp_path / "never", ["MSVD"])
    never = next(r for r in rows if (r["task"], r["name"]) == ("MSVD", "never"))
    assert float(never["quality"]) == pytest.approx(score_of(tmp_path / "never", "MSVD")["hit@1"])
    assert float(never["think_tokens"]) == 0
    always = next(r for r in rows if (r["task"], r["name"]) == ("OK-VQA", "always"))
    assert float(always["think_rate"]) == 1.0


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_leave_the_score_files_of_one(embedder, tmp_path: Path) -> None:
    root, model = tmp_path / "data", tmp_path / "model"
    files.text_task(root, "OK-VQA", 5)
    files.msvd(root)
    files.documents(root, "vidore/docvqa_test_subsampled_beir")
    files.nextqa(root)
    (root / "VLM2Vec/NExTQA/MC/test-00000-of-00001.parquet").write_bytes(b"PAR1")
    from twn_rl.launch.arguments import ModelArguments

    built = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=6).build(0)
    built.save_pretrained(model)
    scores = {}
    for name, config in (("one", None), ("two", TORCHRUN)):
        flags = ["--benchmark", "mmeb_v2", f"--model={model}", f"--data_root={root}"]
        flags += ["--tasks", "OK-VQA", "NExTQA", "MSVD", "ViDoRe_docvqa", "--think=always"]
        flags += ["--shard_size=2", f"--output_dir={tmp_path / name}"]
        done = launch("eval_embed.py", flags, config=config, cwd=tmp_path)
        assert done.returncode != 0, "one task has bad data"
        assert "FAILED NExTQA" in done.stdout, (done.stdout + done.stderr)[-4000:]
        assert "no readable Parquet" in done.stdout
        found = sorted((tmp_path / name).glob("*/*_score.json"))
        assert [path.name[: -len("_score.json")] for path in found] == [
            *("OK-VQA", "MSVD", "ViDoRe_docvqa"),
        ]
        scores[name] = [path.read_bytes() for path in found]
        summary = json.loads((tmp_path / name / "summary.json").read_text(encoding="utf-8"))
        assert summary["num_measured"] == 3
        assert summary["overall"] is None
    assert scores["one"] == scores["two"]
