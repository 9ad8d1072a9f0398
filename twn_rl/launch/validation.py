"""What a run measures its checkpoints on, by its settings."""

from __future__ import annotations

from typing import Any

from twn_rl.evaluation.validation import Validation
from twn_rl.launch.arguments import DataArguments
from twn_rl.training.settings import REWARD


def validation_of(data: DataArguments, training: Any) -> Validation | None:
    """Return what checkpoints are measured on while a run trains; None if it does not ask.

    Args:
        data: Records; their split "validation" is read.
        training: `TrainingSettings` of the run. Chosen by reward, checkpoints need no validation
            records; if there are some, they are measured on them all the same.

    Raises:
        ValueError: If the run asks for them and there are none.
    """
    if training.eval_strategy == "no":
        return None
    limit, is_needed = training.validation_records, training.metric_for_best_model != REWARD
    if not limit or not (is_needed or data.has("validation")):
        return Validation(())
    records = data.load("validation")
    count = min(limit, len(records))
    spread = [records[row * len(records) // count] for row in range(count)]
    return Validation(spread, training.per_device_eval_batch_size)
