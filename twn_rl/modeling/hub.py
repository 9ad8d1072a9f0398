"""From the name of a model on the Hugging Face hub to its folder here. Loads nothing."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

# No code and no pickles: what a model consists of.
_FILES = ("*.json", "*.safetensors", "README.md")
_CHECKPOINTS = ("checkpoint-*/*",)
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class HubAccess:
    """How the hub may be asked.

    Attributes:
        token: Access token; None takes the stored one, False none.
        cache_folder: Where files are kept; None takes the hub's own cache.
        local_files_only: Take what is in the cache and ask nobody.
    """

    token: str | bool | None = None
    cache_folder: str | Path | None = None
    local_files_only: bool = False

    def keywords(self) -> dict[str, Any]:
        """Return them as the hub's functions call them."""
        cache = None if self.cache_folder is None else str(self.cache_folder)
        return {"token": self.token, "cache_dir": cache, "local_files_only": self.local_files_only}


def model_folder(
    name: str | Path, revision: str | None = None, access: HubAccess | None = None
) -> Path:
    """Return the folder of a model: `name` itself, or where files of the hub were put.

    Only settings and safetensors are fetched, never code. A `Path`, and a name whose first part is
    a folder here, is a path: the hub is not asked.

    Args:
        name: Folder, or "owner/name" on the hub.
        revision: Commit, tag or branch of a hub name; None is its main branch.
        access: How the hub may be asked.

    Raises:
        FileNotFoundError: If the hub has no such model or revision, or cannot be asked.
    """
    path = Path(name)
    if not isinstance(name, str) or path.is_dir() or path.parent.is_dir():
        return path
    if not _NAME.fullmatch(name):
        return path
    access = access or HubAccess()
    try:
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=list(_FILES),
                ignore_patterns=list(_CHECKPOINTS),
                **access.keywords(),
            )
        )
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise FileNotFoundError(
            f"{name!r} is no folder here, and as a model of the hub"
            f"{f' at revision {revision!r}' if revision else ''} it cannot be had: {reason[0]}; "
            "expected a folder written by save_pretrained or owner/name; check name, revision and "
            "token"
        ) from error
