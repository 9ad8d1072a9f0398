"""What the pages name exists: files, symbols, flags, links, versions."""

import argparse
import importlib
import re
import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml
from doc_commands import Parsed
from doc_pages import ROOT, inline_code, name_of, pages, prose

from twn_rl import __version__, cli
from twn_rl.launch import parsing
from twn_rl.launch.command_line import SWITCHES

# Names that a page may use although no file of the repository has them: what runs write, and what
# readers own.
_PATH = re.compile(r"(?:twn_rl|recipes|rewards|tests|benchmarks|docs|licenses)(?:/[\w.-]+)*/?")
_SYMBOL = re.compile(r"twn_rl(?:\.\w+)+")
_FLAG = re.compile(r"--[a-z]\w+")
PAGES = [pytest.param(page, id=name_of(page)) for page in pages()]


@pytest.mark.parametrize("page", PAGES)
def test_every_path_and_symbol_in_backticks_exists(page: Path) -> None:
    for code in inline_code(page):
        for word in code.split():
            if _PATH.fullmatch(word) and not word.endswith(("/NAME.py", "/")):
                assert (ROOT / word).exists(), f"{name_of(page)} names {word}"
            elif _SYMBOL.fullmatch(word):
                find_symbol(word)


@pytest.mark.parametrize("page", PAGES)
def test_every_symbol_of_the_api_reference_exists(page: Path) -> None:
    for dotted in re.findall(r"^::: (\S+)$", prose(page), re.MULTILINE):
        find_symbol(dotted)


def find_symbol(dotted: str) -> Any:
    """Return the module, class, function or attribute of a dotted name."""
    parts = dotted.split(".")
    for cut in range(len(parts), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(f"{dotted} is no module")


def test_a_symbol_that_is_gone_is_noticed() -> None:
    assert find_symbol("twn_rl.rewards.margin") is find_symbol("twn_rl.rewards.REWARDS")["margin"]
    with pytest.raises(AttributeError):
        find_symbol("twn_rl.rewards.coffee")


def test_newcomers_questions_are_answered_by_what_is_there() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## Newcomers' questions")[1].split("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and "?" in line]
    assert len(rows) >= 6
    for row in rows:
        answer = row.split("|")[2]
        named = re.findall(r"`([^`]+)`", answer)
        assert any(_PATH.fullmatch(name) or _SYMBOL.fullmatch(name) for name in named), row


@pytest.fixture(scope="module")
def known_flags() -> set[str]:
    """Return the flags of every recipe and command."""
    found: list[str] = []

    def collect(types: Any, **kwargs: Any) -> None:
        found.extend(f"--{setting.name}" for kind in types for setting in fields(kind))
        raise Parsed

    def collect_words(parser: argparse.ArgumentParser, *args: Any, **kwargs: Any) -> None:
        found.extend(parser._option_string_actions)
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "parse_arguments", collect)
        patch.setattr(argparse.ArgumentParser, "parse_args", collect_words)
        for program in sorted((ROOT / "recipes").rglob("*.py")):
            run_until_parsed(program)
    for name in cli.COMMANDS:
        parser = argparse.ArgumentParser()
        importlib.import_module(f"twn_rl.cli.{cli.COMMANDS[name][0]}").add_arguments(parser)
        found.extend(parser._option_string_actions)
    return set(found)


def run_until_parsed(program: Path) -> None:
    """Run a program up to its parser."""
    import runpy

    try:
        runpy.run_path(str(program), run_name="__main__")
    except Parsed:
        return
    assert program.name == "__init__.py", f"{program} parses nothing"


@pytest.mark.parametrize("page", PAGES)
def test_every_flag_in_backticks_is_known(page: Path, known_flags: set[str]) -> None:
    known = {*known_flags, "--config", "--from", "--help", "--help-all", *SWITCHES}
    for code in inline_code(page):
        if code.startswith(("accelerate", "torchrun", "python -m")):
            continue  # flags of launchers
        for flag in _FLAG.findall(code):
            assert flag in known, f"{name_of(page)}: {code}"


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as mkdocs and GitHub make them."""
    titles = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.is_file(), f"{name_of(page)} links to {target}"
        if "docs" in page.relative_to(ROOT).parts[:1]:
            assert (ROOT / "docs") in file.parents, f"{target} lies outside of the site"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {target}"


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    listed = re.findall(r"[\w/]+\.md", str(settings["nav"]))
    own = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert own | {"contributing.md", "changelog.md"} == set(listed)
    assert len(listed) == len(set(listed))


def test_the_front_page_is_one_page() -> None:
    assert (ROOT / "README.md").stat().st_size <= 8 * 1024


def test_every_result_says_when_and_at_which_commit() -> None:
    for page in (ROOT / "docs" / "results").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        assert re.search(r"\d{1,2} [A-Z][a-z]+ 20\d\d|20\d\d-\d\d-\d\d", text), page
        assert page.name == "index.md" or re.search(r"[Cc]ommit [0-9a-f]{7}", text), page


def test_versions_agree() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert project["version"] == citation["version"] == __version__
    assert f"## {__version__}" in changelog
    assert citation["license"] == project["license"]
