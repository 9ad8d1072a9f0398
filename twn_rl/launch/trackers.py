"""Results of an evaluation for the trackers that people watch runs in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from twn_rl.runtime.nearest import hint


def check_trackers(names: Sequence[str]) -> list[str]:
    """Return the trackers of `--report_to`, without "none".

    Raises:
        ValueError: For an unknown name.
    """
    known = [str(name) for name in LOGGER_TYPE_TO_CLASS]
    for name in names:
        if name not in (*known, "none"):
            raise ValueError(
                f"report_to = {name!r}; expected none or some of {sorted(known)}"
                f"{hint(name, known)} Correct the name"
            )
    return [name for name in names if name != "none"]


def track_metrics(names: Sequence[str], output: Path, metrics: Mapping[str, float]) -> None:
    """Log flat metrics once, as `evaluation/<name>`, to trackers.

    Args:
        names: Trackers, by the names that training takes, such as tensorboard.
        output: Folder of the evaluation; TensorBoard writes to `runs` in it.
        metrics: Name -> value.
    """
    values = {f"evaluation/{name}": float(value) for name, value in metrics.items()}
    for name in check_trackers(names):
        kind = LOGGER_TYPE_TO_CLASS[name]
        place = {"logging_dir": str(output)} if kind.requires_logging_directory else {}
        tracker = kind("runs", **place)
        tracker.start()
        tracker.log(values, step=0)
        tracker.finish()
