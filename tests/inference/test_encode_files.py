"""Files become vectors row by row: resumable after kills and full disks, bad rows counted."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from made_records import picture
from tiny_backbones import awaken, make_idefics3

from twn_rl.cli import main, model_arguments
from twn_rl.data.images import ImageError
from twn_rl.data.record import Item, Record, RecordError
from twn_rl.data.record_files import write_records
from twn_rl.inference.encode_file import encode_file, fingerprints
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile, Side
from twn_rl.inference.vector_files import VectorWriter, open_vectors
from twn_rl.inference.vector_meta import VectorFileError, read_details
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.whole_files import owned

SHARDS = EncodeSettings(shard_size=4, batch_size=2)


class TinyEmbedder:
    """`ThinkingEmbedder`'s methods over a random Idefics3; remembers what it was asked for."""

    def __init__(self, *, seed: int = 0, stop_after: int | None = None) -> None:
        config = TwnConfig(
            reasoning_lora=LoraSettings(r=2, alpha=4),
            embedding_lora=LoraSettings(r=3),
            num_readout_tokens=3,
            max_think_tokens=4,
        )
        self.model = DualLoraModel.from_backbone(make_idefics3(), config, seed=seed)
        awaken(self.model, seed)
        self.model.eval()
        self.seen: list[Item] = []
        self.asked: list[dict] = []
        self.stop_after = stop_after

    def get_embedding_dimension(self) -> int:
        return self.model.hidden_size

    def encode_query(self, items, **settings):
        return self._encode("query", items, **settings)

    def encode_document(self, items, **settings):
        return self._encode("document", items, **settings)

    def _encode(self, side, items, *, think, on_bad_input, return_details, **settings):
        assert (on_bad_input, return_details) == ("skip", True)
        if self.stop_after is not None and len(self.seen) >= self.stop_after:
            raise KeyboardInterrupt
        self.asked.append({"side": side, "think": think, **settings})
        self.seen += items
        count = len(items)
        result = SimpleNamespace(
            embeddings=np.zeros((count, self.model.hidden_size), dtype=np.float32),
            thoughts=[[] for _ in items],
            problems=[[] for _ in items],
            think_tokens=[0] * count,
            gate_probabilities=[None] * count,
            policy_probabilities=[None] * count,
            truncated=[],
            errors={},
        )
        for i, item in enumerate(items):
            try:
                batch = self.model.collate([item.load()])
            except ImageError as error:
                result.errors[i] = str(error)
                continue
            if think == "always":
                ids = self.model.reason(batch)[0]
                thought = self.model.think(ids)
                result.thoughts[i], result.problems[i] = [thought.text], [thought.problem]
                result.think_tokens[i] = len(ids)
                batch |= self.model.collate_completions([self.model.completion_for_embedding(ids)])
            with torch.no_grad():
                result.embeddings[i] = self.model.embed(batch)[0].numpy()
        return result


@pytest.fixture(scope="module")
def embedder():
    """One model for tests that do not look at what it was asked."""
    return TinyEmbedder()


def write_lines(path: Path, rows) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8")
    return path


def text_rows(count: int) -> list[dict]:
    words = ["camel", "pizza", "zebra", "tree", "row"]
    return [{"id": f"r{i}", "text": f"{words[i % 5]} {words[i // 5 % 5]}"} for i in range(count)]


def encode(embedder, source, output, settings=SHARDS, **options):
    if not isinstance(source, ItemFile):
        source = ItemFile(source, side="document")
    return encode_file(embedder, source, output, settings, show_progress_bar=False, **options)


def vectors_of(embedder, items) -> np.ndarray:
    """Embed items one by one."""
    with torch.no_grad():
        rows = [embedder.model.embed(embedder.model.collate([item])) for item in items]
    return torch.cat(rows).numpy()


def details_of(path):
    return list(read_details(path))


def test_every_row_has_the_vector_of_its_item_in_the_order_of_the_file(embedder, tmp_path):
    rows = text_rows(10)
    report = encode(embedder, write_lines(tmp_path / "in.jsonl", rows), tmp_path / "out.npy")
    assert (report.rows, report.failed_rows, report.resumed_rows) == (10, 0, 0)
    made = np.load(tmp_path / "out.npy", mmap_mode="r")
    expected = vectors_of(embedder, [Item(text=row["text"]) for row in rows])
    assert made.dtype == np.float32
    np.testing.assert_allclose(made, expected, atol=1e-5)
    details = details_of(tmp_path / "out.npy")
    assert [line["id"] for line in details] == [f"r{i}" for i in range(10)]
    assert [line["row"] for line in details] == list(range(10))
    meta = json.loads((tmp_path / "out.meta.json").read_text())
    assert (meta["done_rows"], meta["is_complete"], meta["width"]) == (10, True, 32)
    assert open_vectors(tmp_path / "out.npy").is_usable.all()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "in.jsonl", "out.details.jsonl", "out.meta.json", "out.npy",
    ]  # fmt: skip


def test_thoughts_and_their_problems_are_in_the_details(embedder, tmp_path):
    source = ItemFile(write_lines(tmp_path / "in.jsonl", text_rows(3)), side="query")
    always = EncodeSettings(think="always")
    report = encode(embedder, source, tmp_path / "out.npy", always)
    details = details_of(tmp_path / "out.npy")
    assert all(isinstance(line["thought"], str) for line in details)
    assert report.counts["thoughts"] == 3
    assert report.counts["think_tokens"] == sum(line["think_tokens"] for line in details) > 0
    problems = [line["problem"] for line in details]
    assert all(problems), "random weights write no closed thought in four tokens"
    assert sum(count for name, count in report.counts.items() if name.startswith("problem:")) == 3


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("side", ["query", "document"])
def test_of_a_record_the_side_chooses_query_or_positive(embedder, tmp_path, suffix, side):
    picture(7).save(tmp_path / "a.png")
    query, positive = Item(instruction="find the", images=("a.png",)), Item(text="camel tree")
    record = Record("x", "test", query, positive, metadata={"pool": "p", "n": 1})
    write_records(tmp_path / f"in.{suffix}", [record])
    source = ItemFile(tmp_path / f"in.{suffix}", side=side)
    assert [row.pool for row in source] == ["p"]
    encode(embedder, source, tmp_path / "out.npy", EncodeSettings(think="never"))
    wanted = query.load(tmp_path) if side == "query" else positive
    made = np.load(tmp_path / "out.npy")
    np.testing.assert_allclose(made, vectors_of(embedder, [wanted]), atol=1e-5)


def test_plain_rows_and_named_fields_become_items(tmp_path):
    picture(1).save(tmp_path / "a.png")
    path = str(tmp_path / "a.png")

    def items(row, **fields):
        write_lines(tmp_path / "in.jsonl", [row])
        (made,) = ItemFile(tmp_path / "in.jsonl", side="query", fields=fields)
        assert made.error is None, made.error
        return made.id, made.item

    assert items({"text": "a"}) == ("0", Item(text="a"))
    assert items({"id": 7, "image": "a.png", "instruction": "i"}) == ("7", Item("i", None, (path,)))
    assert items({"images": ["a.png"], "text": "t"}) == ("0", Item(None, "t", (path,)))
    row = {"sku": "s", "title": "t", "photo": "a.png", "ask": "i", "nested": {"text": "n"}}
    named = {"id": "sku", "text": "title", "image": "photo", "instruction": "ask"}
    assert items(row, **named) == ("s", Item("i", "t", (path,)))
    assert items(row, item="title") == ("0", Item(text="t"))
    assert items(row, item="nested") == ("0", Item(text="n"))
    assert items(row, text="nested.text") == ("0", Item(text="n"))
    record = {"query": {"text": "q"}, "positive": {"text": "p"}}
    assert items(record, item="positive") == ("0", Item(text="p"))


def test_parquet_rows_of_texts_are_read_in_batches(embedder, tmp_path):
    rows = text_rows(300)  # more than one batch of the reader
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "in.parquet")
    source = ItemFile(tmp_path / "in.parquet", side="document", limit=280)
    assert source.describe()["rows"] == 280
    assert [row.item and row.item.text for row in source] == [row["text"] for row in rows[:280]]
    assert [row.id for row in source.rows(270)] == [f"r{i}" for i in range(270, 280)]


BAD_ROWS = {
    "not JSON": ("{", "no valid JSON"),
    "NaN": ('{"text": NaN}', "without NaN or Infinity"),
    "a list": ("[1]", "of type list; expected an object with named fields"),
    "no text": ({"texts": "camel"}, "text missing among the fields ['texts']"),
    "blank text": ({"text": "  "}, "without images or video"),
    "number": ({"text": 3}, "value = 3 of type int"),
    "bad id": ({"id": {}, "text": "camel"}, "expected a string or whole number"),
    "missing image": ({"image": "none.png"}, "none.png"),
    "outside": ({"image": "../in.jsonl"}, "leads outside the data root"),
    "URL": ({"image": "https://example.org/a.png"}, "is a URL"),
    "two image fields": ({"image": "a.png", "images": ["a.png"]}, "both image and images"),
    "broken image": ({"image": "broken.png"}, "cannot be decoded"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_row_is_a_zero_vector_with_its_error(embedder, tmp_path, name, caplog):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    row, message = BAD_ROWS[name]
    source = write_lines(tmp_path / "in.jsonl", [{"text": "camel"}, row, {"text": "tree"}])
    report = encode(embedder, source, tmp_path / "out.npy")
    assert (report.rows, report.failed_rows) == (3, 1)
    made, details = np.load(tmp_path / "out.npy"), details_of(tmp_path / "out.npy")
    assert not made[1].any()
    np.testing.assert_allclose(np.linalg.norm(made[[0, 2]], axis=1), 1, atol=1e-4)
    assert [line["error"] is None for line in details] == [True, False, True]
    assert message in details[1]["error"]
    assert message in caplog.text
    assert open_vectors(tmp_path / "out.npy").failed_rows == 1


@pytest.mark.parametrize("name", ["not JSON", "broken image"])
def test_a_bad_row_can_stop_the_job_and_costs_nothing_written(embedder, tmp_path, name):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG no picture")
    rows = [*text_rows(5), BAD_ROWS[name][0]]
    source = write_lines(tmp_path / "in.jsonl", rows)
    strict = EncodeSettings(shard_size=4, on_bad_row="raise")
    with pytest.raises(RecordError, match=r"row 6|id '5'"):
        encode(embedder, source, tmp_path / "out.npy", strict)
    stored = open_vectors(tmp_path / "out.npy")
    assert (stored.is_usable.sum(), stored.unwritten_rows) == (4, 2)
    report = encode(embedder, source, tmp_path / "out.npy")  # the same, but going past it
    assert (report.resumed_rows, report.failed_rows) == (4, 1)


def test_a_vector_that_is_not_finite_is_an_error_of_its_row(tmp_path):
    embedder = TinyEmbedder()
    encode_document = embedder.encode_document

    def poisoned(items, **settings):
        result = encode_document(items, **settings)
        result.embeddings[1, 3] = np.nan
        return result

    embedder.encode_document = poisoned
    report = encode(
        embedder, write_lines(tmp_path / "in.jsonl", text_rows(3)), tmp_path / "out.npy"
    )
    assert report.failed_rows == 1
    assert np.isfinite(np.load(tmp_path / "out.npy")).all()
    assert "NaN or infinity" in details_of(tmp_path / "out.npy")[1]["error"]


def test_an_interrupted_run_goes_on_after_the_last_whole_shard(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(11))
    whole = TinyEmbedder()
    encode(whole, source, tmp_path / "whole.npy")
    stopped = TinyEmbedder(stop_after=8)
    with pytest.raises(KeyboardInterrupt):
        encode(stopped, source, tmp_path / "out.npy")
    partial = np.load(tmp_path / "out.npy", mmap_mode="r")
    assert partial.shape == (11, 32)
    assert partial[:8].any(axis=1).all()
    assert not partial[8:].any()
    # Lines of a shard that never counted, as a kill between two writes leaves them.
    with (tmp_path / "out.details.jsonl").open("a") as file:
        file.write('{"id": "r8", "row"')
    assert open_vectors(tmp_path / "out.npy").unwritten_rows == 3
    again = TinyEmbedder()
    report = encode(again, source, tmp_path / "out.npy", EncodeSettings(shard_size=4, batch_size=1))
    assert (report.rows, report.resumed_rows) == (11, 8)
    assert [item.text for item in again.seen] == [row["text"] for row in text_rows(11)[8:]]
    assert again.asked[0]["batch_size"] == 1, "a smaller batch must be allowed to go on"
    for suffix in (".npy", ".details.jsonl"):
        whole_bytes = (tmp_path / "whole").with_suffix(suffix).read_bytes()
        assert (tmp_path / "out").with_suffix(suffix).read_bytes() == whole_bytes
    done = TinyEmbedder(stop_after=0)
    assert encode(done, source, tmp_path / "out.npy").resumed_rows == 11


def test_changed_settings_input_or_model_are_refused_and_named(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(6))
    embedder = TinyEmbedder()
    encode(embedder, source, tmp_path / "out.npy")
    before = (tmp_path / "out.npy").read_bytes()

    def refused(pattern, *, model=embedder, settings=SHARDS, side: Side = "document"):
        with pytest.raises(VectorFileError, match=pattern) as raised:
            encode(model, ItemFile(source, side=side), tmp_path / "out.npy", settings)
        assert "--overwrite" in str(raised.value)
        assert (tmp_path / "out.npy").read_bytes() == before

    refused(
        "settings.max_think_tokens = None, now 3",
        settings=EncodeSettings(shard_size=4, max_think_tokens=3),
    )
    refused("settings.side = document, now query", side="query")
    refused("model.space", model=TinyEmbedder(seed=1))
    os.utime(source)  # touched, the same content
    assert encode(embedder, source, tmp_path / "out.npy").resumed_rows == 6
    write_lines(source, text_rows(7))
    refused("input.sha256.*input.rows = 6, now 7")
    report = encode(embedder, source, tmp_path / "out.npy", overwrite=True)
    assert (report.rows, report.resumed_rows) == (7, 0)
    assert len(np.load(tmp_path / "out.npy")) == 7


def test_a_run_that_failed_at_its_first_row_can_be_corrected(tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(6))
    with pytest.raises(KeyboardInterrupt):
        encode(TinyEmbedder(stop_after=0), source, tmp_path / "out.npy")
    report = encode(TinyEmbedder(), source, tmp_path / "out.npy", EncodeSettings(shard_size=3))
    assert (report.rows, report.resumed_rows) == (6, 0)


def test_only_what_thinks_depends_on_who_thinks():
    one, other = TinyEmbedder(seed=0).model, TinyEmbedder(seed=0).model
    with torch.no_grad():
        for name, weight in other.peft_model.named_parameters():
            if "lora_B" in name and ".default." in name:
                weight.add_(0.1)
    assert fingerprints(one, "query", "never") == fingerprints(other, "query", "never")
    thinking = [fingerprints(model, "query", "always") for model in (one, other)]
    assert thinking[0]["space"] == thinking[1]["space"]
    assert thinking[0]["thinker"] != thinking[1]["thinker"]
    one.config.gate_threshold = 0.3
    assert fingerprints(one, "query", "always") == thinking[0], "always asks no gate"
    assert fingerprints(one, "query", "auto") != fingerprints(other, "query", "auto")


def test_foreign_and_damaged_files_are_not_overwritten_unasked(embedder, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(4))
    np.save(tmp_path / "out.npy", np.ones((2, 2), dtype=np.float32))
    with pytest.raises(VectorFileError, match=r"exists without a readable out\.meta\.json"):
        encode(embedder, source, tmp_path / "out.npy")
    assert np.load(tmp_path / "out.npy").shape == (2, 2)
    encode(embedder, source, tmp_path / "out.npy", overwrite=True)
    os.truncate(tmp_path / "out.npy", 300)
    with pytest.raises(VectorFileError, match="is cut short"):
        encode(embedder, source, tmp_path / "out.npy")
    encode(embedder, source, tmp_path / "out.npy", overwrite=True)
    os.truncate(tmp_path / "out.details.jsonl", 10)
    with pytest.raises(VectorFileError, match="is cut short"):
        encode(embedder, source, tmp_path / "out.npy")


def test_two_runs_do_not_write_the_same_file(embedder, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(4))
    encode(embedder, source, tmp_path / "out.npy")
    with owned(tmp_path / "out.npy"):
        for overwrite in (False, True):
            with pytest.raises(VectorFileError, match="is being written by another run"):
                encode(embedder, source, tmp_path / "out.npy", overwrite=overwrite)
    assert encode(embedder, source, tmp_path / "out.npy").resumed_rows == 4


def test_of_runs_that_start_at_once_one_owns_the_file(tmp_path):
    runs = 40
    barrier, refused = threading.Barrier(runs), []

    def start_at_once(number: int) -> VectorWriter | None:
        barrier.wait(timeout=60)
        try:
            return VectorWriter(tmp_path / "out.npy", (2, 3), {"run": number})
        except VectorFileError as error:
            refused.append(str(error))
            return None

    with ThreadPoolExecutor(runs) as pool:
        [owner] = [writer for writer in pool.map(start_at_once, range(runs)) if writer is not None]
    assert len(refused) == runs - 1
    assert all("is being written by another run" in message for message in refused)
    with owner:
        owner.append(np.ones((2, 3), dtype=np.float32), [{"id": "a"}, {"id": "b"}], {})
    assert np.load(tmp_path / "out.npy").all()
    names = {"out.npy", "out.meta.json", "out.details.jsonl"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_what_a_killed_run_had_begun_is_removed_by_the_next(tmp_path):
    (tmp_path / ".out.npy.lock").touch()
    (tmp_path / ".out.npy.123.tmp").write_bytes(b"a file that was to become out.npy")
    with VectorWriter(tmp_path / "out.npy", (2, 3), {}):
        assert not (tmp_path / ".out.npy.123.tmp").exists()
    assert not list(tmp_path.glob(".*"))


def test_wrong_settings_and_inputs_are_refused_together(embedder, tmp_path):
    with pytest.raises(ValueError, match=r"think = 'maybe'.*think_rate = 2.*shard_size = 0"):
        EncodeSettings(think="maybe", think_rate=2, shard_size=0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"expected \.jsonl or \.parquet; .*limit = 0"):
        ItemFile(tmp_path / "in.csv", side="query", limit=0)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        ItemFile(tmp_path / "in.jsonl", side="query")
    write_lines(tmp_path / "in.jsonl", [])
    with pytest.raises(ValueError, match="has no rows"):
        encode(embedder, tmp_path / "in.jsonl", tmp_path / "out.npy")
    (tmp_path / "in.parquet").write_bytes(b"no parquet")
    with pytest.raises(RecordError, match="no readable Parquet"):
        encode(embedder, tmp_path / "in.parquet", tmp_path / "out.npy")


IN_A_PROCESS = """
    import resource, sys
    from pathlib import Path
    from test_encode_files import TinyEmbedder, encode
    if {limit}:
        resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
    class Announcing(TinyEmbedder):
        def encode_document(self, items, **settings):
            result = super().encode_document(items, **settings)
            print(len(self.seen), flush=True)
            return result
    try:
        encode(Announcing(), Path("in.jsonl"), Path("out.npy"))
    except OSError as error:
        sys.exit(str(error))
"""


def start(folder: Path, *, limit: int = 0) -> subprocess.Popen:
    """Encode in another process, whose files may not exceed `limit` bytes."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(IN_A_PROCESS.format(limit=limit))],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_disk_that_fills_up_costs_nothing_written(embedder, tmp_path):
    rows = [{"id": f"{'long name ' * 40}{i}", "text": "camel"} for i in range(40)]
    source = write_lines(tmp_path / "in.jsonl", rows)
    # The vectors (5 kB) fit into 10 kB; the details (40 times 0.5 kB) do not.
    process = start(tmp_path, limit=10_000)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "run the same command again: the first 16 rows are kept" in errors
    stored = open_vectors(tmp_path / "out.npy")
    assert (stored.is_usable.sum(), stored.unwritten_rows) == (16, 24)
    assert np.load(tmp_path / "out.npy", mmap_mode="r")[:16].any(axis=1).all()
    assert encode(embedder, source, tmp_path / "out.npy").resumed_rows == 16
    assert open_vectors(tmp_path / "out.npy").is_usable.all()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
def test_a_disk_without_room_for_the_vectors_shows_before_the_first_row(tmp_path):
    write_lines(tmp_path / "in.jsonl", text_rows(40))
    process = start(tmp_path, limit=4_000)
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 1, errors
    assert "no room on the disk" in errors
    assert "0.005 MB needed" in errors, "40 vectors of width 32 and a header"
    assert output == "", "nothing was encoded"
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]


@pytest.mark.slow
def test_a_killed_process_goes_on_where_it_was(embedder, tmp_path):
    source = write_lines(tmp_path / "in.jsonl", text_rows(200))
    process = start(tmp_path)
    assert process.stdout is not None
    while int(process.stdout.readline()) < 12:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    report = encode(embedder, source, tmp_path / "out.npy")
    assert 8 <= report.resumed_rows < 200
    encode(embedder, source, tmp_path / "whole.npy")
    assert (tmp_path / "out.npy").read_bytes() == (tmp_path / "whole.npy").read_bytes()


def test_memory_does_not_grow_with_the_rows(tmp_path):
    import tracemalloc

    class Zeros(TinyEmbedder):
        def _encode(self, side, items, **settings):
            result = super()._encode(side, [], **settings)
            result.embeddings = np.ones((len(items), 32), dtype=np.float32)
            for name in ("thoughts", "problems"):
                setattr(result, name, [[]] * len(items))
            result.think_tokens, result.gate_probabilities = [0] * len(items), [None] * len(items)
            result.policy_probabilities = [None] * len(items)
            return result

    embedder, peaks = Zeros(), []
    for count in (500, 5000):
        source = write_lines(tmp_path / f"{count}.jsonl", [{"text": "x" * 2000}] * count)
        tracemalloc.start()
        encode(embedder, source, tmp_path / f"{count}.npy", EncodeSettings(shard_size=50))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0], peaks


def run_cli(monkeypatch, embedder, *words: str) -> int:
    # The command line itself, with a model that is in memory instead of on disk.
    monkeypatch.setattr(model_arguments, "_load_embedder", lambda path, **options: embedder)
    return main(["encode", "--model", "tiny", *words])


def test_the_command_encodes_named_fields_and_counts_bad_rows(
    embedder, tmp_path, monkeypatch, caplog
):
    caplog.set_level("INFO")
    rows = [{"sku": "a", "title": "camel"}, "{", {"sku": "c", "title": "tree", "price": 3}]
    source = write_lines(tmp_path / "in.jsonl", rows)
    words = ["--input", str(source), "--output", str(tmp_path / "out.npy")]
    words += ["--side", "query", "--think", "never"]
    status = run_cli(monkeypatch, embedder, *words, "--field", "id=sku", "text=title")
    assert status == 0
    stored = open_vectors(tmp_path / "out.npy")
    assert stored.ids == ["a", "1", "c"]
    assert stored.is_usable.tolist() == [True, False, True]
    expected = vectors_of(embedder, [Item(text="camel"), Item(text="tree")])
    np.testing.assert_allclose(stored.vectors[[0, 2]], expected, atol=1e-5)
    assert "1 of 3 rows have a zero vector" in caplog.text
    assert "fields nothing reads: {'price': 1}" in caplog.text
    assert run_cli(monkeypatch, embedder, *words, "--field", "title") == 2
    assert "settings.fields" in caplog.text


def test_the_command_fails_if_every_row_does(embedder, tmp_path, monkeypatch):
    source = write_lines(tmp_path / "in.jsonl", ["{", "}"])
    words = ["--input", str(source), "--output", str(tmp_path / "out.npy")]
    assert run_cli(monkeypatch, embedder, *words) == 1
    assert open_vectors(tmp_path / "out.npy").failed_rows == 2


def test_a_shard_of_the_wrong_shape_is_refused(tmp_path):
    with VectorWriter(tmp_path / "out.npy", (4, 3), {}) as writer:
        with pytest.raises(ValueError, match=r"vectors = \(2, 2\) for 2 details"):
            writer.append(np.ones((2, 2), dtype=np.float32), [{}, {}], {})
        assert writer.done_rows == 0
    with pytest.raises(VectorFileError, match=r"expected a name in \.npy"):
        VectorWriter(tmp_path / "out.bin", (4, 3), {})
