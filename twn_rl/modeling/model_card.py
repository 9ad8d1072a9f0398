"""`README.md` of a model's folder: what the model is, from what lies beside it.

Every figure comes from a file that a run wrote, with the commit and the spread it has there; what
is not known is said to be unknown. Runs and measures nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from twn_rl.modeling.backbone_names import plain_name
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.gate_files import GATE_FILE
from twn_rl.modeling.lineage import read_run, stage_of, start_of
from twn_rl.runtime.whole_files import read_json, write_text

CARD_FILE = "README.md"
# Only a card with this line is written anew.
_MARK = (
    "<!-- Written by twn_rl from the files beside it. Remove this line to keep your changes. -->"
)
# Stage of a run -> how the model was trained.
_METHODS = {
    "warm start": "supervised warm start: token loss on thoughts, contrast with and without them",
    "GRPO": "GRPO on the thoughts, rewarded by retrieval (arXiv 2605.14448)",
    "adaptive GRPO": "adaptive GRPO: the policy decides whether to think (arXiv 2604.06156)",
    "latent thoughts": "latent thoughts in learned reason tokens (arXiv 2606.13061)",
    "expert iteration": "expert iteration on the policy's best thoughts (arXiv 2304.06767)",
    "embedding alone": "the embedding adapter alone, contrast with and without own thoughts",
    "reasoning alone": "the reasoning adapter alone, token loss on thoughts",
}
_FILES = ("train_file", "rl_file", "gate_file", "validation_file", "test_file", "ood_file")
_MODES = ("never", "always", "auto", "auto_better", "policy", "latent")


@dataclass
class CardNotes:
    """What a card says beyond the folder; set these before saving.

    Attributes:
        base_model: The backbone, as the model's settings name it.
        license: Of the adapters, as the hub abbreviates it; None is said to be not chosen.
        train_datasets: Names of what the model was trained on.
        evaluations: Name of an evaluator of sentence-transformers -> what it found last.
    """

    base_model: str = ""
    license: str | None = None
    train_datasets: list[str] = field(default_factory=list)
    evaluations: dict[str, dict[str, float]] = field(default_factory=dict)

    def set_evaluation_metrics(
        self, evaluator: Any, metrics: Mapping[str, Any], epoch: int = 0, step: int = 0
    ) -> None:
        """Note what an evaluator found; evaluators call it at their end."""
        name = getattr(evaluator, "name", "") or type(evaluator).__name__
        self.evaluations[name] = {key: float(value) for key, value in metrics.items()}


def write_card(
    folder: str | Path,
    *,
    name: str | None = None,
    run: str | Path | None = None,
    notes: CardNotes | None = None,
) -> bool:
    """Write the card of a model's folder; tell whether it did. A card of somebody else stays.

    Args:
        folder: Folder of a model.
        name: What to load it by; its folder's name if None.
        run: Folder of the run that made the model, if that is another.
        notes: What is known besides.
    """
    folder = Path(folder)
    card = folder / CARD_FILE
    if card.is_file() and _MARK not in card.read_text("utf-8"):
        return False
    config = TwnConfig.load(folder)
    notes = notes or CardNotes()
    source = Path(run or folder)
    settings = read_run(source)
    if notes.license is None:
        notes = replace(notes, license=_license(settings))
    parts = [
        _front_matter(config, notes),
        _MARK,
        f"# {name or folder.resolve().name}",
        "A model that makes vectors of texts and pictures, and thinks first where that helps. Two "
        "adapters (LoRA) lie on a frozen backbone: one writes thoughts, one makes vectors.",
        _facts(config, settings, notes, has_gate=(folder / GATE_FILE).is_file()),
        _usage(name or folder.resolve().name),
        _metrics(source, notes),
        _limits(config),
    ]
    write_text(card, "\n\n".join(parts) + "\n")
    return True


def _license(settings: Mapping[str, Any]) -> str | None:
    """Return the licence that the run's trainer was given."""
    given = [trainer.get("license") for trainer in settings.values() if trainer]
    return next(filter(None, given), None)


def _front_matter(config: TwnConfig, notes: CardNotes) -> str:
    backbone = plain_name(config.backbone)
    on_hub = backbone == config.backbone and backbone.count("/") == 1
    data: dict[str, Any] = {
        "library_name": "sentence-transformers",
        "pipeline_tag": "sentence-similarity",
        "tags": ["sentence-transformers", "feature-extraction", "multimodal", "twn_rl"],
        **({"license": notes.license} if notes.license else {}),
        **({"base_model": backbone, "base_model_relation": "adapter"} if on_hub else {}),
        **({"datasets": notes.train_datasets} if notes.train_datasets else {}),
    }
    return f"---\n{yaml.safe_dump(data, sort_keys=False)}---"


def _facts(
    config: TwnConfig, settings: Mapping[str, Any], notes: CardNotes, *, has_gate: bool
) -> str:
    stage, start = stage_of(settings), start_of(settings)
    data = settings.get("DataArguments", {})
    files = sorted({Path(data[key]).name for key in _FILES if data.get(key)})
    if notes.train_datasets:
        files = [*notes.train_datasets, *files]
    elif data and not files:
        files = ["the emoji scenes that twn_rl draws itself"]
    latent = f", {config.num_reason_tokens} reason tokens" if config.num_reason_tokens else ""
    gate = f"fitted; thinks above a probability of {config.gate_threshold}" if has_gate else "none"
    if config.thinking_decision == "policy":
        gate += f"; the policy decides, above {config.policy_threshold}"
    rows = [
        ("Method", _METHODS[stage] if stage else "not recorded"),
        *([("Went on from", f"`{Path(start).name}`")] if start else []),
        ("Backbone", f"`{plain_name(config.backbone) or 'built in code'}`"),
        ("Revision of the backbone", config.backbone_revision or "not pinned"),
        ("Data", ", ".join(files) or "not recorded"),
        ("Interface", f"{config.interface}, {config.num_readout_tokens} read-out tokens{latent}"),
        ("Ranks", f"reasoning {config.reasoning_lora.r}, embedding {config.embedding_lora.r}"),
        ("Gate", gate),
        ("Longest thought", f"{config.max_think_tokens} tokens"),
        (
            "Licence",
            notes.license or "not chosen; the backbone's own licence holds for the backbone",
        ),
        ("Versions", ", ".join(f"{k} {v}" for k, v in config.versions.items()) or "not recorded"),
    ]
    return _table(("", ""), rows)


def _usage(name: str) -> str:
    return f"""## Load

```python
from twn_rl import ThinkingEmbedder

model = ThinkingEmbedder.from_pretrained("{name}")
vectors = model.encode_query(["a question"], think="never")
```

With sentence-transformers, in which it gives the same vectors:

```python
from sentence_transformers import SentenceTransformer

import twn_rl  # tells sentence-transformers the class

model = SentenceTransformer("{name}")
vectors = model.encode_query(["a question"], think="never")
```

`think="auto"`, the default of queries, asks the gate and needs one."""


def _metrics(run: Path, notes: CardNotes) -> str:
    """Return the tables of figures: of the run's own evaluation, and of noted evaluators."""
    metrics = read_json(run / "evaluation" / "metrics.json") or {}
    rows = []
    for key in (key for key in metrics if key.endswith("/hit@1") and key.count("/") == 3):
        split, group, mode, _ = key.split("/")
        if group == "all" and mode in _MODES:
            cell = f"{split}/{group}/{mode}"
            rows.append((split, mode, *_figures(metrics, cell)))
    text = "## Figures\n\n"
    if rows:
        made = read_json(run / "evaluation" / "environment.json") or {}
        header = ("split", "thinks", "hit@1 in %", "queries", "think rate", "think tokens")
        text += (
            f"{_table(header, rows)}\n\n"
            "In brackets: 95 % bootstrap interval over the queries of this one model; how much "
            "another seed would change it is not in there. Labels are those of the splits' files. "
            f"Measured at commit {made.get('git_commit') or 'not recorded'}."
        )
    else:
        text += "No evaluation lies beside this model."
    for name, found in notes.evaluations.items():
        lines = [(key, f"{value:.4f}") for key, value in found.items()]
        text += f"\n\nsentence-transformers' evaluator `{name}`:\n\n{_table(('', ''), lines)}"
    return text


def _figures(metrics: Mapping[str, float], cell: str) -> tuple[str, ...]:
    low, high = (metrics.get(f"{cell}/hit@1_{end}") for end in ("low", "high"))
    spread = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return (
        f"{100 * metrics[f'{cell}/hit@1']:.1f}{spread}",
        f"{metrics.get(f'{cell}/num_queries', 0):.0f}",
        f"{metrics.get(f'{cell}/think_rate', 0):.2f}",
        f"{metrics.get(f'{cell}/think_tokens', 0):.1f}",
    )


def _limits(config: TwnConfig) -> str:
    length = f"{config.max_length} tokens" if config.max_length else "the backbone's context"
    pixels = (
        f"{config.max_image_pixels} pixels" if config.max_image_pixels else "no number of pixels"
    )
    return (
        "## Limits\n\n"
        f"Texts are cut to {length} and pictures are scaled to {pixels}. Vectors mean something "
        "only with this backbone and these adapters. A thought may be wrong and its vector then "
        "be worse than the one without it; nothing outside of the data above was measured."
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
