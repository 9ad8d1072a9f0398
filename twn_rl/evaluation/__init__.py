"""Measuring retrieval with and without thinking; knows no training.

`evaluate` ranks every record's positive among candidates under several modes, `Evaluation` is its
result on disk, `write_report` (in `twn_rl.evaluation.report`) draws results as one HTML file.
"""

from twn_rl.evaluation.modes import ABLATIONS, MODES
from twn_rl.evaluation.results import Evaluation, merge_evaluations
from twn_rl.evaluation.runner import EvaluationSettings, evaluate

__all__ = [
    "ABLATIONS",
    "MODES",
    "Evaluation",
    "EvaluationSettings",
    "evaluate",
    "merge_evaluations",
]
