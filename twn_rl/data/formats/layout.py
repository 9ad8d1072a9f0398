"""Which files of a folder hold which subset and split, in the layouts the hub and `datasets` write.

`SUBSET/SPLIT-00000-of-00001.parquet`, `data/SPLIT-*.parquet`, `SUBSET/SPLIT/0000.parquet`,
`SPLIT/data-*.arrow`, `SUBSET/SPLIT.jsonl`, and plain folders of `SUBSET.json`.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from twn_rl.data.record import RecordError

SUFFIXES = (".jsonl", ".json", ".parquet", ".arrow")
# Files that datasets and the hub put beside the data.
_NOT_DATA = {"dataset_info.json", "dataset_infos.json", "dataset_dict.json", "state.json"}
_SHARD = re.compile(r"(?P<split>.+?)-\d{5}-of-\d{5}(?:-[0-9a-f]+)?")
_SPLITS = {"train", "validation", "val", "valid", "dev", "test", "original", "diverse_instruction"}


class DataFile(NamedTuple):
    """A file of rows, with the subset and split it belongs to (None: it tells no split)."""

    path: Path
    subset: str
    split: str | None


def find_files(
    path: Path,
    *,
    subset: Sequence[str] = (),
    split: str | None = None,
    any_split: bool = False,
    without: Path | None = None,
) -> list[DataFile]:
    """Return the data files at `path`, a file or a folder, sorted; one split of each subset.

    Args:
        path: File, or folder that is searched with all folders in it.
        subset: Keep these subsets; empty keeps all.
        split: Keep this split; None where every subset has one only.
        any_split: Keep the files of all splits, where `split` is None.
        without: File to leave out, such as an output that lies in the folder.

    Raises:
        RecordError: If nothing fits, a wanted subset is missing, or the split must be chosen.
        FileNotFoundError: If there is no such path.
    """
    if not path.exists():
        raise FileNotFoundError(f"input = {str(path)!r} does not exist; expected a file or folder")
    if path.is_file() and path.suffix not in SUFFIXES:
        raise RecordError(
            f"suffix = {path.suffix!r}; expected one of {', '.join(SUFFIXES)}; convert the file",
            reason="bad_file",
            file=path,
        )
    folder = path if path.is_dir() else path.parent
    paths = (
        [file for file in sorted(path.rglob("*")) if _is_data(file, path) and file != without]
        if path.is_dir()
        else [path]
    )
    everything = [_describe(file, folder) for file in paths]
    files = [file for file in everything if not subset or file.subset in subset]
    _refuse_missing(path, everything, subset)
    if split is not None:
        # A file that tells no split is the caller's own choice when it is named alone.
        accepted = (split, None) if path.is_file() else (split,)
        files = [file for file in files if file.split in accepted]
    if not files:
        raise RecordError(
            f"split = {split!r}: no data files; expected {_splits(everything) or 'none'} in "
            f"{', '.join(SUFFIXES)}; choose a split that is there or another folder",
            reason="no_records",
            file=path,
        )
    for name in () if any_split else {file.subset for file in files}:
        splits = _splits([file for file in files if file.subset == name])
        if len(splits) > 1:
            raise RecordError(
                f"subset = {name!r} has the splits {splits}; expected one; choose it by split",
                reason="ambiguous_split",
                file=path,
            )
    return files


def _describe(path: Path, folder: Path) -> DataFile:
    """Tell subset and split from the names of a file and of the folders it lies in."""
    folders = list(path.relative_to(folder).parts[:-1])
    shard = _SHARD.fullmatch(path.stem)
    stem = shard["split"] if shard else path.stem
    split: str | None = None
    if folders and (stem.isdigit() or (stem == "data" and path.suffix == ".arrow")):
        split = folders.pop()
    elif shard or stem in _SPLITS:
        split = stem
    else:
        folders.append(stem)
    names = [name for name in folders if name not in ("data", "default")]
    return DataFile(path, "/".join(names) or folder.resolve().name, split)


def _is_data(path: Path, folder: Path) -> bool:
    parts = path.relative_to(folder).parts
    is_hidden = any(part.startswith(".") for part in parts)
    return (
        path.suffix in SUFFIXES and path.name not in _NOT_DATA and not is_hidden and path.is_file()
    )


def _refuse_missing(path: Path, files: Sequence[DataFile], subset: Sequence[str]) -> None:
    there = sorted({file.subset for file in files})
    missing = [name for name in subset if name not in there]
    if missing:
        raise RecordError(
            f"subset = {missing} not found; expected some of {there}; correct the name",
            reason="no_records",
            file=path,
        )


def _splits(files: Sequence[DataFile]) -> list[str]:
    return sorted({file.split for file in files if file.split is not None})
