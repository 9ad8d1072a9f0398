"""A reward that stops the run with its name and the row; knows no registry, file or trainer."""

import functools
import inspect
import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

Reward = Callable[..., list[float | None]]

TRL_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)
KEYWORD_KINDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class RewardError(RuntimeError):
    """A reward that failed during training; names the reward and the row."""


def log_name(function: Any) -> str:
    """Return the name under which TRL logs a reward; partials are unwrapped."""
    own = getattr(function, "__name__", None)
    if own is None and isinstance(function, functools.partial):
        return log_name(function.func)
    return own or type(function).__name__


def required_columns(reward_func: Reward) -> list[str]:
    """Return the arguments without a default value that are not TRL's own, in order.

    Example:
        >>> def near(completions, *, target_rank, top_k=3, **kwargs): ...
        >>> required_columns(near)
        ['target_rank']
    """
    return [
        parameter.name
        for parameter in inspect.signature(reward_func).parameters.values()
        if parameter.kind in KEYWORD_KINDS
        and parameter.default is inspect.Parameter.empty
        and parameter.name not in TRL_COLUMNS
    ]


def checked(reward_func: Reward) -> "CheckedReward":
    """Return the reward wrapped so that a bug stops the run instead of training on it."""
    return CheckedReward(reward_func)


class CheckedReward:
    """A reward whose exceptions, wrong lengths and non-finite values name the reward and the row.

    A class and not a closure so that it pickles; TRL logs it under `__name__`.
    """

    def __init__(self, reward_func: Reward) -> None:
        """Wrap `reward_func`, a function or a partial of one."""
        self.reward_func = reward_func
        self.__name__ = log_name(reward_func)

    @property
    def __signature__(self) -> inspect.Signature:
        """The signature of the wrapped reward, for `inspect.signature`."""
        return inspect.signature(self.reward_func)

    def __call__(self, completions: Sequence[Any], **columns: Any) -> list[float | None]:
        """Return one float or `None` per completion.

        Raises:
            RewardError: If the reward raises, or returns a wrong number of values or a value that
                is neither `None` nor a finite number.
        """
        try:
            output = self.reward_func(completions=completions, **columns)
        except Exception as error:
            raise self._explain(error, completions, columns) from error
        if not isinstance(output, Iterable) or isinstance(output, str | bytes):
            raise RewardError(
                f"reward '{self.__name__}' returned {type(output).__name__}, expected a list of "
                f"{len(completions)} values; return one float or None per completion"
            )
        values = list(output)
        if len(values) != len(completions):
            raise RewardError(
                f"reward '{self.__name__}' returned {len(values)} values for {len(completions)} "
                "completions, expected one each; return None where it does not apply"
            )
        return [self._number(value, row, completions, columns) for row, value in enumerate(values)]

    def _number(
        self, value: Any, row: int, completions: Sequence[Any], columns: dict[str, Any]
    ) -> float | None:
        if value is None:
            return None
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise RewardError(
                f"reward '{self.__name__}' gave {reprlib.repr(value)} for row {row}, expected a "
                "finite number or None (not applicable); correct the reward. "
                f"Row {row}: {self._describe(row, completions, columns)}"
            )
        return number

    def _explain(
        self, error: Exception, completions: Sequence[Any], columns: dict[str, Any]
    ) -> RewardError:
        start = f"reward '{self.__name__}' raised {type(error).__name__}: {error}"
        for row in range(len(completions)):
            try:
                self.reward_func(
                    completions=completions[row : row + 1],
                    **{
                        name: column[row : row + 1]
                        if isinstance(column, list) and len(column) == len(completions)
                        else column
                        for name, column in columns.items()
                    },
                )
            except Exception as row_error:
                return RewardError(
                    f"{start}. Alone, row {row} raises {type(row_error).__name__}: {row_error}; "
                    "expected a float or None. Correct the reward or the data. "
                    f"Row {row}: {self._describe(row, completions, columns)}"
                )
        return RewardError(
            f"{start}. No single row raises by itself, so the rows disagree with each other or a "
            f"column has another length than the {len(completions)} completions; correct the reward"
        )

    def _describe(self, row: int, completions: Sequence[Any], columns: dict[str, Any]) -> str:
        read = [name for name in required_columns(self.reward_func) if name in columns]
        cells = {"completion": completions[row]}
        cells |= {name: columns[name][row] for name in read if row < len(columns[name])}
        return ", ".join(f"{name} = {reprlib.repr(cell)}" for name, cell in cells.items())
