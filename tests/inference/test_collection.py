"""Collections: rows are found by their vectors, whole or not at all, and no path leads outside."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from made_records import picture

from twn_rl.cli import main
from twn_rl.data.images import ImageError
from twn_rl.inference import collection_writing
from twn_rl.inference.collection import Collection, CollectionError, search_collection
from twn_rl.inference.collection_writing import add_to_collection, build_collection
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.item_rows import ItemFile
from twn_rl.inference.vector_files import open_vectors

WORDS = ("camel", "pizza", "zebra", "tree", "above", "below", "left", "right", "top", "row")


@pytest.fixture
def embedder(make_model) -> ThinkingEmbedder:
    return ThinkingEmbedder(make_model())


@pytest.fixture
def source(tmp_path: Path) -> ItemFile:
    folder = tmp_path / "data"
    folder.mkdir()
    picture(3).save(folder / "photo.png")
    rows = [
        {"id": "words", "text": "camel pizza", "metadata": {"price": 3}},
        {"id": "photo", "images": ["photo.png"], "text": "tree"},
        {"id": "bad", "images": ["missing.png"]},
        {"id": "again", "text": "camel pizza"},
        *({"id": f"n{n}", "text": " ".join(WORDS[n % d] for d in (2, 3, 5, 7))} for n in range(20)),
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ItemFile(path, side="document")


def build(embedder, source, output, **settings) -> Collection:
    return build_collection(embedder, source, output, show_progress_bar=False, **settings)


@pytest.mark.parametrize("ann_rows", [10**6, 8])
def test_hits_are_those_of_a_product_with_all_vectors(embedder, source, tmp_path, ann_rows):
    found = build(embedder, source, tmp_path / "out", ann_rows=ann_rows)
    assert (found.rows, found.is_approximate) == (23, ann_rows == 8)
    query = embedder.encode_query("zebra above", think="never")
    vectors = np.load(tmp_path / "out" / "vectors.npy")
    expected = np.sort(np.delete(vectors @ query, 2))[::-1][:5]
    hits = found.search(query, 5)
    np.testing.assert_allclose([hit.score for hit in hits], expected, atol=1e-5)
    for hit in hits:
        assert hit.score == pytest.approx(float(vectors[hit.row] @ query), abs=1e-5)
    own = found.search(vectors[1], 1)[0]
    assert (own.id, own.row, own.text, own.pictures) == ("photo", 1, "tree", ("photo.png",))
    words = found.row(0)
    assert words is not None
    assert words.metadata == {"price": 3}
    assert found.row(2) is None  # a row without a vector is not there


def test_rows_with_the_same_content_are_kept_once_if_asked(embedder, source, tmp_path):
    everything = build(embedder, source, tmp_path / "all")
    distinct = build(embedder, source, tmp_path / "distinct", is_distinct=True)
    assert everything.row(3) is not None
    assert distinct.row(3) is None
    assert distinct.rows < everything.rows


def test_pictures_are_read_inside_the_data_root_only(embedder, source, tmp_path):
    found = build(embedder, source, tmp_path / "out")
    file = source.data_root / "photo.png"
    assert found.picture(1, 0) == file
    assert [found.picture(*place) for place in ((1, 1), (1, -1), (0, 0), (99, 0))] == [None] * 4
    secret = tmp_path / "secret.png"
    os.replace(file, secret)
    file.symlink_to(secret)
    with pytest.raises(ImageError, match="outside the data root"):
        found.picture(1, 0)
    os.rename(tmp_path / "data", tmp_path / "moved")
    with pytest.raises(ImageError):
        found.picture(1, 0)


def test_a_collection_is_whole_or_absent(embedder, source, tmp_path, monkeypatch):
    with pytest.raises(CollectionError, match="twn-rl index"):
        Collection(tmp_path)
    build(embedder, source, tmp_path / "out")

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collection_writing, "_reader", killed)
        with pytest.raises(KeyboardInterrupt):
            build(embedder, source, tmp_path / "out")
    with pytest.raises(CollectionError, match="finished"):
        Collection(tmp_path / "out")
    assert build(embedder, source, tmp_path / "out").rows == 23


def test_another_models_vectors_are_refused(embedder, source, tmp_path):
    found = build(embedder, source, tmp_path / "out")
    found.check_space(found.space)
    with pytest.raises(CollectionError, match="index again"):
        found.check_space("another")


def more(source: ItemFile, rows: list[dict]) -> ItemFile:
    path = source.data_root / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return ItemFile(path, side="document", fields={"id": "id"})


def add(embedder, source, output, **settings) -> Collection:
    return add_to_collection(embedder, source, output, show_progress_bar=False, **settings)


@pytest.mark.parametrize("ann_rows", [10**6, 8, 25])
def test_added_rows_are_found_and_take_the_place_of_their_ids(
    embedder, source, tmp_path, ann_rows, caplog
):
    caplog.set_level("INFO")
    build(embedder, source, tmp_path / "out", ann_rows=ann_rows)
    rows = [
        {"id": "words", "text": "zebra zebra top", "metadata": {"price": 4}},
        {"id": "new", "text": "row above", "images": ["photo.png"]},
        {"id": "bad", "images": ["missing.png"]},
        {"id": "newer", "text": "left of the tree"},
    ]
    found = add(embedder, more(source, rows), tmp_path / "out", ann_rows=ann_rows)
    assert (found.rows, found.is_approximate) == (25, ann_rows <= 25)
    assert "2 rows added, 1 replaced" in caplog.text
    vectors = embedder.encode_document([rows[0]["text"], rows[3]["text"]])
    first, last = (found.search(vector, 1)[0] for vector in vectors)
    assert (first.id, first.metadata, last.id) == ("words", {"price": 4}, "newer")
    assert first.score == pytest.approx(1, abs=1e-5)
    old = found.search(embedder.encode_document("camel pizza"), 25)
    assert [hit.id for hit in old if hit.score > 1 - 1e-5] == ["again"]
    assert len({hit.row for hit in old}) == len({hit.id for hit in old}) == 25
    new = next(hit for hit in old if hit.id == "new")
    assert found.picture(new.row, 0) == source.data_root / "photo.png"
    assert not list((tmp_path / "out").glob("added*"))
    # Repeated it changes nothing, and building from the first file would drop what was added.
    assert add(embedder, more(source, rows), tmp_path / "out").rows == 25
    with pytest.raises(CollectionError, match=r"rows that were added.*--overwrite"):
        build(embedder, source, tmp_path / "out")
    assert Collection(tmp_path / "out").rows == 25
    assert build(embedder, source, tmp_path / "out", overwrite=True).rows == 23


def test_an_addition_that_is_killed_goes_on_and_until_then_nothing_has_changed(
    embedder, source, tmp_path, monkeypatch
):
    build(embedder, source, tmp_path / "out")
    rows = more(source, [{"id": "words", "text": "zebra"}, {"id": "new", "text": "row"}])

    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(collection_writing, "_reader", killed)
        with pytest.raises(KeyboardInterrupt):
            add(embedder, rows, tmp_path / "out")
    before = Collection(tmp_path / "out")
    assert before.rows == 23
    assert before.row(0).text == "camel pizza"  # pyright: ignore[reportOptionalMemberAccess]
    with monkeypatch.context() as patch:
        patch.setattr(embedder, "encode_document", killed)  # all vectors are there
        assert add(embedder, rows, tmp_path / "out").rows == 24


@pytest.mark.parametrize(
    ("rows", "problem"),
    [
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], r"1 ids .*\['a'\]"),
        ([{"text": "no name"}], "no row of"),
        ([{"id": "twice", "text": "x"}], r"1 ids .*\['twice'\]"),
    ],
)
def test_rows_that_cannot_take_a_place_are_refused(embedder, source, tmp_path, rows, problem):
    lines = source.path.read_text() + '{"id": "twice", "text": "a"}\n' * 2
    source.path.write_text(lines)
    before = build(embedder, source, tmp_path / "out").rows
    with pytest.raises(CollectionError, match=problem):
        add(embedder, more(source, rows), tmp_path / "out")
    assert Collection(tmp_path / "out").rows == before
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    picture(4).save(elsewhere / "own.png")
    (elsewhere / "rows.jsonl").write_text('{"id": "own", "images": ["own.png"]}\n')
    with pytest.raises(CollectionError, match="'own': a picture is outside"):
        add(embedder, ItemFile(elsewhere / "rows.jsonl", side="document"), tmp_path / "out")


HOSTILE = 'it\'s "a\\" ] OR 1=1 -- \N{SNOWMAN}'


@pytest.mark.parametrize("ann_rows", [10**6, 8])
def test_a_filter_finds_all_rows_that_fit_it_and_no_others(embedder, source, tmp_path, ann_rows):
    colours = [["red", "blue"], "red", "green", HOSTILE]
    rows = [
        {"id": str(n), "text": f"camel {WORDS[n % 7]}",
         "metadata": {"colour": colours[n % 4], "year": float(2000 + n % 3), "new": n > 20}}
        for n in range(24)
    ]  # fmt: skip
    found = build(embedder, more(source, rows), tmp_path / "out", ann_rows=ann_rows)
    vector = embedder.encode_document("pizza")

    def ids(wanted: dict) -> set[str]:
        return {hit.id for hit in found.search(vector, 24, wanted)}

    of = range(24)
    assert ids({}) == {str(n) for n in of}
    assert ids({"colour": "red"}) == {str(n) for n in of if n % 4 < 2}
    assert ids({"colour": ["blue", "green"]}) == {str(n) for n in of if n % 4 in (0, 2)}
    assert ids({"colour": "red", "year": 2001}) == {str(n) for n in of if n % 4 < 2 and n % 3 == 1}
    assert ids({"colour": HOSTILE}) == {str(n) for n in of if n % 4 == 3}
    assert ids({"new": True}) == {"21", "22", "23"}
    for nothing in ({"colour": "re"}, {"color": "red"}, {"year": "2001"}, {"new": 1}, {"x'": "'"}):
        assert ids(nothing) == set(), nothing
    for wrong in ({"colour": None}, {"colour": []}, {"year": float("nan")}, {"a": {"b": 1}}):
        with pytest.raises(ValueError, match="expected names and values"):
            ids(wrong)
    with pytest.raises(ValueError, match="at most 256"):
        ids({"year": list(range(257))})


def test_a_file_of_queries_searches_a_collection(embedder, source, tmp_path, caplog):
    rows = [{"id": w, "text": w, "metadata": {"long": len(w) > 3}} for w in WORDS]
    found = build(embedder, more(source, rows), tmp_path / "out")
    np.save(tmp_path / "q.npy", embedder.encode_document(["camel", "top"]))
    hits = tmp_path / "hits.jsonl"
    words = ["search", "--queries", str(tmp_path / "q.npy"), "--output", str(hits), "--top_k", "3"]
    assert main([*words, "--index", str(tmp_path / "out"), "--filter", "long=false"]) == 0
    lines = [json.loads(line) for line in hits.read_text().splitlines()]
    assert [line["id"] for line in lines] == ["0", "1"]
    assert {hit["id"] for line in lines for hit in line["hits"]} == {"top", "row"}
    assert lines[1]["hits"][0] == {"id": "top", "row": WORDS.index("top"), "score": 1.0}
    own = open_vectors(tmp_path / "out" / "vectors.npy")
    assert search_collection(own, found, hits, top_k=1)[1]["hits"][0]["id"] == WORDS[1]
    assert main([*words, "--index", str(tmp_path / "q.npy"), "--filter", "long=false"]) == 2
    assert "vectors without metadata" in caplog.text
    assert main([*words, "--index", str(tmp_path / "out"), "--backend", "exact"]) == 2
    assert "LanceDB searches" in caplog.text
    with pytest.raises(CollectionError, match="one model"):
        search_collection(replace(own, space="another"), found, hits)


def test_nothing_warns_of_a_table_that_is_new(source, tmp_path):
    code = (
        "import sys; from twn_rl.inference.collection import database; import pyarrow\n"
        "table = pyarrow.table({'a': [1]})\n"
        "from pathlib import Path; database(Path(sys.argv[1])).create_table('t', data=table)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "new")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
