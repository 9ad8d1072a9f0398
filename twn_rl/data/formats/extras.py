"""Packages that only some inputs need, imported when they are needed."""

import importlib
from types import ModuleType


def import_extra(module: str, *, package: str, extra: str, purpose: str) -> ModuleType:
    """Return `module`.

    Args:
        module: Module to import, possibly one of ours that needs the package.
        package: Name of the foreign package, as it is imported.
        extra: Optional dependency group of this project that installs it.
        purpose: What it is needed for, such as ".parquet files".

    Raises:
        ModuleNotFoundError: If the package is missing; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != package:
            raise
        raise ModuleNotFoundError(
            f"module {package} is missing; expected it for {purpose}; install twn-rl[{extra}] or "
            "convert the input to .jsonl",
            name=package,
        ) from error
