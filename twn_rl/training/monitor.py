"""Callbacks that watch what a trainer logs: warnings of a collapse, and a file of metrics."""

import json
import logging
import math
from collections import Counter, deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from statistics import NormalDist, fmean
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments

from twn_rl.runtime.whole_files import write_text

logger = logging.getLogger(__name__)

_UNLEARNS = (
    "the policy unlearns. Lower the learning rate or raise beta, and go back to a checkpoint of "
    "before."
)


def _limit(default: float, metric: str, text: str, *, is_lower: bool = False) -> Any:
    metadata = {"metric": metric, "is_lower": is_lower, "help": text}
    return field(default=default, metadata=metadata)


@dataclass
class CollapseThresholds:
    """Limits on logged values, the lowest or the highest that is fine; `None` switches one off."""

    max_frac_reward_zero_std: float | None = _limit(
        0.9,
        "frac_reward_zero_std",
        "Share of groups with one and the same reward: they have no advantage and teach nothing. "
        "Raise the sampling temperature or num_generations, or take harder records.",
    )
    min_reward_std: float | None = _limit(
        1e-4,
        "reward_std",
        "Standard deviation of rewards: near 0 the reward is constant.",
        is_lower=True,
    )
    min_mean_length_tokens: float | None = _limit(
        2.0,
        "completions/mean_length",
        "Mean completion length, in tokens: near 1 the policy stopped thinking.",
        is_lower=True,
    )
    max_clipped_ratio: float | None = _limit(
        0.5,
        "completions/clipped_ratio",
        "Share of completions cut off at max_completion_length: their thinks count as incomplete. "
        "Raise the budget or add the length reward.",
    )
    max_incomplete_ratio: float | None = _limit(
        0.5,
        "rollouts/incomplete_ratio",
        "Share of truncated or malformed thinks: the policy hides in the no-think fall-back. Add "
        "the format reward, weigh it by the scale of the others (rewards/*/std), or train the warm "
        "start longer.",
    )
    min_think_rate: float | None = _limit(
        0.01,
        "rollouts/think_rate",
        "Share of rollouts whose policy chose to think: near 0 it never does. Lower min_gap or "
        "length_cost of the adaptive reward. Only logged where the policy decides.",
        is_lower=True,
    )
    max_kl: float | None = _limit(
        10.0,
        "kl",
        "Mean KL divergence per token, in nats: the policy left the reference. Lower the learning "
        "rate or raise beta. Only logged when beta > 0.",
    )
    min_embedding_variance: float | None = _limit(
        0.01,
        "embedding_variance",
        "1 - |mean unit vector|^2 over a batch: near 0 all inputs have the same vector.",
        is_lower=True,
    )
    reward_fall_p_value: float | None = field(
        default=1e-4,
        metadata={
            "help": f"The reward has fallen if its mean over 20 logs lies so far below an earlier "
            f"one that chance would make it so this rarely: {_UNLEARNS}"
        },
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
            if "metric" in limit.metadata
            if (value := getattr(self, limit.name)) is not None and not math.isfinite(value)
        ]
        if self.reward_fall_p_value is not None and not 0 < self.reward_fall_p_value < 1:
            problems.append(
                f"reward_fall_p_value = {self.reward_fall_p_value}, expected None or in (0, 1)"
            )
        if self.patience < 1:
            problems.append(f"patience = {self.patience}, expected >= 1")
        if problems:
            raise ValueError("CollapseThresholds: " + "; ".join(problems) + "; change these fields")


class Fall:
    """Whether the mean of a value's last logs lies below the best such mean before.

    The spread of a log is that of neighbours (half the mean squared successive difference; von
    Neumann, 1941), which a trend does not inflate. The more means there are to compare, the larger
    a fall has to be (Bonferroni): on values without any trend, 1 to 3 % of runs of 100 to 5000 logs
    give an alarm at a p-value of 1e-4.

    Attributes:
        best: The highest mean of `WINDOW` logs that ended before the last ones began.
        last: The mean of the last `WINDOW` logs.
    """

    WINDOW = 20

    def __init__(self) -> None:
        self.best, self.last = -math.inf, math.inf
        self._values: deque[float] = deque(maxlen=self.WINDOW)
        self._overlapping: deque[float] = deque()
        self._count, self._squares = 0, 0.0

    def add(self, value: float, p_value: float) -> bool:
        """Take up one value; return whether the last ones have fallen."""
        if self._values:
            self._squares += (value - self._values[-1]) ** 2
        self._count += 1
        self._values.append(value)
        if len(self._values) < self.WINDOW:
            return False
        if len(self._overlapping) == self.WINDOW:
            self.best = max(self.best, self._overlapping.popleft())
        self.last = fmean(self._values)
        self._overlapping.append(self.last)
        if self.last >= self.best:
            return False
        windows = self._count / self.WINDOW
        errors = -NormalDist().inv_cdf(p_value / (windows * (windows - 1) / 2))
        error_of_difference = math.sqrt(self._squares / (self._count - 1) / self.WINDOW)
        return self.best - self.last > errors * error_of_difference


class CollapseWatch(TrainerCallback):
    """Warns when a logged value stays over its limit and, if asked to, stops the run.

    A value that is not finite counts at once, without patience, also `loss` and `grad_norm`. The
    number of warnings so far is added to the logs as `collapse_warnings`.

    Attributes:
        counts: Number of warnings by metric.
        stop_reason: Why the run was stopped, on every process; `None` while it was not.
    """

    def __init__(
        self, thresholds: CollapseThresholds | None = None, *, stop_on_collapse: bool = False
    ) -> None:
        self.thresholds = thresholds or CollapseThresholds()
        self.stop_on_collapse = stop_on_collapse
        self.counts: Counter[str] = Counter()
        self.stop_reason: str | None = None
        self._streaks: Counter[str] = Counter()
        self._rewards = Fall()

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Take up the rewards of the run that is resumed."""
        self._rewards = Fall()
        for logs in state.log_history:
            self._add_reward(logs)

    def on_log(self, args, state, control, logs: Any = None, **kwargs: Any) -> None:
        """Count, warn, and stop the run if asked to."""
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
            is_lower = limit.metadata["is_lower"]
            is_over = value < bound if is_lower else value > bound
            if self._is_due(metric, is_over, self.thresholds.patience):
                problems[metric] = (
                    f"{metric} = {value:.6g} for {self._streaks[metric]} logs, expected "
                    f"{'at least' if is_lower else 'at most'} {bound:g}. "
                    f"{limit.metadata['help']}"
                )
        has_fallen = self._add_reward(logs)
        if has_fallen is not None and self._is_due("reward", has_fallen, Fall.WINDOW, first=1):
            problems["reward"] = (
                f"reward = {self._rewards.last:.4g} in the mean of {Fall.WINDOW} logs, after "
                f"{self._rewards.best:.4g} before. "
                f"The mean is too low for chance: {_UNLEARNS}"
            )
        return problems

    def _add_reward(self, logs: dict[str, Any]) -> bool | None:
        """Return whether the reward has fallen; `None` where none was logged, or nobody asks."""
        reward, p_value = _number(logs.get("reward")), self.thresholds.reward_fall_p_value
        if reward is None or p_value is None or not math.isfinite(reward):
            return None
        return self._rewards.add(reward, p_value)

    def _is_due(self, metric: str, is_over: bool, every: int, *, first: int = 0) -> bool:
        """Count the streak; a long one is reported time and again, and not at every step."""
        self._streaks[metric] = self._streaks[metric] + 1 if is_over else 0
        return self._streaks[metric] > 0 and self._streaks[metric] % every == first


class MetricsWriter(TrainerCallback):
    """Appends every log as one JSON line with its step to a file, on the main process.

    On resume, lines after the resumed step are dropped, so that a curve has no step twice. A new
    run moves an existing file to `<name>.previous`. Values that are not finite are written as the
    strings "nan", "inf" and "-inf", because JSON has no such numbers.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def on_train_begin(self, args, state, control, **kwargs: Any) -> None:
        """Drop what comes after the resumed step, or set the file of an earlier run aside."""
        if not state.is_world_process_zero or not self.path.exists():
            return
        if state.global_step == 0:
            self.path.replace(self.path.with_name(f"{self.path.name}.previous"))
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

    def on_log(self, args, state, control, logs: Any = None, **kwargs: Any) -> None:
        """Append one line."""
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
