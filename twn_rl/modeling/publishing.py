"""A model's folder -> a repository on the Hugging Face hub: its own files, nothing else of a run.

Settings of runs, logs, optimizers, vectors and pickles stay here, and so do paths of this machine.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from twn_rl.modeling.backbone_names import forget_way
from twn_rl.modeling.config import CONFIG_FILE
from twn_rl.modeling.model_card import CARD_FILE

# A backbone inside the folder, as `twn-rl export --to sentence-transformers` puts it, is included.
_FOLDERS = ("reasoning", "embedding", "backbone")
_NAMES = ("*.safetensors", "twn_config.json", "modules.json", "config_sentence_transformers.json")
_ADAPTER_CONFIG = "adapter_config.json"


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Add model",
    token: str | bool | None = None,
    private: bool | None = None,
    exist_ok: bool = True,
    replace_model_card: bool = True,
    revision: str | None = None,
    create_pr: bool = False,
) -> str:
    """Upload a model, its repository made if needed; return the address of the commit.

    Args:
        folder: Folder of a model; of a run, only the model is taken.
        repo_id: "owner/name"; without an owner the token's.
        commit_message: What the commit says.
        token: Access token that may write; None takes the stored one.
        private: Make a new repository private; None takes the owner's default.
        exist_ok: Go on if the repository exists.
        replace_model_card: Replace a card that is there.
        revision: Branch to push to, made if needed; None is the main one.
        create_pr: Open a pull request instead of pushing.

    Raises:
        FileNotFoundError: If the folder holds no model.
        OSError: If the hub refuses; the message says what.
    """
    folder = Path(folder)
    if not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(
            f"{folder / CONFIG_FILE} does not exist; expected the folder of a model; check the path"
        )
    api = HfApi(token=token)
    try:
        made = api.create_repo(repo_id, private=private, exist_ok=exist_ok or create_pr)
        name = made.repo_id
        if revision is not None:
            api.create_branch(name, branch=revision, exist_ok=True)
        has_card = not replace_model_card and api.file_exists(name, CARD_FILE, revision=revision)
        with TemporaryDirectory() as aside:
            copy_model(folder, Path(aside))
            if has_card:
                (Path(aside) / CARD_FILE).unlink(missing_ok=True)
            commit = api.upload_folder(
                repo_id=name,
                folder_path=aside,
                commit_message=commit_message,
                revision=revision,
                create_pr=create_pr,
            )
    except (HfHubHTTPError, HFValidationError, LocalTokenNotFoundError, OSError) as error:
        reason = " ".join(str(error).split())
        raise OSError(
            f"the model cannot be pushed to {repo_id!r}: {reason}; expected a hub that takes it; "
            "check the name, the network, and a token that may write (hf auth login or HF_TOKEN)"
        ) from error
    return str(commit.pr_url if create_pr else commit.commit_url)


def copy_model(folder: Path, target: Path) -> None:
    """Copy the files of a model, its backbone named without a way through this machine."""
    files = [file for pattern in (*_NAMES, CARD_FILE) for file in folder.glob(pattern)]
    files += [file for name in _FOLDERS for file in (folder / name).glob("*")]
    for file in files:
        if file.is_file():
            copy = target / file.relative_to(folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(file, copy)
    forget_ways(target, folder)


def forget_ways(target: Path, folder: Path) -> None:
    """Name the backbone of a copied model without the way to it from the original's folder."""
    forget_way(target / CONFIG_FILE, "backbone", folder)
    for config in target.glob(f"*/{_ADAPTER_CONFIG}"):
        forget_way(config, "base_model_name_or_path", folder)
