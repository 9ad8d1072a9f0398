"""Which runs made a model: the `run.yaml` beside it names the model that its run went on from."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

RUN_FILE = "run.yaml"
# Settings of a run -> what its stage is called.
_STAGES = {
    "SftConfig": "warm start",
    "EmbedGRPOConfig": "GRPO",
    "AdaptiveGRPOConfig": "adaptive GRPO",
    "LatentConfig": "latent thoughts",
    "ExpertIterationConfig": "expert iteration",
}
# The warm start's trainer with one adapter alone, by its choice.
_ALONE = {"embedding": "refit", "reasoning": "reasoning alone"}


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a folder, by the name of their class; or none."""
    file = Path(folder) / RUN_FILE
    return (yaml.safe_load(file.read_text("utf-8")) or {}) if file.is_file() else {}


def stage_of(settings: Mapping[str, Any]) -> str | None:
    """Return what the stage of these settings is called.

    >>> stage_of({"SftConfig": {}, "SftScriptArguments": {"train_adapters": "embedding"}})
    'refit'
    """
    alone = [script.get("train_adapters") for script in _scripts(settings)]
    named = [_STAGES[name] for name in settings if name in _STAGES]
    return next((_ALONE[choice] for choice in alone if choice in _ALONE), next(iter(named), None))


def start_of(settings: Mapping[str, Any]) -> str | None:
    """Return the model that a run of these settings went on from, as it was given."""
    starts = [s.get("checkpoint") or s.get("warm_start") for s in _scripts(settings)]
    return next(filter(None, starts), None)


def lineage(folder: str | Path) -> dict[str, Path]:
    """Return the stages of a model by name, the first one first, as far back as they can be found.

    A model that has been moved is followed if the one it went on from lies beside it.
    """
    found: list[tuple[str, Path]] = []
    here: Path | None = Path(folder)
    while here is not None and here not in (place for _, place in found):
        settings = read_run(here)
        found.append((stage_of(settings) or here.name, here))
        given = start_of(settings)
        options = [Path(given), here.parent / Path(given).name] if given else []
        here = next((option for option in options if (option / RUN_FILE).is_file()), None)
    stages: dict[str, Path] = {}
    for name, place in reversed(found):
        again = sum(key == name or key.startswith(f"{name} (") for key in stages)
        stages[f"{name} ({again + 1})" if again else name] = place
    return stages


def _scripts(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value or {} for name, value in settings.items() if name.endswith("Arguments")]
