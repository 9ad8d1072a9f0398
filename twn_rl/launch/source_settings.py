"""Settings of a recipe, read from source text: help must not wait for torch.

Reads what `start(main, TYPES, default_config=...)` names at the end of a recipe, and the classes
behind it. Refuses to import anything of it; a test holds what is read here against the
dataclasses themselves.
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[1]


class Unknown(str):
    """An expression whose value only running it would tell, as its source text."""


@dataclass(frozen=True)
class Setting:
    """One field: its name, default (`Unknown` if it is computed) and help."""

    name: str
    default: Any
    help: str


@dataclass(frozen=True)
class Section:
    """One dataclass: its name, the first line of its docstring, its own fields."""

    name: str
    line: str
    settings: tuple[Setting, ...]
    is_trainer: bool = False


@dataclass(frozen=True)
class Source:
    """A parsed file."""

    path: Path
    tree: ast.Module

    @classmethod
    @lru_cache
    def of(cls, path: Path) -> Source:
        """Return the file at a path."""
        return cls(path, ast.parse(path.read_text(encoding="utf-8")))

    def find(self, name: str) -> tuple[Source, ast.expr | ast.ClassDef] | None:
        """Return where a name is defined, and how; None if that is outside of this package."""
        for node in self.tree.body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                return self, node
            if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                    return self, node.value
        module = self._imported(name)
        return None if module is None else Source.of(module[0]).find(module[1])

    def _imported(self, name: str) -> tuple[Path, str] | None:
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "twn_rl":
                for alias in node.names:
                    if (alias.asname or alias.name) == name:
                        file = _file(str(node.module))
                        return None if file is None else (file, alias.name)
        return None

    def find_dotted(self, node: ast.expr) -> tuple[Source, ast.expr | ast.ClassDef] | None:
        """Return the same for `name` and for `module.name`."""
        if isinstance(node, ast.Name):
            return self.find(node.id)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            for each in ast.walk(self.tree):
                if isinstance(each, ast.ImportFrom):
                    for alias in each.names:
                        if (alias.asname or alias.name) == node.value.id:
                            file = _file(f"{each.module}.{alias.name}")
                            return None if file is None else Source.of(file).find(node.attr)
        return None

    def value(self, node: ast.expr | None) -> Any:
        """Return the value of an expression of literals and known names, `Unknown` otherwise."""
        try:
            return self._value(node)
        except (LookupError, TypeError, ValueError):
            return Unknown("" if node is None else ast.unparse(node))

    def _value(self, node: Any) -> Any:
        match node:
            case ast.Constant():
                return node.value
            case ast.List() | ast.Tuple():
                parts: list[Any] = []
                for each in node.elts:
                    if isinstance(each, ast.Starred):
                        parts += self._value(each.value)
                    else:
                        parts.append(self._value(each))
                return parts if isinstance(node, ast.List) else tuple(parts)
            case ast.Dict():
                return {
                    self._value(key): ast.unparse(value)
                    for key, value in zip(node.keys, node.values, strict=True)
                }
            case ast.JoinedStr():
                return "".join(str(self._value(part)) for part in node.values)
            case ast.FormattedValue(value=inner) | ast.Lambda(body=inner):
                return self._value(inner)
            case ast.UnaryOp(op=ast.USub(), operand=inner):
                return -self._value(inner)
            case ast.BinOp(left=left, right=right, op=ast.Mult()):
                return self._value(left) * self._value(right)
            case ast.Call(func=ast.Name(id="list" | "tuple" as kind), args=arguments):
                make = {"list": list, "tuple": tuple}[kind]
                return make(*map(self._value, arguments))
            case ast.Call(func=ast.Attribute(value=left, attr="join"), args=[right]):
                return self._value(left).join(self._value(right))
            case ast.Name(id="list" | "dict" as kind):  # a default factory
                return {"list": list, "dict": dict}[kind]()
        found = self.find_dotted(node) if isinstance(node, (ast.Name, ast.Attribute)) else None
        if found is None or isinstance(found[1], ast.ClassDef):
            raise LookupError(ast.dump(node))
        return found[0]._value(found[1])


def _file(module: str) -> Path | None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    files = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in files if file.is_file()), None)


def read_recipe(path: Path) -> tuple[str, list[Section], str | None]:
    """Return a recipe's docstring, its dataclasses, and the file name of its default settings.

    Raises:
        LookupError: If the file starts nothing.
    """
    source = Source.of(path)
    calls = [node for node in ast.walk(source.tree) if isinstance(node, ast.Call)]
    call = next((call for call in calls if getattr(call.func, "id", None) == "start"), None)
    if call is None:
        raise LookupError(f"{path} has no call of start(main, types)")
    types = call.args[1]
    if isinstance(types, ast.Name):
        found = source.find(types.id)
        assert found is not None
        source, types = found  # pyright: ignore[reportAssignmentType]
    assert isinstance(types, ast.Tuple)
    sections = [_section(source, each) for each in types.elts]
    config = next((k.value for k in call.keywords if k.arg == "default_config"), None)
    if isinstance(config, ast.Name):
        found = Source.of(path).find(config.id)
        assert found is not None
        config = found[1]
    name = re.search(r"'([\w-]+\.yaml)'", ast.unparse(config)) if config is not None else None
    return ast.get_docstring(Source.of(path).tree) or "", sections, name and name[1]


def _section(source: Source, node: ast.expr) -> Section:
    found = source.find_dotted(node)
    if found is None or not isinstance(found[1], ast.ClassDef):
        raise LookupError(f"{ast.unparse(node)} is no dataclass of this package")
    own, kind = found[0], found[1]
    settings: dict[str, Setting] = {}
    is_trainer = _collect(own, kind, settings)
    line = (ast.get_docstring(kind) or "").split("\n")[0]
    return Section(kind.name, line, tuple(settings.values()), is_trainer)


def _collect(source: Source, kind: ast.ClassDef, settings: dict[str, Setting]) -> bool:
    """Add the fields of a class and its parents; return whether a parent is of another package."""
    is_trainer = False
    for base in reversed(kind.bases):
        found = source.find_dotted(base)
        if found is not None and isinstance(found[1], ast.ClassDef):
            is_trainer |= _collect(found[0], found[1], settings)
        else:
            is_trainer = True
    told = attributes_of(ast.get_docstring(kind) or "")
    for setting in _own_settings(source, kind, told):
        settings[setting.name] = setting
    return is_trainer


def _own_settings(source: Source, kind: ast.ClassDef, told: dict[str, str]) -> Iterator[Setting]:
    for node in kind.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        if "ClassVar" in ast.unparse(node.annotation):
            continue
        name, value, text = node.target.id, node.value, ""
        if isinstance(value, ast.Call) and getattr(value.func, "id", "") == "field":
            given = {keyword.arg: keyword.value for keyword in value.keywords}
            metadata = given.get("metadata")
            if isinstance(metadata, ast.Dict):
                by_key = zip(metadata.keys, metadata.values, strict=True)
                text = next((source.value(v) for k, v in by_key if source.value(k) == "help"), "")
            value = given.get("default", given.get("default_factory"))
        yield Setting(name, source.value(value), str(text or told.get(name, "")))


def attributes_of(docstring: str) -> dict[str, str]:
    """Return what the "Attributes:" of a Google docstring say, by name."""
    found = re.findall(r"^ {4}(\w+): (.+(?:\n {8,}.+)*)", inspect.cleandoc(docstring), re.MULTILINE)
    return {name: " ".join(line.split()) for name, line in found}
