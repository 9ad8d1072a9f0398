"""Which runs made a model: the `run.yaml` beside it names the model that its run went on from."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from twn_rl.runtime.reading import load_yaml

logger = logging.getLogger(__name__)

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
_ALONE = {"embedding": "embedding alone", "reasoning": "reasoning alone"}
# Stages that change thoughts: what learns to read them afterwards is a refit.
_RL = ("GRPO", "adaptive GRPO", "expert iteration")


def read_run(folder: str | Path) -> dict[str, Any]:
    """Return the settings of the run that wrote a folder, by the name of their class; or none.

    A file that holds something else is left out, with a warning.
    """
    file = Path(folder) / RUN_FILE
    if not file.is_file():
        return {}
    try:
        settings = load_yaml(file)
    except ValueError as error:
        logger.warning("%s; how this model was trained is not told", error)
        return {}
    if isinstance(settings, dict):
        return settings
    logger.warning("%s holds no settings; how this model was trained is not told", file)
    return {}


def stage_of(settings: Mapping[str, Any]) -> str | None:
    """Return what the stage of these settings is called.

    >>> stage_of({"SftConfig": {}, "SftScriptArguments": {"train_adapters": "embedding"}})
    'embedding alone'
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

    A model that has been moved is followed to what lies beside it, if the one it went on from
    does. The embedding adapter alone after RL is a refit.
    """
    found: list[tuple[str, Path]] = []
    here: Path | None = Path(folder)
    while here is not None and here not in (place for _, place in found):
        settings = read_run(here)
        found.append((stage_of(settings) or here.name, here))
        given = start_of(settings)
        options = [Path(given), here.parent / Path(given).name] if given else []
        if _was_moved(settings, here):  # another run may lie where it came from
            options.reverse()
        here = next((option for option in options if (option / RUN_FILE).is_file()), None)
    stages: dict[str, Path] = {}
    for stage, place in reversed(found):
        is_refit = stage == _ALONE["embedding"] and any(name in stages for name in _RL)
        name = "refit" if is_refit else stage
        again = sum(key == name or key.startswith(f"{name} (") for key in stages)
        stages[f"{name} ({again + 1})" if again else name] = place
    return stages


def _was_moved(settings: Mapping[str, Any], folder: Path) -> bool:
    written = [trainer.get("output_dir") for trainer in settings.values() if trainer]
    return any(Path(there).resolve() != folder.resolve() for there in written if there)


def _scripts(settings: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value or {} for name, value in settings.items() if name.endswith("Arguments")]
