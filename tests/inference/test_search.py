"""Search agrees with a naive loop: ties, blocks, failed rows, refusals; FAISS agrees with exact."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from twn_rl.cli import main
from twn_rl.inference.search import choose_backend, exact_block, search, top_k
from twn_rl.inference.vector_files import VectorWriter, open_vectors
from twn_rl.inference.vector_meta import VectorFileError


def naive_hits(queries, index, k, usable):
    """Rank row by row in float64, equal scores by row number."""
    hits = []
    for query in queries:
        scores = [
            (-np.float32(np.dot(query.astype(np.float64), row.astype(np.float64))), number)
            for number, row in enumerate(index)
            if usable[number]
        ]
        hits.append([number for _, number in sorted(scores)[:k]])
    return hits


@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 30),
    k=st.integers(1, 12),
    index_block=st.integers(1, 31),
    query_block=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_blocks_duplicates_and_left_out_rows_change_nothing(
    seed, rows, k, index_block, query_block
):
    random = np.random.default_rng(seed)
    # Few distinct rows of few distinct values: nearly every rank is a tie.
    index = random.integers(-1, 2, (rows, 3)).astype(np.float32)[random.integers(0, rows, rows)]
    queries = random.integers(-1, 2, (4, 3)).astype(np.float32)
    usable = random.random(rows) < 0.8
    usable[random.integers(rows)] = True
    scores, found = search(
        queries,
        index,
        k=k,
        is_usable=usable,
        query_block_rows=query_block,
        index_block_rows=index_block,
    )
    assert found.tolist() == naive_hits(queries, index, k, usable)
    assert np.array_equal(scores, np.take_along_axis(queries @ index.T, found, axis=1))
    assert (np.diff(scores, axis=1) <= 0).all()


def test_equal_vectors_have_equal_scores_wherever_they_stand():
    random = np.random.default_rng(0)
    index = np.repeat(random.normal(size=(3, 67)), 41, axis=0).astype(np.float32)
    _, found = search(index[[0, 50, 100]], index, k=41, index_block_rows=17)
    assert found.tolist() == [list(range(start, start + 41)) for start in (0, 41, 82)]


@given(seed=st.integers(0, 10_000), k=st.integers(1, 9))
@settings(max_examples=60, deadline=None)
def test_the_last_place_goes_to_the_lower_column(seed, k):
    scores = np.random.default_rng(seed).integers(0, 3, (4, 9)).astype(np.float32)
    expected = [sorted(range(9), key=lambda c, row=row: (-row[c], c))[:k] for row in scores]
    assert top_k(scores, k)[1].tolist() == expected


def test_a_changed_sign_would_reverse_the_hits():
    _, found = search(
        np.eye(2, dtype=np.float32), np.array([[-1, 0], [0, 1], [1, 0]], np.float32), k=3
    )
    assert found.tolist() == [[2, 1, 0], [1, 0, 2]]


def test_faiss_finds_what_the_exact_product_finds():
    pytest.importorskip("faiss", reason="faiss-cpu is not a dependency")
    name, block = choose_backend("auto")
    assert name == "faiss"
    random = np.random.default_rng(1)
    index = random.normal(size=(500, 24)).astype(np.float32)
    usable = random.random(500) < 0.9
    queries = random.normal(size=(7, 24)).astype(np.float32)
    options = {"k": 20, "is_usable": usable, "index_block_rows": 64}
    scores, found = search(queries, index, block_search=block, **options)
    exact_scores, exact = search(queries, index, block_search=exact_block, **options)
    assert found.tolist() == exact.tolist()
    assert np.allclose(scores, exact_scores, atol=1e-5)


def test_an_unknown_backend_is_named():
    with pytest.raises(ValueError, match=r"backend = 'annoy'; expected 'auto', 'faiss' or 'exact'"):
        choose_backend("annoy")  # pyright: ignore[reportArgumentType]


def test_without_faiss_the_exact_product_is_taken_and_said_so(tmp_path, monkeypatch, caplog):
    caplog.set_level("INFO")
    (tmp_path / "faiss").mkdir()  # a folder of that name must not pass for the library
    monkeypatch.setattr("sys.path", [str(tmp_path), *_without_faiss()])
    for name in [name for name in sys.modules if name.split(".")[0] == "faiss"]:
        monkeypatch.delitem(sys.modules, name)
    assert choose_backend("auto") == ("exact", exact_block)
    assert "FAISS cannot be used" in caplog.text
    with pytest.raises(ValueError, match=r"backend = 'faiss' cannot be used .*install faiss-cpu"):
        choose_backend("faiss")
    monkeypatch.delitem(sys.modules, "faiss", raising=False)


def _without_faiss() -> list[str]:
    return [path for path in sys.path if not (Path(path) / "faiss" / "__init__.py").exists()]


def test_vectors_that_cannot_be_searched_are_refused():
    index = np.eye(3, dtype=np.float32)
    with pytest.raises(ValueError, match=r"expected \(Q, D\) and \(M, D\) of one width"):
        search(np.ones((1, 2), dtype=np.float32), index, k=1)
    with pytest.raises(ValueError, match="top_k = 0"):
        search(index, index, k=0)
    with pytest.raises(ValueError, match=r"queries: rows \[1\] .* NaN or infinity"):
        search(np.array([[1, 0, 0], [np.nan, 0, 0]], np.float32), index, k=1)
    index[2, 1] = np.inf
    with pytest.raises(ValueError, match=r"index: rows \[2\] .* NaN or infinity"):
        search(np.eye(3, dtype=np.float32), index, k=1, index_block_rows=2)
    with pytest.raises(ValueError, match="no usable row of the index"):
        search(np.eye(3, dtype=np.float32), index, k=1, is_usable=np.zeros(3, dtype=bool))


def write_vectors(path, vectors, *, prefix="d", failed=(), space="a", rows=None):
    """Write vectors as `twn-rl encode` does, the first `rows` of them done."""
    details = [
        {"id": f"{prefix}{i}", "row": i, "error": "bad row" if i in failed else None}
        for i in range(len(vectors))
    ]
    plan = {"model": {"space": space, "thinker": None}}
    with VectorWriter(path, vectors.shape, plan) as writer:
        done = rows or len(vectors)
        writer.append(vectors[:done].astype(np.float32), details[:done], {"failed": len(failed)})
    return path


def run_search(folder, **options):
    words = ["search", "--queries", str(folder / "q.npy"), "--index", str(folder / "d.npy")]
    words += ["--output", str(folder / "hits.jsonl"), "--backend", "exact"]
    status = main([*words, *(w for k, v in options.items() for w in (f"--{k}", str(v)))])
    path = folder / "hits.jsonl"
    lines = path.read_text().splitlines() if path.exists() else None
    return status, None if lines is None else [json.loads(line) for line in lines]


def test_hits_carry_ids_and_never_failed_or_unwritten_rows(tmp_path, caplog):
    caplog.set_level("INFO")
    vectors = np.eye(4, dtype=np.float32)
    # Rows 1 (failed) and 3 (not encoded yet) would be zero vectors and beat negative scores.
    write_vectors(tmp_path / "d.npy", -vectors, failed=(1,), rows=3)
    write_vectors(tmp_path / "q.npy", vectors, prefix="q", failed=(2,))
    status, lines = run_search(tmp_path, top_k=5)
    assert status == 0
    assert lines is not None
    assert [line["id"] for line in lines] == ["q0", "q1", "q2", "q3"]
    assert [[hit["id"] for hit in line["hits"]] for line in lines] == [
        ["d2", "d0"], ["d0", "d2"], [], ["d0", "d2"],
    ]  # fmt: skip
    assert lines[2]["error"] is True
    assert lines[0]["hits"][1] == {"id": "d0", "row": 0, "score": -1.0}
    assert "left out 1 failed rows and 1 not encoded yet" in caplog.text
    assert "backend exact: 3 queries, 2 of 4 rows of the index" in caplog.text
    assert "q0: d2 (0.000), d0 (-1.000)" in caplog.text


def test_vectors_of_two_models_are_not_compared(tmp_path, caplog):
    write_vectors(tmp_path / "d.npy", np.eye(3), space="a")
    write_vectors(tmp_path / "q.npy", np.eye(3), space="b")
    status, lines = run_search(tmp_path)
    assert (status, lines) == (2, None)
    assert "expected one model: their vectors cannot be compared" in caplog.text


def test_a_failed_search_leaves_earlier_hits_alone(tmp_path):
    write_vectors(tmp_path / "d.npy", np.eye(3))
    write_vectors(tmp_path / "q.npy", np.eye(3), prefix="q")
    assert run_search(tmp_path)[0] == 0
    before = (tmp_path / "hits.jsonl").read_bytes()
    assert run_search(tmp_path, top_k=0)[0] == 2
    assert (tmp_path / "hits.jsonl").read_bytes() == before
    assert sorted(path.name for path in tmp_path.glob(".*")) == []


def test_a_plain_npy_file_is_searched_by_row_number(tmp_path, caplog):
    np.save(tmp_path / "d.npy", np.eye(3, dtype=np.float32))
    np.save(tmp_path / "q.npy", np.eye(3, dtype=np.float32)[:1])
    _, lines = run_search(tmp_path, top_k=1)
    assert lines == [{"id": "0", "row": 0, "hits": [{"id": "0", "row": 0, "score": 1.0}]}]
    assert "has no meta.json: ids are row numbers" in caplog.text
    np.save(tmp_path / "d.npy", np.eye(3))
    with pytest.raises(VectorFileError, match=r"is no \.npy file of \(N, D\) float32 vectors"):
        open_vectors(tmp_path / "d.npy")
