"""What is installed works alone: a wheel in an environment with only what an extra promises.

Each environment is a new virtual one that sees the distributions the wheel's own metadata asks for,
and theirs, and nothing else: no repository, no other package of this environment.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import time
import venv
import zipfile
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, distribution, metadata
from pathlib import Path

import pytest
from launching import ROOT
from packaging.requirements import Requirement

pytestmark = pytest.mark.slow

Command = Callable[..., subprocess.CompletedProcess[str]]
SOURCES = ("twn_rl", "recipes", "rewards")
IGNORED = shutil.ignore_patterns("__pycache__", "*.egg-info", "build", "outputs")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built, so that nothing is written into the repository."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*SOURCES, "licenses"):
        shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=IGNORED)
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(source, tmp_path_factory.mktemp("wheel"))


def build_wheel(source: Path, output: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-index", "--no-deps"]
    subprocess.run([*pip, "--no-build-isolation", "-w", output, source], check=True, cwd=output)
    (found,) = output.glob("*.whl")
    return found


def expected_files() -> set[str]:
    """Return the names that an installation must have, of what lies in the repository."""
    files = [
        path.relative_to(ROOT)
        for name in SOURCES
        for path in (ROOT / name).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    names = [file.parts if file.parts[0] == "twn_rl" else ("twn_rl", *file.parts) for file in files]
    return {"/".join(parts) for parts in names}


def required(extras: tuple[str, ...], wheel_requirements: list[Requirement]) -> set[str]:
    """Return the distributions that the package with some extras asks for, and theirs."""
    found: set[str] = set()
    queue = [(requirement, extras) for requirement in wheel_requirements]
    while queue:
        requirement, chosen = queue.pop()
        marker, options = requirement.marker, [{"extra": extra} for extra in (*chosen, "")]
        if marker is not None and not any(marker.evaluate(option) for option in options):
            continue
        own = {f"{requirement.name}[{extra}]" for extra in (*requirement.extras, "")}
        if own <= found:
            continue
        found |= own
        try:
            further = distribution(requirement.name).requires or []
        except PackageNotFoundError:  # of another platform
            continue
        queue += [(Requirement(text), tuple(requirement.extras)) for text in further]
    return {name.partition("[")[0] for name in found}


@pytest.fixture(scope="module")
def install(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Command]:
    """Return extras -> an environment of the wheel and them, as a way to run its programs."""
    with zipfile.ZipFile(wheel) as file:
        name = next(name for name in file.namelist() if name.endswith(".dist-info/METADATA"))
        lines = file.read(name).decode().splitlines()
    requirements = [Requirement(x[15:]) for x in lines if x.startswith("Requires-Dist: ")]
    installed: dict[tuple[str, ...], Command] = {}

    def make(*extras: str) -> Command:
        if extras not in installed:
            folder = tmp_path_factory.mktemp("_".join(("core", *extras)))
            installed[extras] = environment(folder, wheel, required(extras, requirements))
        return installed[extras]

    return make


def environment(folder: Path, wheel: Path, names: set[str]) -> Command:
    """Make a virtual environment of a wheel and links to some installed distributions."""
    venv.create(folder / "venv", symlinks=True, with_pip=False)
    python = folder / "venv" / "bin" / "python"
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    here = Path(sysconfig.get_paths()["purelib"])
    for name in names:
        try:
            files = distribution(name).files or []
        except PackageNotFoundError:
            continue
        for top in {file.parts[0] for file in files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(here / top)
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(python), "install"]
    subprocess.run([*pip, "--no-index", "--no-deps", str(wheel)], check=True, cwd=folder)
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    path = f"{python.parent}:{os.environ['PATH']}"

    def run(
        *words: object, cwd: Path | None = None, status: int = 0
    ) -> subprocess.CompletedProcess[str]:
        """Run a program of the environment, in an empty folder if none is given."""
        first = str(words[0])
        program = [str(python.parent / first)] if first == "twn-rl" else [str(python)]
        rest = words[1:] if first in ("twn-rl", "python") else ("-c", *words)
        done = subprocess.run(
            [*program, *map(str, rest)],
            cwd=cwd or folder,
            env={**inherited, "PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=550,
            check=False,
        )
        assert done.returncode == status, (done.stdout + done.stderr)[-4000:]
        return done

    return run


def test_the_wheel_holds_every_file_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as file:
        names = {name for name in file.namelist() if ".dist-info/" not in name}
    assert names == expected_files()
    assert {"twn_rl/py.typed", "twn_rl/recipes/accelerate/zero2.yaml"} <= names


def test_the_source_distribution_holds_real_files_and_builds_the_same_wheel(
    source: Path, wheel: Path, tmp_path: Path
) -> None:
    code = f"from setuptools import build_meta; print(build_meta.build_sdist({str(tmp_path)!r}))"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=source, capture_output=True)
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        assert not [member.name for member in file if member.issym() or member.islnk()]
        file.extractall(tmp_path, filter="data")
    again = build_wheel(tmp_path / archive.name.removesuffix(".tar.gz"), tmp_path)
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert set(one.namelist()) == set(other.namelist())


def test_help_and_version_come_at_once_and_nothing_of_the_repository_is_seen(
    install: Callable[..., Command],
) -> None:
    run = install()
    started = time.perf_counter()
    text = run("twn-rl", "--help").stdout
    assert time.perf_counter() - started < 2
    for command in ("sft", "grpo", "expert-iteration", "latent", "gate", "eval", "demo", "encode"):
        assert re.search(rf"^ +{command}\b", text, re.MULTILINE), command
    assert run("twn-rl", "--version").stdout.strip() == f"twn-rl {metadata('twn-rl')['Version']}"
    path = json.loads(run("import json, sys; print(json.dumps(sys.path))").stdout)
    assert not [entry for entry in path if Path(entry).is_relative_to(ROOT)]
    for name in ("recipes", "rewards"):
        code = f"import importlib.util as u; assert u.find_spec({name!r}) is None"
        run(f"{code}; import twn_rl.{name}")
    where = Path(run("twn-rl", "where", "recipes/accelerate/zero2.yaml").stdout.strip())
    assert where.is_file()
    assert not where.is_relative_to(ROOT)


def test_the_core_embeds_and_says_what_training_needs(install: Callable[..., Command]) -> None:
    run = install()
    code = """
import twn_rl, sys
from twn_rl.demo.tiny_vlm import BACKBONE_DIR
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel
config = TwnConfig(reasoning_lora=LoraSettings(2, 4), embedding_lora=LoraSettings(2, 4))
DualLoraModel.from_backbone(str(BACKBONE_DIR), config).save_pretrained("model")
embedder = twn_rl.ThinkingEmbedder.from_pretrained("model")
print(embedder.encode_query(["where is the camel"], think="never").shape)
assert not {"trl", "datasets", "deepspeed", "matplotlib", "mteb"} & set(sys.modules)
"""
    assert "(1, " in run(code).stdout
    for command in ("sft", "grpo", "expert-iteration", "adaptive", "latent"):
        assert 'pip install "twn-rl[train]"' in run("twn-rl", command, status=2).stderr
        assert "--config FILE" in run("twn-rl", command, "--help").stdout
    flags = ["--model", "model", "--splits", "test", "--modes", "never", "--demo_scale", "0.005"]
    evaluated = run("twn-rl", "eval", *flags, status=2).stderr
    assert 'pip install "twn-rl[eval]"' in evaluated


def test_training_needs_its_extra_alone_and_evaluation_its_own(
    install: Callable[..., Command], tmp_path: Path
) -> None:
    train, measure = install("train"), install("eval")
    for name in ("deepspeed", "matplotlib", "mteb"):
        train(f"import importlib.util as u; assert u.find_spec({name!r}) is None")
    short = ["--max_steps", "2", "--demo_scale", "0.005", "--demo_dir", "data"]
    launch = ["-m", "accelerate.commands.launch", "--num_processes", "1", "-m"]
    train("python", *launch, "twn_rl.recipes.sft_embed", *short, cwd=tmp_path)
    model = tmp_path / "outputs" / "demo" / "sft"
    assert (model / "environment.json").is_file()
    for command in ("grpo", "adaptive", "latent", "gate", "policy-threshold", "select-thoughts"):
        assert "--config FILE" in train("twn-rl", command, "--help").stdout
    flags = ["--model", model, "--splits", "test", "--modes", "never", *short[2:]]
    measure("twn-rl", "eval", *flags, cwd=tmp_path)
    assert (model / "evaluation" / "report.html").is_file()


def test_every_module_is_imported_with_all_extras(install: Callable[..., Command]) -> None:
    run = install("train", "deepspeed", "eval", "mteb", "gguf", "st", "serve", "index")
    code = """
import importlib, pkgutil, twn_rl
for module in pkgutil.walk_packages(twn_rl.__path__, "twn_rl."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        # What a framework derives its classes from is not part of the test environment.
        frameworks = ("langchain", "llamaindex")
        if not any(f"twn-rl[{name}]" in str(error) for name in frameworks):
            raise
        print("lacks", module.name)
    else:
        print("has", module.name)
"""
    lines = [line.split() for line in run(code).stdout.splitlines()]
    names = {name for found, name in lines if found == "has"}
    assert {"twn_rl.rewards.margins", "twn_rl.recipes.prepare.wordnet"} <= names
    adapters = ("langchain_embeddings", "llama_index_embeddings")
    lacking = {name for found, name in lines if found == "lacks"}
    assert lacking <= {f"twn_rl.inference.{name}" for name in adapters}


def test_the_demo_runs_its_five_stages_in_the_current_folder(
    install: Callable[..., Command], tmp_path: Path
) -> None:
    run = install("train", "eval")
    flags = ["twn-rl", "demo", "--demo_scale", "0.01", "--max_steps", "2"]
    done = run(*flags, cwd=tmp_path)
    told = re.findall(r"Stage (\d) of 5", done.stderr)
    assert told == ["1", "2", "3", "4", "5"]
    model = tmp_path / "outputs" / "demo" / "refit"
    assert (model / "evaluation" / "report.html").is_file()
    assert "Kept" in run(*flags, cwd=tmp_path).stderr


@pytest.fixture(autouse=True)
def nothing_is_left_in_the_repository() -> Iterator[None]:
    before = {path.name for path in ROOT.iterdir()}
    yield
    assert {path.name for path in ROOT.iterdir()} - before <= {".pytest_cache", ".hypothesis"}
