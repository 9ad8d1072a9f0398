"""The house: which rooms there are, what each says of itself, and who may use whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from launching import ROOT

PACKAGE = ROOT / "twn_rl"
ROOMS = sorted(
    path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"
)


def test_imports_go_one_way_and_nowhere_in_a_circle() -> None:
    # In a process of its own: it turns off all loggers that exist.
    script = (
        "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(no_cache=True))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "0 broken" in done.stdout


def test_the_first_level_has_at_most_thirteen_rooms_and_no_loose_module() -> None:
    assert len(ROOMS) <= 13
    assert [path.name for path in PACKAGE.glob("*.py")] == ["__init__.py"]


@pytest.mark.parametrize("room", ROOMS)
def test_every_room_says_what_it_holds_and_what_it_refuses(room: str) -> None:
    text = (PACKAGE / room / "__init__.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text))
    assert docstring is not None
    assert "Refuses to know" in " ".join(docstring.split())


def test_tests_lie_in_folders_named_after_the_rooms() -> None:
    folders = {path.parent.relative_to(ROOT / "tests") for path in ROOT.glob("tests/*/test_*.py")}
    unknown = {str(folder) for folder in folders} - {
        *ROOMS,
        "docs",
        "benchmarks",
        "hostile",
        "vision",
        "with_vllm",  # a folder called vllm would pass for the package where that is missing
    }
    assert not unknown, f"{unknown} are named after no room of {PACKAGE}"
    missing = set(ROOMS) - {str(folder) for folder in folders}
    assert not missing, f"{missing} have no folder of tests"


def test_links_lead_to_the_folders_people_look_for() -> None:
    for name in ("recipes", "rewards"):
        assert (PACKAGE / name).resolve() == Path(ROOT / name).resolve()
