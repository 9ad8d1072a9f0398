"""MRMR from files in the official layout: reading, scores against a reference, bad files."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_records import picture

mteb = pytest.importorskip("mteb", reason='needs mteb: pip install -e ".[mteb]"')

from twn_rl.data.record import Item  # noqa: E402
from twn_rl.evaluation.mteb import benchmark as runs  # noqa: E402
from twn_rl.evaluation.mteb.mrmr import INSTRUCTIONS, mrmr_tasks, read_set, task_name  # noqa: E402
from twn_rl.evaluation.mteb.tasks import HIT, NDCG  # noqa: E402
from twn_rl.inference.embedder import ThinkingEmbedder  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:::(mteb|sklearn|scipy|datasets|dill|numpy).*")

WORDS = ["camel", "pizza", "zebra", "tree", "left", "right", "above", "below"]
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
DOCUMENT_PICTURES = ["image", "image 1", "image 2", "vision"]


def cell(seed: int) -> dict[str, Any]:
    """Return a picture as `datasets` stores it: bytes, and perhaps a name."""
    buffer = io.BytesIO()
    picture(seed).save(buffer, format="PNG")
    return {"bytes": buffer.getvalue(), "path": None if seed % 2 else f"{seed}.png"}


def write(path: Path, rows: list[dict[str, Any]], pictures: list[str], **types: Any) -> None:
    """Write one shard as the hub's repositories hold it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = [*types, *pictures]
    columns = [
        pa.array([row.get(name) for row in rows], types.get(name, PICTURE)) for name in names
    ]
    # Small row groups: pictures of several are needed.
    pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path, row_group_size=3)


def write_set(folder: Path, name: str, seed: int, *, queries: int = 5, corpus: int = 14) -> None:
    """Write a set: texts, single pictures, interleaved ones; two shards of documents."""
    rng = np.random.default_rng(seed)
    is_negation, sep = name == "negation", "-" if name in ("traffic", "design") else "_"

    def text() -> str:
        return " ".join(rng.choice(WORDS, 4))

    def document(index: int) -> dict[str, Any]:
        row: dict[str, Any] = {"id": f"d{index}", "vision": cell(index)}
        kind = index % 3
        row["modality"] = ("text", "image", "image,text")[kind]
        row["text"] = (text(), None, f"{text()} <image 2> {text()} <image 1>")[kind]
        if kind:
            row["image"] = cell(100 * seed + index)
        if kind == 2:
            row |= {"image 1": cell(500 + index), "image 2": cell(600 + index)}
        return row

    documents = [document(index) for index in range(corpus)]
    asked: list[dict[str, Any]] = []
    relevant: list[dict[str, Any]] = []
    for index in range(queries):
        query = {"id": f"q{index}", "modality": "image,text", "text": f"<image> {text()}"}
        asked.append({**query, "image": cell(900 + index), "category": WORDS[index % 2]})
        chosen = [f"d{i}" for i in rng.choice(corpus, 1 if is_negation else 3, replace=False)]
        scores = rng.integers(1, 3, len(chosen))
        relevant += [
            {f"query{sep}id": f"q{index}", f"corpus{sep}id": d, "score": int(s)}
            for d, s in zip(chosen, scores, strict=True)
        ]
    if is_negation:
        documents = [
            {"id": f"q{q}_{c}", "text": text(), "modality": "text"}
            for q in range(queries)
            for c in range(1, 5)
        ]
        for index, row in enumerate(relevant):
            row[f"corpus{sep}id"] = f"q{index}_{1 + index % 4}"
    string = pa.string()
    kinds = {"id": string, "modality": string, "text": string}
    half = len(documents) // 2
    for shard, rows in enumerate((documents[:half], documents[half:])):
        path = folder / name / "corpus" / f"test-{shard:05d}-of-00002.parquet"
        write(path, rows, DOCUMENT_PICTURES, **kinds)
    single = "test-00000-of-00001.parquet"
    write(folder / name / "query" / single, asked, ["image"], **kinds, category=string)
    ids = {f"query{sep}id": string, f"corpus{sep}id": string, "score": pa.int32()}
    write(folder / name / "qrels" / single, relevant, [], **ids)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """All five sets."""
    for seed, name in enumerate(INSTRUCTIONS):
        write_set(tmp_path / "mrmr", name, seed)
    return tmp_path / "mrmr"


def rows_of(folder: Path, config: str) -> list[dict[str, Any]]:
    """Read a config in the plainest way."""
    shards = sorted((folder / config).glob("*.parquet"))
    return [row for path in shards for row in pq.read_table(path).to_pylist()]


def decoded(value: dict[str, Any]) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(value["bytes"])).convert("RGB")


def reference(folder: Path, embedder: ThinkingEmbedder) -> dict[str, float]:
    """Return hit@1 and nDCG@10 from the definition, by sorting similarities."""
    name = folder.name

    def items(config: str, instruction: str | None) -> list[Item]:
        made = []
        for row in rows_of(folder, config):
            numbered = [row[key] for key in ("image 1", "image 2") if row.get(key)]
            pictures = numbered or ([row["image"]] if row.get("image") else [])
            text = (row["text"] or "").replace("<image> ", "") or None
            made.append(Item(instruction, text, tuple(decoded(p) for p in pictures)))
        return made

    documents = embedder.encode(items("corpus", None), side="document", think="never")
    queries = embedder.encode(items("query", INSTRUCTIONS[name]), side="query", think="never")
    document_ids = [row["id"] for row in rows_of(folder, "corpus")]
    gains: dict[str, dict[str, int]] = {}
    for query, document, score in (tuple(row.values()) for row in rows_of(folder, "qrels")):
        gains.setdefault(query, {})[document] = score
    hits, ndcgs = [], []
    for row, vector in zip(rows_of(folder, "query"), queries, strict=True):
        order = [document_ids[i] for i in np.argsort(-(documents @ vector))]
        if name == "negation":
            order = [d for d in order if d.startswith(f"{row['id']}_")]
            assert len(order) == 4
        relevance = gains[row["id"]]
        discounts = 1 / np.log2(np.arange(2, 12))
        found = np.array([relevance.get(d, 0) for d in order[:10]])
        best = np.sort(list(relevance.values()))[::-1][:10]
        ndcgs.append(
            (found * discounts[: len(found)]).sum() / (best * discounts[: len(best)]).sum()
        )
        hits.append(order[0] in relevance)
    return {HIT: float(np.mean(hits)), NDCG: float(np.mean(ndcgs))}


def settings(folder: Path, root: Path | None, **changes: Any) -> runs.BenchmarkSettings:
    values = {"benchmark": "mrmr", "data_root": root, "show_progress_bar": False, "think": "never"}
    return runs.BenchmarkSettings(output_dir=folder, **{**values, **changes})


def test_all_sets_score_as_their_definition_says(make_model, root, tmp_path) -> None:
    embedder = ThinkingEmbedder(make_model("idefics3"))
    asked = settings(tmp_path / "out", root, batch_size=2)
    summary = runs.run_benchmark(embedder, asked, name="tiny")
    metrics = {row["task"]: (row["metric"], row["score"]) for row in summary["tasks"]}
    assert list(metrics) == [task_name(name) for name in INSTRUCTIONS]
    for name in INSTRUCTIONS:
        metric, score = metrics[task_name(name)]
        assert metric == (HIT if name == "negation" else NDCG)
        assert score == pytest.approx(reference(root / name, embedder)[metric], abs=1e-6)
    assert summary["mean"] == pytest.approx(np.mean([score for _, score in metrics.values()]))
    assert 0 < summary["mean"] < 1


def test_interleaved_pictures_come_in_their_order_and_texts_keep_their_names(root) -> None:
    data = read_set(root / "knowledge")
    kinds = [document.pictures for document in data.corpus[:3]]
    assert kinds[0] == ()
    assert kinds[1] == ("corpus:0:1:image",)
    assert kinds[2] == ("corpus:0:2:image 1", "corpus:0:2:image 2")
    assert "<image 2>" in data.corpus[2].text
    assert "<image>" not in data.queries[0].text
    assert set(data.groups.values()) == {"camel", "pizza"}
    (task,) = mrmr_tasks(root, [task_name("knowledge")])
    for document in data.corpus:
        for reference_ in document.pictures:
            _, shard, row, column = reference_.split(":")
            path = sorted((root / "knowledge" / "corpus").iterdir())[int(shard)]
            expected = decoded(pq.read_table(path).to_pylist()[int(row)][column])
            assert np.array_equal(np.asarray(task.open_picture(reference_)), np.asarray(expected))


def test_a_broken_picture_fails_its_set_alone_and_the_rest_is_not_run_again(
    make_model, root, tmp_path
) -> None:
    embedder, names = ThinkingEmbedder(make_model("idefics3")), ["design", "traffic"]
    asked = settings(tmp_path / "out", root, tasks=[task_name(name) for name in names])
    path = root / "traffic" / "query" / "test-00000-of-00001.parquet"
    whole, rows = path.read_bytes(), pq.read_table(path).to_pylist()
    rows[3]["image"]["bytes"] = rows[3]["image"]["bytes"][:60]
    string = pa.string()
    write(path, rows, ["image"], id=string, modality=string, text=string, category=string)
    with pytest.raises(runs.BenchmarkError, match=r"MRMRTraffic: .*00001.parquet row 3: image"):
        runs.run_benchmark(embedder, asked, name="tiny")
    summary = json.loads((tmp_path / "out" / runs.SUMMARY_FILE).read_text(encoding="utf-8"))
    assert [row["task"] for row in summary["tasks"]] == ["MRMRDesign"]
    assert summary["mean"] is None
    (kept,) = (tmp_path / "out").glob("results/**/MRMRDesign.json")
    before = kept.stat().st_mtime_ns
    path.write_bytes(whole)
    fixed = runs.run_benchmark(embedder, asked, name="tiny")
    assert [row["task"] for row in fixed["tasks"]] == ["MRMRDesign", "MRMRTraffic"]
    assert fixed["tasks"][0] == summary["tasks"][0]
    assert kept.stat().st_mtime_ns == before


def test_missing_files_are_named_before_anything_is_embedded(root, tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="data_root = None"):
        runs.find_tasks(settings(tmp_path, None))
    (root / "theorem" / "qrels" / "test-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match="no parquet files in theorem/qrels"):
        runs.find_tasks(settings(tmp_path, root))
    with pytest.raises(FileNotFoundError, match="knowledge/corpus"):
        runs.find_tasks(settings(tmp_path, tmp_path / "nowhere"))
    assert len(runs.find_tasks(settings(tmp_path, root, tasks=["MRMRDesign"]))) == 1
    with pytest.raises(ValueError, match="such as MRMRDesign"):
        runs.find_tasks(settings(tmp_path, root, tasks=["MRMRDesgin"]))


def test_bad_rows_are_named_with_file_and_row(root, caplog) -> None:
    single = "test-00000-of-00001.parquet"
    ids = {"query_id": pa.string(), "corpus_id": pa.string(), "score": pa.int32()}
    path = root / "knowledge" / "qrels" / single
    rows = pq.read_table(path).to_pylist()
    write(path, [row for row in rows if row["query_id"] != "q2"], [], **ids)
    assert [query.id for query in read_set(root / "knowledge").queries] == ["q0", "q1", "q3", "q4"]
    assert "first: row 2, id 'q2'" in caplog.text
    write(path, [*rows, {"query_id": "q0", "corpus_id": "gone", "score": 1}], [], **ids)
    with pytest.raises(ValueError, match=rf"{single} row 15: corpus-id = 'gone'"):
        read_set(root / "knowledge")
    write(path, [{**row, "score": 0} for row in rows], [], **ids)
    with pytest.raises(ValueError, match="judges nothing relevant"):
        read_set(root / "knowledge")
    path = root / "negation" / "qrels" / single
    rows = pq.read_table(path).to_pylist()
    write(path, [{**rows[0], "corpus_id": "q1_1"}, *rows[1:]], [], **ids)
    with pytest.raises(ValueError, match=r"'q0' has candidates .* without its relevant \['q1_1'\]"):
        read_set(root / "negation", has_candidates=True)
    path = root / "theorem" / "corpus" / "test-00001-of-00002.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001-of-00002.parquet cannot be read"):
        read_set(root / "theorem")
