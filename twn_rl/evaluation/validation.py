"""How well a model retrieves while it is trained: hit@1 on validation records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twn_rl.data.record import Record
from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.modeling.config import TwnConfig
from twn_rl.modeling.model import DualLoraModel

SPLIT = "validation"


@dataclass(frozen=True)
class Validation:
    """Records that a trainer measures its model on; given to it as `eval_dataset`.

    Attributes:
        records: What is embedded and ranked, against the targets and negatives of these records
            alone; none measures nothing.
        batch_size: Queries or targets a forward.
    """

    records: Sequence[Record]
    batch_size: int = 32

    def __len__(self) -> int:
        """Return the number of records."""
        return len(self.records)

    def measure(self, model: DualLoraModel) -> dict[str, float]:
        """Return "hit@1" and "no_think_hit@1", each in [0, 1]; {} without records.

        Thoughts are written greedily, so that no random number is drawn. Runs in one process.

        Args:
            model: Unwrapped model; its training mode is restored.
        """
        if not self.records:
            return {}
        mode = thinking_mode(model.config)
        settings = EvaluationSettings(
            split=SPLIT,
            modes=("never", mode),
            batch_size=self.batch_size,
            show_progress_bar=False,
        )
        metrics = evaluate(model, self.records, settings).metrics
        names = {"hit@1": mode, "no_think_hit@1": "never"}
        return {name: metrics[f"{SPLIT}/all/{way}/hit@1"] for name, way in names.items()}


def thinking_mode(config: TwnConfig) -> str:
    """Return the mode in which a model in training thinks: by its policy, latently, or always.

    A gate decides only after training.
    """
    if config.thinking_decision == "policy":
        return "policy"
    return "latent" if config.num_reason_tokens else "always"
