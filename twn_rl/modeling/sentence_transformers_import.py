"""`import twn_rl` tells sentence-transformers our class, whichever of the two comes first.

sentence-transformers imports no class from elsewhere that a folder names, unless it is told to
trust the folder. It looks first among classes it has been given: whoever has imported twn_rl has
said which code is meant, the installed one, and a folder holds none. Imports nothing by itself:
neither sentence-transformers, nor our class before a folder names it.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Mapping
from importlib.abc import MetaPathFinder
from typing import Any

# The class that loads the folder there; written into every checkpoint, so it must not move.
MODULE_CLASS = "twn_rl.inference.sentence_transformers_module.ThinkingModule"
_BASE_MODULE = "sentence_transformers.base.model"


class _OurClass(Mapping[str, Any]):
    """Name in `modules.json` -> class, imported when it is asked for."""

    def __getitem__(self, name: str) -> Any:
        if name != MODULE_CLASS:
            raise KeyError(name)
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)

    def __iter__(self) -> Iterator[str]:
        return iter([MODULE_CLASS])

    def __len__(self) -> int:
        return 1


class _Watch(MetaPathFinder):
    """Waits for the module that keeps the classes, and finds nothing itself."""

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != _BASE_MODULE:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            load = loader.exec_module

            def exec_module(module: Any) -> None:
                load(module)
                _give_class(module)

            loader.exec_module = exec_module
        return spec


def tell_sentence_transformers() -> None:
    """Give it our class, now or when it is imported."""
    if _BASE_MODULE in sys.modules:
        _give_class(sys.modules[_BASE_MODULE])
    else:
        sys.meta_path.insert(0, _Watch())


def _give_class(module: Any) -> None:
    # Versions before 6 import installed classes by themselves, and have no such mapping.
    if hasattr(module.BaseModel, "_module_classes"):
        module.BaseModel._module_classes = _OurClass()
