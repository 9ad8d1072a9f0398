"""Several processes make one file of vectors: the bytes of one process, also after a kill."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from launching import ROOT

from twn_rl.cli import main
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.inference.encode_file import encode_file
from twn_rl.inference.encode_settings import EncodeSettings
from twn_rl.inference.item_rows import ItemFile
from twn_rl.inference.vector_files import open_vectors
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

ROWS = 22
FLAGS = ("--shard_size", "3", "--batch_size", "2", "--think", "always", "--max_think_tokens", "3")
# What `torchrun -m twn_rl.cli` runs, with a process that dies once it has stored two shards.
KILLER = """
import os, signal, sys
from twn_rl.cli import main
from twn_rl.inference.shared_shards import SharedShards

add, made = SharedShards.add, []

def add_and_die(self, number, *rest):
    add(self, number, *rest)
    made.append(number)
    if os.environ["RANK"] == os.environ["DIES"] and len(made) == 2:
        os.kill(os.getpid(), signal.SIGKILL)

SharedShards.add = add_and_die
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows of which one is bad, and the vectors one process makes."""
    made = tmp_path_factory.mktemp("shared")
    config = TwnConfig(
        backbone=str(BACKBONE_DIR),
        reasoning_lora=LoraSettings(r=2, alpha=4),
        embedding_lora=LoraSettings(r=3),
    )
    DualLoraModel.from_backbone(config.backbone, config, seed=0).save_pretrained(made / "model")
    rows = [{"id": f"row{n}", "text": f"camel {'pizza ' * (n % 5)}"} for n in range(ROWS)]
    rows[13]["text"] = " "
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["encode", *words(made, "alone")]) == 0
    return made


def words(folder: Path, output: str) -> list[str]:
    files = {"--model": "model", "--input": "rows.jsonl", "--output": f"{output}.npy"}
    return [*(word for flag, name in files.items() for word in (flag, str(folder / name))), *FLAGS]


def torchrun(*program: str, dies: str = "") -> subprocess.CompletedProcess:
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "DIES": dies}
    command = [sys.executable, *launcher, *program]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=500, check=False
    )


def same_as_alone(folder: Path, output: str) -> None:
    for suffix in (".npy", ".details.jsonl"):
        alone = (folder / f"alone{suffix}").read_bytes()
        assert (folder / f"{output}{suffix}").read_bytes() == alone
    alone, shared = (
        json.loads((folder / f"{name}.meta.json").read_text()) for name in ("alone", output)
    )
    assert shared == alone
    assert shared["is_complete"]
    assert shared["counts"]["failed"] == 1
    assert open_vectors(folder / f"{output}.npy").is_usable.sum() == ROWS - 1
    assert not (folder / f"{output}.parts").exists()


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_write_the_bytes_of_one(folder: Path) -> None:
    done = torchrun("-m", "twn_rl.cli", "encode", *words(folder, "two"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("22 rows, 1 failed") == 1, "told once"
    same_as_alone(folder, "two")


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("dies", ["0", "1"])
def test_after_a_killed_process_the_same_command_makes_what_is_missing(
    folder: Path, dies: str
) -> None:
    program = folder / "killer.py"
    program.write_text(KILLER)
    output = f"killed{dies}"
    assert torchrun(str(program), "encode", *words(folder, output), dies=dies).returncode != 0
    meta = json.loads((folder / f"{output}.meta.json").read_text())
    stored = meta["done_rows"] // 3 + len(list((folder / f"{output}.parts").glob("[0-9]*.json")))
    assert 0 < stored < 8
    again = torchrun("-m", "twn_rl.cli", "encode", *words(folder, output))
    assert again.returncode == 0, again.stderr[-3000:]
    assert "going on" in again.stderr
    same_as_alone(folder, output)


def test_one_process_goes_on_with_the_shards_of_several(folder: Path) -> None:
    """Parts that lie there count, and those of other settings do not."""
    from twn_rl.inference.embedder import ThinkingEmbedder
    from twn_rl.inference.shared_shards import SharedShards

    embedder: Any = ThinkingEmbedder.from_pretrained(folder / "model", device="cpu")
    source = ItemFile(folder / "rows.jsonl", side="document")
    settings = EncodeSettings(shard_size=3, batch_size=2, think="always", max_think_tokens=3)
    plan = json.loads((folder / "alone.meta.json").read_text())["plan"]
    details = (folder / "alone.details.jsonl").read_text().splitlines()
    vectors = open_vectors(folder / "alone.npy").vectors
    for name, changed in (("same", {}), ("other", {"settings": "others"})):
        work = SharedShards(folder / f"{name}.npy", plan | changed, ROWS, 3, None)
        with work._pass.opened(rebuild=True):
            marked = [{**json.loads(line), "thought": "from a part"} for line in details[6:9]]
            work.add(2, vectors[6:9], marked, {"failed": 0})
        report = encode_file(embedder, source, folder / f"{name}.npy", settings)
        assert report.rows == ROWS
        text = (folder / f"{name}.details.jsonl").read_text()
        assert text.count("from a part") == (0 if changed else 3)


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A Ray of two cores on this machine, whose workers find this checkout."""
    ray = pytest.importorskip("ray", reason="the extra ray is not installed")
    for name, value in {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield ray
    ray.shutdown()


# Ray warns of its own code, and leaves sockets to the garbage collector.
RAY_WARNS = pytest.mark.filterwarnings("ignore:::ray", "ignore::ResourceWarning")


@RAY_WARNS
@pytest.mark.slow
@pytest.mark.distributed
def test_actors_of_ray_write_the_bytes_of_one_process(
    folder: Path, ray: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twn_rl.inference.shard_maker import ShardMaker

    def make(self: ShardMaker, wanted: Any) -> Any:
        raise AssertionError("this process made a shard itself")

    monkeypatch.setattr(ShardMaker, "make", make)  # the actors are other processes
    caplog.set_level("INFO")
    command = ["encode", *words(folder, "rayed"), "--ray_actors", "2"]
    assert main(command) == 0
    assert "22 rows, 1 failed" in caplog.text
    same_as_alone(folder, "rayed")
    assert main(command) == 0
    assert "22 from an earlier run" in caplog.text


@RAY_WARNS
@pytest.mark.slow
@pytest.mark.distributed
def test_ray_goes_on_with_what_one_process_left(folder: Path, ray: Any, tmp_path: Path) -> None:
    from twn_rl.inference.shard_maker import ShardMaker

    made = ShardMaker.make

    def make(self: ShardMaker, wanted: Any) -> Any:
        if wanted[0] >= 9:
            raise KeyboardInterrupt
        return made(self, wanted)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ShardMaker, "make", make)
        with pytest.raises(KeyboardInterrupt):
            main(["encode", *words(folder, "begun")])
    assert json.loads((folder / "begun.meta.json").read_text())["done_rows"] == 9
    assert main(["encode", *words(folder, "begun"), "--ray_actors", "1"]) == 0
    same_as_alone(folder, "begun")


def test_ray_is_asked_for_by_one_process_and_needs_its_extra(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twn_rl.inference.ray_encode import RayActors, encode_with_ray

    with pytest.raises(ValueError, match="expected number >= 1"):
        RayActors(0)
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.setitem(sys.modules, "ray.data", None)
    source = ItemFile(folder / "rows.jsonl", side="query")
    with pytest.raises(ModuleNotFoundError, match=r"twn-rl\[ray\]"):
        encode_with_ray(lambda: None, source, folder / "none.npy")  # pyright: ignore[reportArgumentType]
