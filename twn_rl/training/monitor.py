"""Callbacks that watch a run: collapse warnings and a metrics file; knows no model and no loss.

They read what the trainer logs, TRL's names included, and nothing else.
"""

import json
import logging
import math
import os
from collections import Counter
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)


def _limit(default: float | None, metric: str, is_lower_limit: bool, text: str) -> Any:
    metadata = {"metric": metric, "is_lower_limit": is_lower_limit, "help": text}
    return field(default=default, metadata=metadata)


@dataclass
class CollapseThresholds:
    """Limits on logged values; `None` switches one off.

    Attributes:
        max_frac_reward_zero_std: Share of groups whose rollouts all earn the same reward.
        min_reward_std: Standard deviation of the rewards.
        min_mean_length_tokens: Mean length of the completions.
        max_clipped_ratio: Share of completions cut off at the budget.
        max_incomplete_ratio: Share of thinks that fall back to no-think, truncated or malformed.
        min_think_rate: Share of rollouts that think where the policy decides, before mixing.
        max_kl: Mean KL divergence from the reference policy.
        min_embedding_variance: 1 - squared length of the mean unit vector; 0 if all are equal.
        patience: Logs in a row over a limit before it counts as a collapse.
    """

    max_frac_reward_zero_std: float | None = _limit(
        0.9,
        "frac_reward_zero_std",
        False,
        "Share of groups with one and the same reward: they have no advantage and teach nothing. "
        "Raise the sampling temperature or num_generations, or take harder records. None: off.",
    )
    min_reward_std: float | None = _limit(
        1e-4,
        "reward_std",
        True,
        "Standard deviation of rewards: near 0 the reward is constant. None: off.",
    )
    min_mean_length_tokens: float | None = _limit(
        2.0,
        "completions/mean_length",
        True,
        "Mean completion length, in tokens: near 1 the policy stopped thinking. None: off.",
    )
    max_clipped_ratio: float | None = _limit(
        0.5,
        "completions/clipped_ratio",
        False,
        "Share of completions cut off at max_completion_length: their thinks count as incomplete. "
        "Raise the budget or add the length reward. None: off.",
    )
    max_incomplete_ratio: float | None = _limit(
        0.5,
        "rollouts/incomplete_ratio",
        False,
        "Share of truncated or malformed thinks: the policy hides in the no-think fall-back. Add "
        "the format reward or train the warm start longer. None: off.",
    )
    min_think_rate: float | None = _limit(
        0.01,
        "rollouts/think_rate",
        True,
        "Share of rollouts whose policy chose to think: near 0 it never does. Lower min_gap or "
        "length_cost of the adaptive reward. Only logged where the policy decides. None: off.",
    )
    max_kl: float | None = _limit(
        10.0,
        "kl",
        False,
        "Mean KL divergence per token, in nats: the policy left the reference. Lower the learning "
        "rate or raise beta. Only logged when beta > 0. None: off.",
    )
    min_embedding_variance: float | None = _limit(
        0.01,
        "embedding_variance",
        True,
        "1 - |mean unit vector|^2 over a batch: near 0 all inputs have the same vector. None: off.",
    )
    patience: int = field(
        default=3,
        metadata={"help": "Logs in a row over one limit before it is reported. At least 1."},
    )

    def __post_init__(self) -> None:
        """Collect every problem of the thresholds into one error."""
        problems = [
            f"{limit.name} = {value}, expected a finite number or None"
            for limit in fields(self)
            if (value := getattr(self, limit.name)) is not None and not math.isfinite(value)
        ]
        if self.patience < 1:
            problems.append(f"patience = {self.patience}, expected >= 1")
        if problems:
            raise ValueError("CollapseThresholds: " + "; ".join(problems) + "; change these fields")


class CollapseWatch(TrainerCallback):
    """Warns when a logged value stays over its limit and, if asked to, stops the run.

    A value that is not finite counts at once, without patience, also `loss` and `grad_norm`. The
    number of warnings so far is added to the logs as `collapse_warnings`.

    Attributes:
        thresholds: The limits.
        stop_on_collapse: Whether the first warning ends training (on every process).
        counts: Number of warnings by metric.
        stop_reason: Why the run was stopped; `None` while it was not.
    """

    def __init__(
        self, thresholds: CollapseThresholds | None = None, *, stop_on_collapse: bool = False
    ) -> None:
        self.thresholds = thresholds or CollapseThresholds()
        self.stop_on_collapse = stop_on_collapse
        self.counts: Counter[str] = Counter()
        self.stop_reason: str | None = None
        self._streaks: Counter[str] = Counter()

    def on_log(  # noqa: D102 - documented by TrainerCallback
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {} if logs is None else logs
        problems = self._problems(logs)
        for metric, problem in problems.items():
            self.counts[metric] += 1
            if state.is_world_process_zero:
                logger.warning("step %d: %s", state.global_step, problem)
        logs["collapse_warnings"] = float(self.counts.total())
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1]["collapse_warnings"] = logs["collapse_warnings"]
        if self.stop_on_collapse and _on_any_process(bool(problems), args):
            reason = "; ".join(problems.values()) or "another process saw a collapse"
            self.stop_reason = f"step {state.global_step}: {reason}"
            control.should_training_stop = True
            if state.is_world_process_zero:
                logger.error("stopping at %s", self.stop_reason)

    def _problems(self, logs: dict[str, Any]) -> dict[str, str]:
        problems: dict[str, str] = {}
        watched = [limit for limit in fields(self.thresholds) if "metric" in limit.metadata]
        for metric in {"loss", "grad_norm", *(limit.metadata["metric"] for limit in watched)}:
            value = _number(logs.get(metric))
            if value is not None and not math.isfinite(value):
                problems[metric] = f"{metric} = {value}, expected a finite number"
        for limit in watched:
            metric, bound = limit.metadata["metric"], getattr(self.thresholds, limit.name)
            value = _number(logs.get(metric))
            if value is None or bound is None or metric in problems:
                continue
            is_lower_limit = limit.metadata["is_lower_limit"]
            is_over = value < bound if is_lower_limit else value > bound
            self._streaks[metric] = self._streaks[metric] + 1 if is_over else 0
            # Reported every `patience` logs of one streak: visible, and not a line per step.
            if self._streaks[metric] and self._streaks[metric] % self.thresholds.patience == 0:
                problems[metric] = (
                    f"{metric} = {value:.6g} for {self._streaks[metric]} logs, expected "
                    f"{'at least' if is_lower_limit else 'at most'} {bound:g}. "
                    f"{limit.metadata['help']}"
                )
        return problems


class MetricsWriter(TrainerCallback):
    """Appends every log as one JSON line with its step to a file, on the main process.

    On resume, lines after the resumed step are dropped, so that a curve has no step twice. A new
    run moves an existing file to `<name>.previous`. Values that are not finite are written as the
    strings "nan", "inf" and "-inf", because JSON has no such numbers.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(  # noqa: D102 - documented by TrainerCallback
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not self.path.exists():
            return
        if state.global_step == 0:
            os.replace(self.path, self.path.with_name(f"{self.path.name}.previous"))
            return
        kept = []
        for line in self.path.read_text(encoding="utf-8").splitlines():
            try:
                step = json.loads(line)["step"]
            except (json.JSONDecodeError, KeyError, TypeError):
                logger.warning("%s: dropped a broken line: %.80s", self.path, line)
                continue
            if step <= state.global_step:
                kept.append(line + "\n")
        write_text(self.path, "".join(kept))

    def on_log(  # noqa: D102 - documented by TrainerCallback
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        row = {"step": state.global_step, **{key: _json_value(logs[key]) for key in logs}}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, allow_nan=False) + "\n")


def _number(value: Any) -> float | None:
    """Return a logged value as a float; `None` where TRL had nothing valid to average."""
    return float(value) if isinstance(value, int | float | torch.Tensor) else None


def _json_value(value: Any) -> Any:
    value = value.item() if hasattr(value, "item") else value
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | str | bool | None) else repr(value)


def _on_any_process(flag: bool, args: TrainingArguments) -> bool:
    # A metric may differ between processes; if one stopped alone, the others would wait for ever.
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return flag
    total = torch.tensor([float(flag)], device=args.device)
    torch.distributed.all_reduce(total)
    return total.item() > 0
