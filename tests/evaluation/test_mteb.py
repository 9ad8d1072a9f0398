"""mteb's encoder, our own tasks of mteb and runs by name, against independent references."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launching import TORCHRUN, launch
from made_records import picture, picture_records
from PIL import Image
from tiny_backbones import awaken

REASON = 'needs mteb: pip install -e ".[mteb]"'
mteb = pytest.importorskip("mteb", reason=REASON)

from mteb.types import PromptType  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

from twn_rl.evaluation import EvaluationSettings, evaluate  # noqa: E402
from twn_rl.evaluation.mteb import benchmark as runs  # noqa: E402
from twn_rl.evaluation.mteb.encoder import MtebEncoder, note_collapse  # noqa: E402
from twn_rl.evaluation.mteb.inputs import BLANK_TEXT, Reader, task_instruction  # noqa: E402
from twn_rl.evaluation.mteb.summary import flat_metrics  # noqa: E402
from twn_rl.evaluation.mteb.tasks import (  # noqa: E402
    EMOJI_SCENES,
    HIT,
    NDCG,
    own_metadata,
    tie_averse_scores,
)
from twn_rl.evaluation.results import REPORTED_SPLITS  # noqa: E402
from twn_rl.evaluation.usage import Account, Usage, UsageBook  # noqa: E402
from twn_rl.inference.embedder import ThinkingEmbedder  # noqa: E402
from twn_rl.launch.arguments import DataArguments, ModelArguments  # noqa: E402
from twn_rl.modeling.gate import Gate  # noqa: E402

# mteb and what it calls warn of their own data.
pytestmark = pytest.mark.filterwarnings("ignore:::(mteb|sklearn|scipy|datasets|dill|numpy).*")


@pytest.fixture
def embedder(make_model) -> ThinkingEmbedder:
    return ThinkingEmbedder(make_model("idefics3"))


def settings(folder: Path, **changes: Any) -> runs.BenchmarkSettings:
    values = {"benchmark": EMOJI_SCENES, "output_dir": folder, "show_progress_bar": False}
    return runs.BenchmarkSettings(**{**values, **changes})


@pytest.mark.slow
def test_mock_run_passes_with_texts_pictures_and_both(embedder) -> None:
    encoder = MtebEncoder(embedder, name="tiny", think="always", max_think_tokens=2)
    assert encoder.meta.modalities == ["text", "image", "video"]
    # The mock videos are drawn with a package of their own, which is not required.
    encoder.mteb_model_meta = encoder.meta.model_copy(update={"modalities": ["text", "image"]})
    results = mteb.mock_run(encoder)
    problems = {n: r for n, r in results.items() if r is not None and not hasattr(r, "scores")}
    assert not problems
    ran = {name for name, result in results.items() if result is not None}
    assert len(ran) > 30
    assert results.all_passed


def test_a_revision_names_weights_gates_and_settings(make_model) -> None:
    model = make_model("llama")
    first = MtebEncoder(ThinkingEmbedder(model), name="m", think="never").meta
    again = MtebEncoder(ThinkingEmbedder(make_model("llama")), name="m", think="never").meta
    assert first.revision == again.revision
    awaken(model, seed=7)
    other = MtebEncoder(ThinkingEmbedder(model), name="m", think="always").meta
    assert other.revision != first.revision
    assert first.experiment_name != other.experiment_name
    assert first.modalities == ["text"]


def test_scores_are_made_anew_when_others_would_think_or_compete(
    make_model, records, tmp_path
) -> None:
    model = make_model(max_think_tokens=2, thinking_decision="policy", policy_threshold=0.0)
    embedder = ThinkingEmbedder(model)
    rows = {record.id: record for record in records}

    def run() -> dict[str, Any]:
        asked = settings(tmp_path / "out", think="auto")
        return runs.run_benchmark(embedder, asked, name="m", splits={"test": [*rows.values()]})

    first = run()
    kept = run()
    assert kept == first
    model.config.policy_threshold = 1.0
    second = run()
    assert second["revision"] != first["revision"]
    tokens = [summary["tasks"][0]["queries"]["think_tokens"] for summary in (first, second)]
    assert tokens[0] > 0 == tokens[1]
    model.gates["query"], model.config.gate_threshold = Gate(model.hidden_size, 4), 0.5
    third = run()
    model.config.gate_threshold = 0.25
    assert len({summary["revision"] for summary in (first, second, third, run())}) == 4
    moved = {"metadata": {**rows["r0"].metadata, "pool": "other"}}
    rows["r0"] = replace(rows["r0"], **moved)
    revisions = [summary["tasks"][0]["dataset_revision"] for summary in (third, run())]
    assert revisions[0] != revisions[1], "the same items compete in other pools"


def test_thinking_by_gate_without_a_gate_is_refused_before_any_task(embedder) -> None:
    with pytest.raises(ValueError, match="no query gate"):
        MtebEncoder(embedder, name="tiny", think="auto")


def test_instructions_come_from_the_task_and_reach_documents_only_where_worded() -> None:
    def of(prompt: Any, side: PromptType | None) -> str | None:
        name = "MockInstructions"
        metadata = own_metadata(name, revision="1", main_score=NDCG, prompt=prompt)
        return task_instruction(metadata, side)

    query, document = PromptType.query, PromptType.document
    assert of("find it", query) == of("find it", None) == "find it"
    assert of("find it", document) is None
    assert of({"query": "ask"}, query) == "ask"
    assert of({"query": "ask"}, document) is None
    assert of({"query": "ask", "document": "tell"}, document) == "tell"
    assert of({"query": ""}, query) is None


def test_batches_become_items_with_pictures_frames_and_repaired_texts() -> None:
    usage, shown = Usage(), picture(0)
    reader = Reader("do", {"ref": shown}.__getitem__, usage)
    items = reader.items({"text": ["a \x00 b", " ", ""], "image": [shown, [], ["ref", shown]]})
    assert [item.text for item in items] == ["a   b", BLANK_TEXT, None]
    assert [len(item.images) for item in items] == [1, 0, 2]
    assert items[2].images == (shown, shown)
    assert {item.instruction for item in items} == {"do"}
    assert (usage.blank, usage.characters_removed) == (1, 1)
    frames = torch.randint(0, 255, (3, 3, 8, 6), dtype=torch.uint8)
    (item,) = reader.items({"video": [frames]})
    pictures = [frame for frame in item.video if isinstance(frame, Image.Image)]
    assert [frame.size for frame in pictures] == [(6, 8)] * 3
    assert np.array_equal(np.asarray(pictures[1]), frames[1].permute(1, 2, 0).numpy())
    with pytest.raises(ValueError, match=r"columns \['audio'\]"):
        reader.items({"audio": [0]})


def test_rows_come_back_in_the_order_received_whatever_the_batch(embedder) -> None:
    texts = [" ".join(["camel"] * (1 + (7 * i) % 11)) for i in range(23)]
    metadata = own_metadata("Order", revision="1", main_score=NDCG, prompt={"query": ""})
    common = {"task_metadata": metadata, "hf_split": "test", "hf_subset": "default"}
    encoder = MtebEncoder(embedder, name="tiny", think="never")
    for size in (2, 32):
        rows: Any = [{"text": text} for text in texts]
        loader = DataLoader(rows, batch_size=size)
        vectors = encoder.encode(loader, prompt_type=PromptType.query, **common)
        np.testing.assert_allclose(vectors, embedder.encode(texts), atol=1e-5)
    with pytest.raises(ValueError, match="precision = 'int8'"):
        encoder.encode(loader, precision="int8", **common)


def test_non_finite_vectors_never_reach_mteb(embedder, tmp_path, records) -> None:
    with torch.no_grad():
        for name, weight in embedder.model.peft_model.named_parameters():
            if "lora_B" in name:
                weight.fill_(float("nan"))
    with pytest.raises(runs.BenchmarkError, match="finite"):
        runs.run_benchmark(embedder, settings(tmp_path), name="nan", splits={"test": records})
    assert not list(tmp_path.glob("results/**/EmojiScenes.json"))


def test_collapsed_vectors_are_reported_with_figures(caplog) -> None:
    usage = Usage()
    note_collapse("Task test/default: query", np.ones((12, 4), np.float32), usage)
    assert "12 vectors have collapsed: mean pairwise cosine 1.0000" in caplog.text
    assert usage.mean_pairwise_cosine == pytest.approx(1.0)
    assert usage.effective_rank == pytest.approx(1.0)
    caplog.clear()
    note_collapse("Task", np.eye(12, dtype=np.float32), usage)
    assert not caplog.records


def test_scores_without_ties_are_those_of_trec_eval_and_ties_never_help() -> None:
    import pytrec_eval

    rng = np.random.default_rng(0)
    for _ in range(20):
        found = {f"d{i}": float(s) for i, s in enumerate(rng.permutation(40) / 40)}
        relevance = {f"d{i}": int(rng.integers(1, 4)) for i in rng.choice(45, 5, replace=False)}
        measures = {"ndcg_cut.10", "success.1"}
        theirs = pytrec_eval.RelevanceEvaluator({"q": relevance}, measures).evaluate({"q": found})
        hit, ndcg = tie_averse_scores(found, relevance)
        assert ndcg == pytest.approx(theirs["q"]["ndcg_cut_10"], abs=1e-6)
        assert hit == theirs["q"]["success_1"]
    constant = dict.fromkeys((f"d{i}" for i in range(40)), 0.5)
    evaluator = pytrec_eval.RelevanceEvaluator({"q": {"d9": 1}}, {"success.1"})
    assert evaluator.evaluate({"q": constant})["q"]["success_1"] == 1.0  # by name
    assert tie_averse_scores(constant, {"d9": 1}) == (0.0, 0.0)


@pytest.mark.parametrize("mode", ["never", "always"])
def test_the_scenes_score_as_in_our_own_evaluation(make_model, tmp_path, mode) -> None:
    model = make_model("idefics3")
    records = picture_records(tmp_path, 12)
    own = evaluate(model, records, EvaluationSettings(modes=(mode,), show_progress_bar=False))
    summary = runs.run_benchmark(
        ThinkingEmbedder(model),
        settings(tmp_path / "out", think=mode),
        name="tiny",
        splits={"test": records, "ood": records},
    )
    (row,) = summary["tasks"]
    assert row["metric"] == HIT
    expected = own.metrics[f"test/all/{mode}/hit@1"]
    near = pytest.approx(expected, abs=1e-6)  # mteb rounds
    assert row["scores"] == {s: {"default": near} for s in ("test", "ood")}
    assert summary["mean"] == near
    cost = row["queries"]
    assert (cost["inputs"], row["documents"]["think_rate"]) == (24, 0.0)
    assert cost["think_tokens"] == pytest.approx(own.metrics[f"test/all/{mode}/think_tokens"])
    assert cost["seconds"] > 0
    (path,) = (tmp_path / "out").glob("results/twn-rl__tiny/*/experiments/*/EmojiScenes.json")
    scores = json.loads(path.read_text(encoding="utf-8"))["scores"]["test"][0]
    hops = {key for key in scores if key.startswith(f"{HIT}_")}
    assert hops == {f"{HIT}_hop0", f"{HIT}_hop1", f"{HIT}_hop2"}
    for hop in ("hop0", "hop1", "hop2"):
        ours = own.metrics[f"test/{hop}/{mode}/hit@1"]
        assert scores[f"{HIT}_{hop}"] == pytest.approx(ours, abs=1e-6)


def test_a_finished_task_is_not_embedded_again_unless_data_or_settings_change(
    embedder, tmp_path, records, caplog
) -> None:
    def run(rows: Any, **changes: Any) -> dict[str, Any]:
        asked = settings(tmp_path, **changes)
        return runs.run_benchmark(embedder, asked, name="tiny", splits={"test": rows})

    calls, encode = [], embedder.encode
    embedder.encode = lambda inputs, **options: (
        calls.append(len(inputs)) or encode(inputs, **options)
    )
    first = run(records)
    embedded = sum(calls)
    assert run(records) == first
    assert sum(calls) == embedded > 0
    table = (tmp_path / runs.TABLE_FILE).read_text(encoding="utf-8")
    assert "| EmojiScenes | hit_at_1_ties_last |" in table
    with caplog.at_level(logging.WARNING):
        fewer = run(list(records)[:4])
    assert "its data have changed" in caplog.text
    assert fewer["tasks"][0]["queries"]["inputs"] == 4
    run(records, think="always", max_think_tokens=2)
    assert len(list(tmp_path.glob("results/**/EmojiScenes.json"))) == 2


def test_costs_of_an_unfinished_subset_are_dropped_and_those_of_finished_ones_kept(
    tmp_path,
) -> None:
    book = UsageBook(tmp_path)
    for subset in ("de", "fr"):
        book.note("T", Account("test", subset, "query"), Usage(inputs=3, thinking=1))
        book.note("T", Account("test", subset, "query"), Usage(inputs=2, effective_rank=4.0))
    again = UsageBook(tmp_path)
    again.resume("T", {("test", "de")})
    assert again.total(["T"], "query") == Usage(inputs=5, thinking=1, effective_rank=4.0)
    assert again.total(["T"], "document").rates() == {}


def test_unknown_names_are_refused_with_those_like_them(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"'ViDoRe\(v9\)'.*such as ViDoRe\(v"):
        runs.find_tasks(settings(tmp_path, benchmark="ViDoRe(v9)"))
    wrong = ["Vidore2ESGReportRetrieval"]
    with pytest.raises(ValueError, match=r"such as .*Vidore2ESGReportsRetrieval"):
        runs.find_tasks(settings(tmp_path, benchmark="ViDoRe(v2)", tasks=wrong))
    with pytest.raises(ValueError, match="without records"):
        runs.find_tasks(settings(tmp_path))


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("BEIR", 15),
        ("NanoBEIR", 13),
        ("BRIGHT", 1),
        ("ViDoRe(v1)", 10),
        ("ViDoRe(v2)", 4),
        ("ViDoRe(v3)", 10),
        ("MIEB(eng)", 125),
        ("MVEB(v1)", 23),
    ],
)
def test_the_fields_benchmarks_are_found_by_name(tmp_path, name, count) -> None:
    assert len(runs.find_tasks(settings(tmp_path, benchmark=name))) == count


def test_tasks_of_other_modalities_are_left_out_and_named(make_model, tmp_path) -> None:
    embedder = ThinkingEmbedder(make_model("llama"))
    asked = settings(tmp_path, benchmark="ViDoRe(v2)")
    summary = runs.run_benchmark(embedder, asked, name="text")
    assert len(summary["skipped"]) == 4
    assert set(summary["skipped"].values()) == {"needs image"}
    assert summary["mean"] is None


def test_a_data_set_that_is_not_there_fails_its_task_alone(
    make_model, tmp_path, monkeypatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'mteb/nfcorpus' on the Hub (offline mode)")

    import mteb.abstasks.retrieval as retrieval

    monkeypatch.setattr(retrieval, "RetrievalDatasetLoader", refuse)
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    asked = settings(tmp_path, benchmark="BEIR", tasks=["NFCorpus"])
    with pytest.raises(runs.BenchmarkError, match=r"NFCorpus: Couldn't reach.*local cache"):
        runs.run_benchmark(ThinkingEmbedder(make_model("llama")), asked, name="text")
    summary = json.loads((tmp_path / runs.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert list(summary["failed"]) == ["NFCorpus"]


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_share_a_benchmark_and_score_as_one(tmp_path) -> None:
    path = tmp_path / "model"
    arguments = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=3)
    arguments.build(0).save_pretrained(path)
    flags = [f"--model={path}", "--demo_scale=0.02", "--demo_dir=data", "--output_dir=out"]
    flags += ["--benchmark=EmojiScenes", "--think=always", "--batch_size=2"]
    flags += ["--report_to=tensorboard"]
    done = launch("eval_embed.py", flags, config=TORCHRUN, cwd=tmp_path)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    written = (tmp_path / "out" / EMOJI_SCENES / runs.SUMMARY_FILE).read_text(encoding="utf-8")
    two, tracked = json.loads(written), json.loads(written)
    data = DataArguments(demo_scale=0.02, demo_dir=str(tmp_path / "data"))
    demo_splits: list[Any] = [name for name in REPORTED_SPLITS if name != "ood"]
    one = runs.run_benchmark(
        ThinkingEmbedder.from_pretrained(path),
        settings(tmp_path / "one", think="always", batch_size=2),
        name="model",
        splits={name: data.load(name) for name in demo_splits},
    )
    timed = {"seconds": 0.0}
    for summary in (one, two):
        for row in summary["tasks"]:
            row["queries"] |= timed
            row["documents"] |= timed
    assert two == one
    names = ["results/**/EmojiScenes.json", "costs/**/EmojiScenes.json"]
    assert [len(list((tmp_path / "out").glob(f"**/{name}"))) for name in names] == [1, 1]
    assert scalars(tmp_path / "out") == {
        f"evaluation/{name}": pytest.approx(value) for name, value in flat_metrics(tracked).items()
    }


def scalars(folder: Path) -> dict[str, float]:
    """Return what TensorBoard's one file in a folder holds."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (file,) = folder.rglob("events.out.*")
    reader = events.EventAccumulator(str(file))
    reader.Reload()
    return {name: reader.Scalars(name)[0].value for name in reader.Tags()["scalars"]}
