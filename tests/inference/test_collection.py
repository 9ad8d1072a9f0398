"""Collections: rows are found by their vectors, whole or not at all, and no path leads outside."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from conftest import picture

from twn_rl.data.images import ImageError
from twn_rl.inference import collection as collection_module
from twn_rl.inference.collection import Collection, CollectionError, build_collection
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.inference.item_rows import ItemFile

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
        patch.setattr(collection_module, "_write_table", killed)
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
