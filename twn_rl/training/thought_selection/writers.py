"""Drafts that exist already, in files or in memory, and those that a reasoning adapter writes."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from twn_rl.data.chat import Renderer
from twn_rl.data.jsonl import parse_json
from twn_rl.data.markup import KNOWN_MARKUP, Markup, unusable_in
from twn_rl.data.record import Record, RecordError
from twn_rl.modeling.fingerprints import Fingerprints
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.reading import regular_file
from twn_rl.runtime.whole_files import digest
from twn_rl.training.thought_selection.drafts import Draft, SelectionError, problem_of

logger = logging.getLogger(__name__)

Cots = Mapping[str, Sequence[tuple[str, str]]]  # record id -> (source, CoT) pairs


class ListedDrafts:
    """CoTs that exist already: from a file, from the records, or from the demo's teachers."""

    shard_size = 4096

    def __init__(
        self, name: str, cots: Cots, renderer: Renderer, markup: Markup = KNOWN_MARKUP
    ) -> None:
        """Hold CoTs in their order; ids without any may be missing."""
        self.name, self._cots, self._renderer, self._markup = name, cots, renderer, markup
        self.plan: dict[str, Any] = {"cots": digest(cots), "renderer": renderer.to_dict()}

    def write(self, records: Sequence[Record]) -> list[list[Draft]]:
        """Return the listed drafts; blank ones and those with markup have a problem."""
        return [
            [
                Draft(cot, source, problem_of(cot, self._renderer, self._markup))
                for source, cot in self._cots.get(record.id, [])
            ]
            for record in records
        ]


def read_draft_file(
    path: str | Path, ids: Collection[str], *, on_bad_row: str = "raise"
) -> tuple[dict[str, list[tuple[str, str]]], Counter[str]]:
    """Return the CoTs of a JSON-lines file, and counts of rows left out.

    A row is `{"id": ..., "cot": ...}` and may name its `source`; the default is the file's name.
    The same CoT of the same source twice for one record counts once ("duplicate"). Blank CoTs are
    kept: they are drafts that will be rejected, and counted there.

    Args:
        path: The file.
        ids: Ids of the records.
        on_bad_row: "raise" stops at a row that is damaged or names no record; "skip" counts it.

    Raises:
        SelectionError: For a bad row under "raise"; always if no row is about any record.
    """
    path, wanted = Path(path), frozenset(ids)
    cots: dict[str, dict[tuple[str, str], None]] = {}
    skipped: Counter[str] = Counter()
    problems: list[str] = []
    unknown: list[str] = []
    with regular_file(path).open(encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = _checked_row(parse_json(line, field=None))
            except ValueError as error:
                skipped["bad_row"] += 1
                problems.append(f"line {number}: {error}")
                continue
            if row["id"] not in wanted:
                skipped["unknown_id"] += 1
                unknown.append(row["id"])
                continue
            found = cots.setdefault(row["id"], {})
            key = (str(row.get("source") or path.stem), row["cot"])
            skipped["duplicate"] += key in found
            found[key] = None
    if unknown:
        problems.append(f"{len(unknown)} rows are about no record: ids {unknown[:3]}")
    if problems and (on_bad_row == "raise" or not cots):
        raise SelectionError(
            f"{path}: {'; '.join(problems[:3])}; expected rows {{id, cot[, source]}} with ids of "
            f"the records, such as {sorted(wanted)[:2]}; correct the file"
            + (" or pass --on_bad_record skip" if cots else "")
        )
    if not cots:
        raise SelectionError(f"{path} holds no rows; expected {{id, cot[, source]}}; fill it")
    skipped = +skipped
    if skipped:
        logger.warning("%s: rows left out: %s", path, dict(skipped))
    return {key: list(pairs) for key, pairs in cots.items()}, skipped


def _checked_row(row: Any) -> dict[str, Any]:
    if isinstance(row, RecordError):
        raise row
    if not isinstance(row, dict):
        raise ValueError(f"{type(row).__name__}, expected an object")
    wrong = [name for name in ("id", "cot") if not isinstance(row.get(name), str)]
    if wrong:
        raise ValueError(f"{wrong} missing or no string")
    bad = unusable_in(row, "row")
    if bad:
        raise ValueError(f"{bad[0]} holds {bad[1]}, expected text without it")
    return row


class AdapterWriter:
    """CoTs of a model's own reasoning adapter at several temperatures."""

    shard_size = 256

    def __init__(
        self,
        model: DualLoraModel,
        name: str,
        *,
        temperatures: Sequence[float],
        num_thoughts: int = 1,
        max_think_tokens: int | None = None,
        batch_size: int = 32,
        seed: int = 0,
    ) -> None:
        """Hold settings.

        Args:
            model: Any model; another checkpoint is another writer.
            name: Of its folder; drafts are called `name@temperature`.
            temperatures: One or more; 0 is greedy and writes one CoT.
            num_thoughts: CoTs for each temperature above 0.
            max_think_tokens: Budget; the model's if None.
            batch_size: Queries a forward; does not change what is written.
            seed: Makes sampling repeatable, whatever the batches.
        """
        self.model, self.name, self.batch_size = model, name, batch_size
        self.temperatures, self.num_thoughts, self.seed = temperatures, num_thoughts, seed
        self.max_think_tokens = max_think_tokens
        self.plan: dict[str, Any] = {
            "writer": Fingerprints(model).thoughts,
            "temperatures": list(temperatures),
            "num_thoughts": num_thoughts,
            "max_think_tokens": max_think_tokens or model.config.max_think_tokens,
            "seed": seed,
        }

    def write(self, records: Sequence[Record]) -> list[list[Draft]]:
        """Return the drafts about each record, malformed and truncated ones marked."""
        written: list[list[Draft]] = [[] for _ in records]
        renderer = self.model.renderer
        markup = self.model.backbone.markup(renderer)
        for start in range(0, len(records), self.batch_size):
            batch = records[start : start + self.batch_size]
            prompts = self.model.prepare(self.model.collate([record.query for record in batch]))
            for temperature in self.temperatures:
                count = self.num_thoughts if temperature else 1
                ids = self.model.reason(
                    prompts,
                    max_think_tokens=self.max_think_tokens,
                    do_sample=temperature > 0,
                    temperature=temperature or 1.0,
                    num_thoughts=count,
                    seeds=[self._die(record, temperature) for record in batch],
                )
                for row, completion in enumerate(ids):
                    think = self.model.think(completion)
                    source = f"{self.name}@{temperature:g}"
                    # Letters can spell markup that its tokens could not write.
                    problem = think.problem or problem_of(think.text, renderer, markup)
                    draft = Draft(think.text, source, problem)
                    written[start + row // count].append(draft)
        return written

    def _die(self, record: Record, temperature: float) -> int:
        text = f"{self.seed}/{record.id}/{temperature:g}"
        return int(hashlib.sha256(text.encode()).hexdigest()[:8], 16)
