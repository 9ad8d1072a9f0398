"""Every block of the documentation is run or parsed, in a copy of a small finished demo."""

import ast
import contextlib
import json
import logging
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from doc_commands import try_command
from doc_pages import ROOT, Block, blocks, command_lines, name_of, named_file, pages
from format_files import write_lines, write_table
from tiny_backbones import awaken

from twn_rl.data.mixture import load_mixture
from twn_rl.data.record import Record
from twn_rl.data.record_files import load_records, write_records
from twn_rl.demo.dataset import write_demo
from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.gate import Gate
from twn_rl.modeling.judge import fit_judge
from twn_rl.serving.app import create_app
from twn_rl.serving.run import bind, make_server, run_server
from twn_rl.serving.service import EmbeddingService
from twn_rl.serving.settings import ServeSettings

SERVER = "http://127.0.0.1:8000"  # what pages call the server they tell to start
LANGUAGES = ("python", "bash", "yaml", "json", "text")
PAGES = [page for page in pages() if blocks(page)]
# Takes more than ten seconds on two cores.
SLOW = {
    *("docs/quickstart.md", "docs/benchmarks.md", "docs/results/thoughts.md"),
    *("docs/methods/grpo.md", "docs/rewards.md", "docs/results/speed.md"),
    "docs/results/reward.md",
}


@pytest.fixture(scope="module")
def finished_demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as a user has after the demo: tiny data, untrained models, own files."""
    folder = tmp_path_factory.mktemp("documentation")
    for name in ("recipes", "benchmarks", "twn_rl"):
        (folder / name).symlink_to(ROOT / name)
    demo = folder / "outputs" / "demo"
    files = write_demo(demo / "data", DataArguments(demo_scale=0.01).demo_settings())
    _save_models(demo)
    for name in ("sft", "grpo"):
        shutil.copytree(demo / name, folder / "outputs" / name)
    # A missing warm start would be trained first, for all of its steps.
    shutil.copytree(demo / "sft", folder / "outputs" / "demo_short" / "sft")

    # The files that the pages call their reader's own
    (folder / "images").symlink_to(Path("outputs") / "demo" / "data" / "images")
    for name in ("train", "validation", "test"):
        shutil.copy(files[name], folder / f"{name}.jsonl")
    shutil.copy(files["train"], folder / "okvqa.jsonl")
    write_records(folder / "catalogue.parquet", list(load_records(files["rl"])))
    rows = {"queries": [{"text": "camel"}], "documents": [{"text": "owl"}, {"text": "tree"}]}
    rows["changed"] = [{"id": "1", "text": "an old tree"}]
    for name, lines in rows.items():
        write_lines(folder / f"{name}.jsonl", *lines)
    pair = {"qry": "which animal", "qry_image_path": "", "pos_text": "camel", "pos_image_path": ""}
    write_lines(folder / "MMEB-train" / "OK-VQA" / "original.jsonl", pair)
    write_lines(folder / "scifact" / "corpus.jsonl", {"_id": "d", "title": "", "text": "tree"})
    write_lines(folder / "scifact" / "queries.jsonl", {"_id": "q", "text": "plant"})
    (folder / "scifact" / "qrels").mkdir()
    judged = "query-id\tcorpus-id\tscore\nq\td\t1\n"
    (folder / "scifact" / "qrels" / "train.tsv").write_text(judged, encoding="utf-8")
    write_table(folder / "pairs.parquet", [{"anchor": "plant", "positive": "tree"}])
    (folder / "my_sft.yaml").write_text("output_dir: outputs/sft\n", encoding="utf-8")
    (folder / "my_grpo.yaml").write_text("output_dir: outputs/grpo\n", encoding="utf-8")
    return folder


def _save_models(demo: Path) -> None:
    """Write small models: two with a gate, one whose policy decides, one with reason tokens.

    As after the demo, all but the last share the embedding adapter.
    """
    for name in ("sft", "grpo", "refit", "adaptive", "latent"):
        small = ModelArguments(reasoning_rank=2, embedding_rank=2, max_think_tokens=4)
        small.num_reason_tokens = 2 if name == "latent" else 0
        model = small.build(seed=0)
        awaken(model)
        if name in ("grpo", "refit"):
            gate = Gate(model.hidden_size)
            fit, held_out = (
                torch.randn(2, 40, model.hidden_size),
                torch.randn(2, 30, model.hidden_size),
            )
            gate.judge = fit_judge((fit[0], fit[1]), (held_out[0], held_out[1]))
            gate.fitted_to = Fingerprints(model).gate_origin
            model.gates["query"] = gate
            model.config.gate_threshold = 0.5
        if name == "adaptive":
            model.config.thinking_decision = "policy"
        model.save_pretrained(demo / name)


@pytest.fixture
def workshop(
    finished_demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    """Go into a copy of the finished demo; what programs do to logging is undone afterwards."""
    folder = tmp_path / "workshop"
    shutil.copytree(finished_demo, folder, symlinks=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield folder
    root.handlers[:], root.level = handlers, level


def marked(page: Path) -> Any:
    return pytest.param(
        page, id=name_of(page), marks=[pytest.mark.slow] if name_of(page) in SLOW else []
    )


# Recipes run one after the other in this process, and import each other.
@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("page", [marked(page) for page in PAGES])
def test_every_block_of_a_page_is_run_or_parsed(
    page: Path, workshop: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    namespace: dict[str, Any] = {"__name__": "__page__"}
    tried = 0
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.place}: {block.language!r} is not tried"
        if file := named_file(block):
            (workshop / file).write_text(block.text, encoding="utf-8")
        if block.language == "python":
            with server_of(block.text) as text:
                exec(compile(text, block.place, "exec"), namespace)
        elif block.language == "bash":
            commands = command_lines(block.text)
            assert commands, f"{block.place} holds no command"
            for command in commands:
                how = try_command(command, monkeypatch)
                logging.getLogger(__name__).info("%s %s: %s", block.place, how, command)
        elif block.language == "yaml":
            parse_settings(block, monkeypatch)
        elif block.language == "json":
            Record.from_dict(json.loads(block.text))
        tried += 1
    assert tried == page.read_text(encoding="utf-8").count("```") // 2


@contextlib.contextmanager
def server_of(text: str) -> Iterator[str]:
    """Serve the model of the demo to a block that calls it; yield the block with the port."""
    if SERVER not in text:
        yield text
        return
    embedder = ThinkingEmbedder.from_pretrained("outputs/demo/refit", device="cpu")
    settings = ServeSettings(port=0)
    service = EmbeddingService(embedder, settings, name="demo")
    with bind(settings) as listener:
        server = make_server(create_app(service), settings)
        thread = threading.Thread(target=lambda: run_server(server, listener))
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.02)
            yield text.replace(SERVER, f"http://127.0.0.1:{listener.getsockname()[1]}")
        finally:
            server.should_exit = True
            thread.join(30)


def parse_settings(block: Block, monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse a YAML block by what reads such a file: the mixture's reader or a recipe's parser."""
    file = named_file(block)
    assert file, f"{block.place}: its first line must name the file, such as # my_sft.yaml"
    if "sources" in yaml.safe_load(block.text):
        assert len(load_mixture(file).sources) > 1
        return
    recipe = f"recipes/{Path(file).stem.rpartition('_')[2]}_embed.py"
    how = try_command(["python", recipe, "--config", file], monkeypatch, may_run=False)
    assert how == "parsed"


PROGRAMS = [
    path.relative_to(ROOT).as_posix()
    for folder in ("recipes", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]


@pytest.mark.filterwarnings("ignore:.*found in sys.modules.*:RuntimeWarning")
@pytest.mark.parametrize("program", PROGRAMS)
def test_the_commands_in_a_programs_docstring_are_taken_by_its_parser(
    program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    docstring = ast.get_docstring(ast.parse((ROOT / program).read_text(encoding="utf-8"))) or ""
    lines = re.findall(r"^    \S.*(?:\n        .*)*", docstring, re.MULTILINE)
    commands = command_lines("\n".join(lines))
    assert commands, f"{program} does not say how to start it"
    monkeypatch.chdir(ROOT)
    for command in commands:
        try_command(command, monkeypatch, may_run=False)


def test_pages_have_blocks_of_every_kind_that_is_tried() -> None:
    found = [block.language for page in PAGES for block in blocks(page)]
    assert set(found) == set(LANGUAGES)
    assert found.count("bash") > 30
    assert found.count("python") > 5


def test_command_lines_are_read_as_a_shell_reads_them() -> None:
    text = "make demo  # all\npip install -e '.[a]' && twn-rl search \\\n    --top_k 2\n"
    assert command_lines(text) == [
        ["make", "demo"],
        ["pip", "install", "-e", ".[a]"],
        ["twn-rl", "search", "--top_k", "2"],
    ]


def test_a_command_that_is_neither_run_nor_parsed_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="neither run nor parsed"):
        try_command(["rm", "-rf", "outputs"], monkeypatch)
    with pytest.raises(AssertionError, match="Makefile has only"):
        try_command(["make", "coffee"], monkeypatch)
    with pytest.raises(AssertionError, match="extras are"):
        try_command(["pip", "install", ".[coffee]"], monkeypatch)


def test_an_unknown_flag_of_a_parsed_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    launch = ["accelerate", "launch", "--config_file", "recipes/accelerate/zero2.yaml"]
    with pytest.raises(AssertionError, match="--colour red: exit status 2"):
        try_command([*launch, "recipes/sft_embed.py", "--colour", "red"], monkeypatch)
    assert not torch.distributed.is_initialized()
