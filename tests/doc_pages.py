"""The pages of the documentation, their fenced blocks, and the command lines in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
TOP_PAGES = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")
_FENCE = re.compile(r"^```(.*)\n((?:.*\n)*?)```[ \t]*$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        place: Page and line, for messages.
        language: The word after the fence.
        text: What is between the fences.
    """

    place: str
    language: str
    text: str


def pages() -> list[Path]:
    """Return every page, those at the top of the repository first."""
    return [*(ROOT / name for name in TOP_PAGES), *sorted((ROOT / "docs").rglob("*.md"))]


def name_of(page: Path) -> str:
    """Return a page's path in the repository."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page in their order.

    Raises:
        ValueError: For a fence that is not closed, or does not begin its line.
    """
    text = page.read_text(encoding="utf-8")
    found = [
        Block(f"{name_of(page)}:{text[: match.start()].count(chr(10)) + 1}", *match.groups())
        for match in _FENCE.finditer(text)
    ]
    if 2 * len(found) != text.count("```"):
        raise ValueError(f"{name_of(page)} has {text.count('```')} fences, {len(found)} blocks")
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced blocks."""
    return _FENCE.sub("", page.read_text(encoding="utf-8"))


def inline_code(page: Path) -> list[str]:
    """Return what stands in single backticks outside fenced blocks."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def named_file(block: Block) -> str | None:
    """Return the file name that a block's first line gives it as a comment, if any."""
    match = re.match(r"# ([\w./-]+\.(?:py|yaml))\n", block.text)
    return match and match[1]


def command_lines(text: str) -> list[list[str]]:
    """Return the commands of a bash block as words; backslashes, && and # as in a shell."""
    commands: list[list[str]] = []
    for line in text.replace("\\\n", " ").splitlines():
        command: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                command.append(word)
            elif command:
                commands.append(command)
                command = []
    return commands
