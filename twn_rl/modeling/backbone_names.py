"""What a checkpoint calls its backbone: never a path that is true on one machine only.

A name on the hub stays what it is. The backbone inside the package is called by its place there,
any other folder by its way from the checkpoint.
"""

import json
import os
from pathlib import Path

from twn_rl.runtime.whole_files import write_text

_PACKAGE = Path(__file__).parent.parent
# Longer than "owner/name": no name on the hub can be the same.
_EMBEDDED = f"{_PACKAGE.name}/demo/backbone"


def stored_name(name: str, folder: str | Path) -> str:
    """Return what a checkpoint in `folder` is to call a backbone.

    Args:
        name: Hub name, or folder, relative to the working directory unless absolute.
        folder: Where the checkpoint will lie.
    """
    if not name or not Path(name).is_dir():
        return name
    if Path(name).resolve() == _package_folder():
        return _EMBEDDED
    way = os.path.relpath(Path(name).resolve(), Path(folder).resolve())
    return Path(way).as_posix() if way.startswith(os.pardir) else f"./{Path(way).as_posix()}"


def found_name(stored: str, folder: str | Path) -> str:
    """Return the hub name or folder that a checkpoint in `folder` means.

    Checkpoints of earlier versions name absolute paths; the package's own backbone is found
    wherever the package lies now.
    """
    if stored == _EMBEDDED or (stored.endswith(f"/{_EMBEDDED}") and not Path(stored).is_dir()):
        return str(_package_folder())
    if stored.startswith("."):
        return os.path.normpath(Path(folder).absolute() / stored)
    return stored


def plain_name(name: str) -> str:
    """Return a name for people: of a folder its last part, otherwise the name itself.

    >>> plain_name("Qwen/Qwen3-VL-2B-Instruct"), plain_name("/models/mine/"), plain_name("../mine")
    ('Qwen/Qwen3-VL-2B-Instruct', 'mine', 'mine')
    """
    if name.startswith((".", os.sep)) or Path(name).is_dir():
        return _EMBEDDED if Path(name).as_posix().endswith(_EMBEDDED) else Path(name).name
    return name


def forget_way(file: Path, key: str, folder: Path) -> None:
    """Rename a backbone outside of `folder` in a JSON file: its last part, as if it lay inside.

    What leaves this machine must not name its folders.
    """
    data = json.loads(file.read_text("utf-8"))
    name = data.get(key) or ""
    if name.startswith((os.pardir, os.sep)):
        data[key] = f"./{plain_name(os.path.normpath(folder / name))}"
        write_text(file, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def check_found(name: str, folder: str | Path) -> None:
    """Refuse a backbone's folder that is not there.

    Raises:
        FileNotFoundError: If `name` is a path and no folder.
    """
    if name.startswith((".", os.sep)) and not Path(name).is_dir():
        raise FileNotFoundError(
            f"{folder} was trained on the backbone in {name}, which does not exist; expected its "
            "folder there; put it back, or pass backbone=... with its name or folder"
        )


def _package_folder() -> Path:
    return (_PACKAGE / "demo" / "backbone").resolve()
