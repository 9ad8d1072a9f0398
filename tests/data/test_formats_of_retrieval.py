"""ms-swift, sentence-transformers, BEIR and tevatron in their real shapes, field by field."""

from pathlib import Path

import pytest
from format_files import convert, make_root, png, under, write_lines, write_table
from PIL import Image

from twn_rl.data.record import Item, Record


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return make_root(tmp_path)


def test_swift_chats_bring_their_own_pictures_and_system_messages(root: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Answer briefly."},
            {"role": "user", "content": "<image>sentence1"},
        ],
        "images": [str(root / "pics" / "a.png")],
        "positive_messages": [[{"role": "user", "content": "<image>s2"}]],
        "positive_images": [["pics/b.png"]],
        "negative_messages": [
            [{"role": "user", "content": "see <image> and <image> here"}],
            [{"role": "user", "content": "no picture"}],
        ],
        "negative_images": [["pics/c.jpg", "pics/d.png"], []],
    }
    source = write_lines(root / "swift.jsonl", row)
    records = convert(root, "swift", source, "--instruction", "For queries without their own.")
    assert list(records) == [
        Record(
            id="swift/1",
            source="swift",
            query=Item(
                instruction="Answer briefly.",
                text="sentence1",
                images=under(root, "pics/a.png"),
            ),
            positive=Item(text="s2", images=under(root, "pics/b.png")),
            negatives=(
                Item(text="see and here", images=under(root, "pics/c.jpg", "pics/d.png")),
                Item(text="no picture"),
            ),
        )
    ]


def test_swift_videos_are_folders_of_frames(root: Path) -> None:
    row = {
        "messages": [{"role": "user", "content": "<video>what happens?"}],
        "videos": ["clips/v1"],
        "positive_messages": [[{"role": "user", "content": "<video>"}]],
        "positive_videos": [[["clips/v1/frame2.png", "clips/v1/frame0.png"]]],
    }
    records = convert(root, "swift", write_lines(root / "swift.jsonl", row))
    frames = [f"clips/v1/frame{i}.png" for i in range(3)]
    assert records[0].query == Item(text="what happens?", video=under(root, *frames))
    assert records[0].positive == Item(video=under(root, frames[2], frames[0]))


def test_old_swift_rows_deal_out_their_images_by_the_marks(root: Path) -> None:
    row = {
        "query": "<image>anchor",
        "response": "plain",
        "rejected_response": ["<image><image>two", "<image>one"],
        "images": ["pics/a.png", "pics/b.png", "pics/c.jpg", "pics/d.png"],
        "label": 1.0,
    }
    low = {"query": "q", "response": "r", "label": 0.0}
    source = write_lines(root / "old.jsonl", row, low)
    records = convert(root, "swift", source, "--min_score", "0.5")
    assert len(records) == 1
    assert [item.images for item in records[0].items()] == [
        under(root, "pics/a.png"),
        (),
        under(root, "pics/b.png", "pics/c.jpg"),
        under(root, "pics/d.png"),
    ]
    assert records[0].metadata == {"label": 1.0}


def test_sentence_transformers_columns_count_by_order_and_bytes_become_files(root: Path) -> None:
    rows = [
        {
            "query": "a red page",
            "image": {"bytes": png(9), "path": None},
            "negative_0": {"bytes": png(8), "path": "x.png"},
            "negative_1": {"bytes": png(9 - 2), "path": None},
        }
    ]
    source = write_table(root / "vdr" / "data" / "train-00000-of-00001.parquet", rows)
    records = convert(root, "sentence-transformers", source.parent.parent)
    assert records[0].source == "vdr"
    assert records[0].query == Item(text="a red page")
    pictures = [str(item.images[0]) for item in records[0].items()[1:]]
    shown = [Image.open(path).convert("RGB").getpixel((0, 0)) for path in pictures]
    assert shown == [(9, 0, 0), (8, 0, 0), (7, 0, 0)]
    assert all(Path(path).is_relative_to(root / "images") for path in pictures)
    assert len(list((root / "images").rglob("*.png"))) == 3


def test_sentence_transformers_pairs_below_the_threshold_are_dropped(
    root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        {"sentence1": "a", "sentence2": {"text": "b", "image": "pics/a.png"}, "score": 0.5},
        {"sentence1": "c", "sentence2": "d", "score": 0.49},
        {"sentence1": [{"role": "user", "content": "e"}], "sentence2": "pics/b.png", "score": 1},
    ]
    source = write_lines(root / "pairs.jsonl", *rows)
    caplog.set_level("INFO")
    records = convert(root, "sentence-transformers", source, "--min_score", "0.5")
    assert [record.query.text for record in records] == ["a", "e"]
    assert records[0].positive == Item(text="b", images=under(root, "pics/a.png"))
    assert records[1].positive == Item(images=under(root, "pics/b.png"))
    assert records[0].metadata == {"score": 0.5}
    assert "below_min_score: 1" in caplog.text


def test_beir_judgements_become_positives_and_negatives(root: Path) -> None:
    folder = root / "nfcorpus"
    documents = [{"_id": f"d{i}", "title": f"T{i}", "text": f"text {i}"} for i in range(4)]
    write_lines(folder / "corpus.jsonl", *documents, {"_id": "d9", "title": "", "text": "spare"})
    queries = [{"_id": "q1", "text": "first"}, {"_id": "q2", "text": "second"}]
    write_lines(folder / "queries.jsonl", *queries)
    (folder / "qrels").mkdir()
    judged = ["q1\td0\t2", "q1\td1\t0", "q1\td2\t1", "q2\td3\t1"]
    lines = ["query-id\tcorpus-id\tscore", *judged]
    (folder / "qrels" / "test.tsv").write_text("\n".join(lines) + "\n")
    (folder / "qrels" / "train.tsv").write_text("query-id\tcorpus-id\tscore\nq2\td0\t1\n")
    records = convert(root, "beir", folder, "--split", "test", "--instruction", "Find.")
    assert [record.id for record in records] == ["q1 -> d0", "q1 -> d2", "q2 -> d3"]
    assert records[0] == Record(
        id="q1 -> d0",
        source="nfcorpus",
        query=Item(instruction="Find.", text="first"),
        positive=Item(text="T0 text 0"),
        negatives=(Item(text="T1 text 1"),),
        metadata={"query_id": "q1", "document_id": "d0", "score": 2.0},
    )
    assert records[2].negatives == ()


def test_vidore_folders_of_parquet_bring_pages_as_pictures(root: Path) -> None:
    folder = root / "vidore"
    pages = [{"corpus-id": i, "image": {"bytes": png(i), "path": None}} for i in range(3)]
    write_table(folder / "corpus" / "test-00000-of-00001.parquet", pages)
    queries = [{"query-id": 0, "query": "the first page?", "language": "en"}]
    write_table(folder / "queries" / "test-00000-of-00001.parquet", queries)
    judged = [{"query-id": 0, "corpus-id": 1, "score": 1}]
    write_table(folder / "qrels" / "test-00000-of-00001.parquet", judged)
    records = convert(root, "beir", folder, "--split", "test")
    assert len(records) == 1
    assert records[0].query == Item(text="the first page?")
    assert Image.open(str(records[0].positive.images[0])).getpixel((0, 0)) == (1, 0, 0)
    assert records[0].metadata["language"] == "en"
    # Pages that nobody judged are not saved.
    assert len(list((root / "images").rglob("*.png"))) == 1


def test_tevatron_rows_find_their_documents_in_the_corpus(root: Path) -> None:
    folder = root / "tev"
    rows = [
        {
            "query_id": "7",
            "query_text": "find",
            "query_image": "pics/a.png",
            "positive_document_ids": ["x", "y"],
            "negative_document_ids": ["z"],
        }
    ]
    write_lines(folder / "train.jsonl", *rows)
    documents = [
        {"docid": "x", "text": "doc x", "image": None},
        {"docid": "y", "document_text": "doc y", "document_image": "pics/b.png"},
        {"docid": "z", "title": "Z", "text": "doc z"},
    ]
    write_lines(folder / "corpus.jsonl", *documents)
    records = convert(root, "tevatron", folder)
    assert [record.id for record in records] == ["7 -> x", "7 -> y"]
    assert records[1] == Record(
        id="7 -> y",
        source="tev",
        query=Item(text="find", images=under(root, "pics/a.png")),
        positive=Item(text="doc y", images=under(root, "pics/b.png")),
        negatives=(Item(text="Z doc z"),),
        metadata={"query_id": "7", "document_id": "y"},
    )


def test_old_tevatron_rows_hold_their_passages(root: Path) -> None:
    row = {
        "query_id": "1",
        "query": "who",
        "positive_passages": [{"docid": "p", "title": "T", "text": "it was"}],
        "negative_passages": [{"docid": "n", "title": "", "text": "it was not"}],
    }
    records = convert(root, "tevatron", write_lines(root / "old.jsonl", row))
    assert records[0].query == Item(text="who")
    assert records[0].positive == Item(text="T it was")
    assert records[0].negatives == (Item(text="it was not"),)
