"""The 78 tasks of MMEB-V2 as one table: group, metric, source, candidates, instructions.

`tasks.csv` follows the official configuration (TIGER-AI-Lab/VLM2Vec, January 2026). Empty
instructions of image tasks stand in the rows of the data; other empty ones are none. Assumed, as
the official configuration does not say it: the names of the folders with the unrepaired page
labels. A file with some of the columns overrides cells of the table (`load_tasks`).
"""

import csv
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from importlib import resources
from pathlib import Path
from typing import Any, Literal, get_args

Group = Literal["image", "video", "visdoc"]
Candidates = Literal["local", "global"]
LabelSet = Literal["page-fixed", "original"]

GROUPS = get_args(Group)
LABEL_SETS = get_args(LabelSet)
MAIN_METRICS = {"image": "hit@1", "video": "hit@1", "visdoc": "ndcg_linear@5"}
FIXED_SUFFIX = "-fixed"
_NUMBERS = {"max_queries": int, "num_queries": int, "num_candidates": int, "reference": float}


@dataclass(frozen=True)
class MmebTask:
    """One task.

    Attributes:
        group: Modality that results are grouped by.
        subgroup: Meta-task, such as I-QA.
        task: Name on the leaderboard.
        metric: The one that counts.
        parser: Which loader reads it.
        candidates: "local": each query has its own; "global": all queries share them.
        hf_path: Repository of its annotations.
        hf_config: Its subset there, if it has one.
        hf_split: Its split.
        media_root: Folder of its pictures or frames under the data root.
        query_instruction: Of the query side; empty where the rows bring it.
        query_instruction_image: The same for queries with a picture, where they differ.
        query_instruction_video: The same for queries with a video.
        target_instruction: Of the candidates.
        max_queries: Only the first so many rows count; None: all.
        num_queries: How many the official run has.
        num_candidates: How many labels a task has whose candidates are its labels.
        reference: Score of VLM2Vec-V2.0-2B with repaired labels.
    """

    group: Group
    subgroup: str
    task: str
    metric: str
    parser: str
    candidates: Candidates
    hf_path: str
    hf_config: str | None
    hf_split: str
    media_root: str
    query_instruction: str | None
    query_instruction_image: str | None
    query_instruction_video: str | None
    target_instruction: str | None
    max_queries: int | None
    num_queries: int
    num_candidates: int | None
    reference: float | None

    @property
    def has_page_labels(self) -> bool:
        """Whether its labels were repaired in November 2025 (VLM2Vec, issue 167)."""
        return self.hf_path.endswith(FIXED_SUFFIX)

    def fingerprint(self) -> str:
        """Return a sha256 of what decides its score: everything but the reference."""
        data = {name: value for name, value in asdict(self).items() if name != "reference"}
        return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def load_tasks(overrides: str | Path | None = None) -> dict[str, MmebTask]:
    """Return all tasks by name, in the order of the leaderboard.

    >>> tasks = load_tasks()
    >>> len(tasks), tasks["MSVD"].query_instruction
    (78, 'Find the video snippet that corresponds to the given summary:')

    Args:
        overrides: CSV file with the column `task` and any others; its non-empty cells replace those
            of the table.

    Raises:
        ValueError: For an unknown column or task, or a cell that is no number where one belongs.
    """
    table = resources.files("twn_rl.evaluation.mmeb_v2") / "tasks.csv"
    with table.open(encoding="utf-8") as file:
        rows = [_cells(row) for row in csv.DictReader(file)]
    tasks = {row["task"]: MmebTask(**row) for row in rows}
    if overrides is not None:
        with Path(overrides).open(encoding="utf-8-sig", newline="") as file:
            for number, row in enumerate(csv.DictReader(file), start=2):
                name = row.get("task") or ""
                if name not in tasks or set(row) - {field.name for field in fields(MmebTask)}:
                    raise ValueError(
                        f"{overrides}, line {number}: task = {name!r} with the columns "
                        f"{list(map(str, row))}; expected a task of MMEB-V2 and columns of its "
                        "table; correct the file"
                    )
                cells = {key: value for key, value in _cells(row).items() if value is not None}
                tasks[name] = replace(tasks[name], **cells)
    return tasks


def select_tasks(tasks: dict[str, MmebTask], names: Sequence[str] | None) -> list[MmebTask]:
    """Return the tasks of these names, groups ("image") or meta-tasks ("I-QA"); all if None.

    >>> [task.task for task in select_tasks(load_tasks(), ["V-MRET", "MSVD"])]
    ['MSVD', 'QVHighlight', 'Charades-STA', 'MomentSeeker']

    Raises:
        ValueError: If a name is none of these.
    """
    if names is None:
        return list(tasks.values())
    known = {name for task in tasks.values() for name in (task.task, task.group, task.subgroup)}
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(
            f"tasks = {list(names)} has unknown names {unknown}; expected tasks, groups {GROUPS} "
            f"or meta-tasks {list({t.subgroup: None for t in tasks.values()})}; correct them"
        )
    return [t for t in tasks.values() if {t.task, t.group, t.subgroup} & set(names)]


def annotation_names(task: MmebTask, labels: LabelSet) -> list[str]:
    """Return the repositories its annotations may come from under a label set, best first.

    >>> annotation_names(load_tasks()["MMLongBench-page"], "original")
    ['VLM2Vec/MMLongBench-page', 'VLM2Vec/MMLongBench']
    """
    if labels == "page-fixed" or not task.has_page_labels:
        return [task.hf_path]
    name = task.hf_path.removesuffix(FIXED_SUFFIX)
    return [name, name.removesuffix("-page")] if "MMLongBench" in name else [name]


def _cells(row: Mapping[str, str]) -> dict[str, Any]:
    values: dict[str, Any] = {name: text or None for name, text in row.items()}
    for name, number in _NUMBERS.items():
        try:
            values |= {name: number(row[name])} if row.get(name) else {}
        except ValueError as error:
            raise ValueError(
                f"{name} = {row[name]!r}; expected a number; correct the table of tasks"
            ) from error
    return values
