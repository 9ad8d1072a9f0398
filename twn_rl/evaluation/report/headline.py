"""What an evaluation says in one sentence and three numbers."""

from __future__ import annotations

from dataclasses import dataclass

from twn_rl.evaluation.modes import MODE_NAMES
from twn_rl.evaluation.report.tables import splits_of
from twn_rl.evaluation.results import Evaluation

# Who decides when it is served, the first that was measured; then what thinks always.
DECIDING = ("auto", "policy")
THINKING = ("always", "latent")


@dataclass(frozen=True)
class Number:
    """One large number: what it is, its value, and what stands below."""

    label: str
    value: str
    detail: str


@dataclass(frozen=True)
class Headline:
    """The result of the first split.

    Attributes:
        split: Which split.
        sentence: What came out.
        numbers: Quality without and with thinking, and what a query costs.
    """

    split: str
    sentence: str
    numbers: list[Number]


def headline(after: Evaluation, before: Evaluation | None) -> Headline:
    """Return what comes first on the page; of an evaluation without numbers, nothing but words."""
    splits = splits_of(after)
    if not splits:
        return Headline("", "Nothing was measured.", [])
    split = splits[0]
    found = after.metrics
    thinking = next((mode for mode in THINKING if _has(after, split, mode)), None)
    deciding = next((mode for mode in DECIDING if _has(after, split, mode)), None)
    numbers = [
        _quality(after, split, mode, "")
        for mode in ("never", deciding or thinking)
        if mode is not None and _has(after, split, mode)
    ]
    if thinking is None or not _has(after, split, "never"):
        queries = next(v for key, v in found.items() if key.endswith("/num_queries"))
        return Headline(split, f"{queries:.0f} queries of {split} were measured.", numbers)
    sentence = _sentence(after, split, thinking)
    if before is not None and _has(before, split, thinking):
        earlier = _percent(before, split, thinking)
        sentence = f"{sentence[:-1]} ({earlier} before reinforcement learning)."
    served = deciding or thinking
    always, tokens = _tokens(after, split, thinking), _tokens(after, split, served)
    detail = f"{MODE_NAMES[served]}, {split}"
    if deciding is not None:
        share = f"{100 * tokens / always:.0f} %" if always else "as many"
        sentence += (
            f" {'The gate' if deciding == 'auto' else 'The policy'} decides who thinks: "
            f"{_percent(after, split, deciding)} for {share} of the tokens."
        )
        detail = f"{always:.1f} if every query thinks"
    numbers.append(Number("think tokens a query", f"{tokens:.1f}", detail))
    return Headline(split, sentence, numbers)


def summary_lines(after: Evaluation, before: Evaluation | None) -> list[str]:
    """Return the same as two lines of text; one if there are no numbers."""
    found = headline(after, before)
    numbers = [f"{each.label} {each.value} ({each.detail})" for each in found.numbers]
    return [found.sentence, *(["; ".join(numbers)] if numbers else [])]


def _sentence(run: Evaluation, split: str, thinking: str) -> str:
    low, high = (_interval(run, split, mode) for mode in ("never", thinking))
    values = f"from {_percent(run, split, 'never')} to {_percent(run, split, thinking)}"
    what = f"of {split} queries whose right target comes first"
    if high[0] > low[1]:
        return f"Thinking lifts the share {what} {values}."
    if high[1] < low[0]:
        return f"Thinking lowers the share {what} {values}."
    return f"Thinking makes no clear difference to the share {what}: {values}."


def _quality(run: Evaluation, split: str, mode: str, suffix: str) -> Number:
    low, high = _interval(run, split, mode)
    label = f"hit@1, {MODE_NAMES[mode]}{suffix}"
    detail = f"{100 * low:.1f} to {100 * high:.1f} %, 95 % interval"
    return Number(label, _percent(run, split, mode), detail)


def _has(run: Evaluation, split: str, mode: str) -> bool:
    return f"{split}/all/{mode}/hit@1" in run.metrics


def _interval(run: Evaluation, split: str, mode: str) -> tuple[float, float]:
    start = f"{split}/all/{mode}/hit@1"
    return run.metrics[f"{start}_low"], run.metrics[f"{start}_high"]


def _percent(run: Evaluation, split: str, mode: str) -> str:
    return f"{100 * run.metrics[f'{split}/all/{mode}/hit@1']:.1f} %"


def _tokens(run: Evaluation, split: str, mode: str) -> float:
    return run.metrics[f"{split}/all/{mode}/think_tokens"]
