"""What a model is worth, with thoughts and without, and what its thoughts cost.

Results per query, thresholds of thinking, tables over seeds, the report (`report/`), named
benchmarks (`mteb/`, `mmeb_v2/`). Vectors come from `twn_rl.inference`, so that what is measured
is what serves. Refuses to know losses, trainers and rewards.
"""

from twn_rl.evaluation.evaluate import EvaluationSettings, evaluate
from twn_rl.evaluation.modes import ABLATIONS, MODES
from twn_rl.evaluation.results import Evaluation, merge_evaluations

__all__ = [
    "ABLATIONS",
    "MODES",
    "Evaluation",
    "EvaluationSettings",
    "evaluate",
    "merge_evaluations",
]
