"""What the report says of the run it is about: model, date, data, commit, settings."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

from twn_rl.launch.arguments import DataArguments
from twn_rl.modeling.config import CONFIG_FILE, TwnConfig


def report_facts(
    output: Path, model: str, data: DataArguments, *, queries: dict[str, int]
) -> tuple[dict[str, str], str]:
    """Return facts by name, and all settings as text.

    Args:
        output: Folder that `save_run` has written to.
        model: Folder or name of the model that was measured.
        data: Its records.
        queries: Split -> number of queries.
    """
    facts = {"model": model}
    if (Path(model) / CONFIG_FILE).is_file():
        config = TwnConfig.load(model)
        facts["backbone"] = Path(config.backbone or "unknown").name
        facts["adapters"] = (
            f"ranks {config.reasoning_lora.r} and {config.embedding_lora.r}, "
            f"{config.num_readout_tokens} read-outs"
        )
        if config.gate_threshold is not None:
            facts["gate"] = f"thinks above {config.gate_threshold:.3f}"
    environment = json.loads((output / "environment.json").read_text(encoding="utf-8"))
    facts["date"] = f"{datetime.now():%d %B %Y, %H:%M}"
    named = [str(value) for name, value in vars(data).items() if name.endswith("_file") and value]
    source = "embedded emoji scenes" if data.is_demo() else ", ".join(named)
    facts["data"] = f"{source}: " + ", ".join(f"{n} of {name}" for name, n in queries.items())
    facts["commit"] = (environment["git_commit"] or "none")[:7]
    facts["packages"] = ", ".join(
        f"{name} {environment['packages'][name]}" for name in ("torch", "transformers")
    )
    return facts, (output / "run.yaml").read_text(encoding="utf-8")
