"""Splits of records made of WordNet, as files, with the settings that they were made by."""

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from twn_rl.data.record import Record
from twn_rl.data.record_files import write_records
from twn_rl.runtime.log_levels import NOTICE
from twn_rl.runtime.whole_files import write_text

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

logger = logging.getLogger(__name__)

SPLITS = ("train", "rl", "validation", "test", "ood")
SETTINGS_FILE = "settings.json"


def write_splits(
    directory: str | Path, records: Mapping[str, Sequence[Record]], settings: "DataclassInstance"
) -> dict[str, Path]:
    """Write every split as JSON lines below `directory`, log its size and return split -> file."""
    files = {split: Path(directory) / f"{split}.jsonl" for split in records}
    for split, members in records.items():
        write_records(files[split], members)
        alone = sum(not record.negatives for record in members)
        mean = sum(len(record.negatives) for record in members) / len(members)
        logger.log(
            NOTICE,
            "%s: %d records, %.1f negatives each, %d without any",
            files[split],
            len(members),
            mean,
            alone,
        )
    write_text(Path(directory) / SETTINGS_FILE, json.dumps(asdict(settings), indent=1) + "\n")
    return files
