"""Names of rewards -> callables that name the reward and the row where something is wrong.

A name is `name` of a registry that is passed in, `package.module:function`, or
`path/to/file.py:function`. Everything that can be wrong with a reward before the first rollout is
found while it is loaded, before a model is.
"""

import functools
import importlib
import importlib.util
import inspect
import math
import reprlib
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from twn_rl.runtime.nearest import hint, path_hint

Reward = Callable[..., Sequence[float | None]]

TRL_COLUMNS = frozenset(
    {"prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric"}
)


class RewardLoadingError(ValueError):
    """A reward that cannot be used as it was named; says what is wrong and what to change."""

    @classmethod
    def of(cls, name: str, problem: str) -> "RewardLoadingError":
        """Return the error of one reward."""
        return cls(f"reward = '{name}'{problem}")


class RewardError(RuntimeError):
    """A reward that failed during training; names the reward and the row."""


def load_rewards(
    names: Sequence[str],
    registry: Mapping[str, Reward],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    available_columns: Collection[str] | None = None,
) -> list["CheckedReward"]:
    """Return one checked callable per name, in order, with its parameters bound.

    Args:
        names: Each a key of `registry`, `package.module:function` or `path/to/file.py:function`.
        registry: The built-in rewards by name.
        parameters: Values for keyword arguments, by the same names as in `names`.
        available_columns: Columns that the trainer will hand over besides TRL's own; with them a
            reward that asks for a missing column is refused now. `None` skips that check.

    Raises:
        RewardLoadingError: If a name, a parameter or a required column does not exist.
    """
    parameters = parameters or {}
    unused = sorted(set(parameters) - set(names))
    if not names or unused:
        raise RewardLoadingError(
            f"rewards = {list(names)} with parameters for {unused}, expected at least one reward "
            "and parameters for listed rewards only; add the reward or remove its parameters"
        )
    rewards: list[CheckedReward] = []
    for name in names:
        values = parameters.get(name) or {}
        function = _bind(name, _find(name, registry), values, available_columns or ())
        if available_columns is not None:
            _check_columns(name, function, available_columns)
        rewards.append(CheckedReward(function))
    log_names = [reward.__name__ for reward in rewards]
    twice = sorted({name for name in log_names if log_names.count(name) > 1})
    if twice:
        raise RewardLoadingError(
            f"rewards = {list(names)} hold {twice} more than once, expected one of each name: "
            "TRL logs by function name and would mix their curves; rename the function"
        )
    return rewards


def required_columns(reward_func: Reward) -> list[str]:
    """Return the arguments without a default value that are not TRL's own, in order.

    Example:
        >>> def near(completions, *, target_rank, top_k=3, **kwargs): ...
        >>> required_columns(near)
        ['target_rank']
    """
    arguments = _keywords(reward_func)
    return [a.name for a in arguments if a.default is a.empty and a.name not in TRL_COLUMNS]


def _keywords(function: Any) -> list[inspect.Parameter]:
    arguments = inspect.signature(function).parameters.values()
    return [a for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]


def _log_name(function: Any) -> str:
    """Return the name under which TRL logs a reward; partials are unwrapped."""
    own = getattr(function, "__name__", None)
    if own is None and isinstance(function, functools.partial):
        return _log_name(function.func)
    return own or type(function).__name__


def _find(name: str, registry: Mapping[str, Reward]) -> Reward:
    if ":" not in name:
        if name not in registry:
            raise RewardLoadingError.of(
                name,
                f" is unknown, expected one of {sorted(registry)}{hint(name, registry)} Your own "
                "reward is named 'package.module:function' or 'path/to/file.py:function'",
            )
        found: Any = registry[name]
    else:
        location, _, attribute = name.rpartition(":")
        is_file = location.endswith(".py") or "/" in location or "\\" in location
        module = _import_file(name, Path(location)) if is_file else _import_module(name, location)
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        if not hasattr(module, attribute):
            raise RewardLoadingError.of(
                name,
                f": the module has no '{attribute}', expected one of its functions "
                f"{sorted(key for key in known if key[0] != '_')}{hint(attribute, known)} Correct "
                "the part after ':'",
            )
        found = getattr(module, attribute)
    _check_callable(name, found)
    return found


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise RewardLoadingError.of(
            name,
            f": no Python file at {path.absolute()}, expected an existing path/to/file.py relative "
            f"to the current folder{path_hint(path)} Correct the path",
        )
    # One stable module name per file: functions found twice are then the same object.
    module_name = f"reward_file_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[module_name] = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failure(name, str(path), error) from error
    return module


def _import_module(name: str, module_name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise RewardLoadingError.of(
            name,
            f": '{module_name}' is no module path, expected 'package.module:function' or "
            "'path/to/file.py:function'; correct the part before ':'",
        )
    try:
        return importlib.import_module(module_name)
    except Exception as error:
        absent = error.name if isinstance(error, ModuleNotFoundError) else None
        if absent is None or not f"{module_name}.".startswith(f"{absent}."):
            raise _import_failure(name, module_name, error) from error
        raise RewardLoadingError.of(
            name,
            f": there is no module '{absent}', expected one that this Python can import; install "
            "it, or name the file as 'path/to/file.py:function'",
        ) from error


def _import_failure(name: str, place: str, error: Exception) -> RewardLoadingError:
    return RewardLoadingError.of(
        name,
        f": importing {place} raised {type(error).__name__}: {error}; expected it to import "
        "cleanly; correct that file (the cause is chained)",
    )


def _check_callable(name: str, found: Any) -> None:
    if isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RewardLoadingError.of(
            name,
            " is an nn.Module, expected a plain function: TRL would treat it as a reward model; "
            "compute its scores as a column and write a function that reads them",
        )
    if not callable(found) or isinstance(found, type):
        raise RewardLoadingError.of(
            name,
            f" is {type(found).__name__} {reprlib.repr(found)}, expected a function "
            "def name(completions, *, <columns>, **kwargs); name the function",
        )
    target = found.func if isinstance(found, functools.partial) else found
    is_async = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)
    arguments = inspect.signature(found).parameters.values()
    if is_async or not any(a.kind is a.VAR_KEYWORD for a in arguments):
        raise RewardLoadingError.of(
            name,
            f" {'is async' if is_async else 'has no **kwargs'}, expected "
            "def name(completions, *, <columns>, **kwargs): it is called at once with every "
            "column, also those it does not read; change its signature",
        )


def _bind(
    name: str, function: Reward, values: Mapping[str, Any], available_columns: Collection[str]
) -> Reward:
    taken = TRL_COLUMNS | set(available_columns)
    accepted = [a.name for a in _keywords(function) if a.name not in taken]
    unknown = sorted(set(values) - set(accepted))
    if unknown:
        raise RewardLoadingError.of(
            name,
            f" got parameters {unknown}, expected some of {accepted}; correct the spelling (a "
            "column of the data cannot be set as a parameter)",
        )
    return functools.partial(function, **values) if values else function


def _check_columns(name: str, function: Reward, available_columns: Collection[str]) -> None:
    missing = [c for c in required_columns(function) if c not in available_columns]
    if missing:
        raise RewardLoadingError.of(
            name,
            f" needs columns {missing}, expected some of {sorted(available_columns)}; add them to "
            "the records' metadata, or give the argument a default value if it is a parameter",
        )


# Sums and squares of rewards stay finite in float32.
LARGEST_REWARD = 1e15


class CheckedReward:
    """A reward whose exceptions, wrong lengths and non-finite values name the reward and the row.

    A bug stops the run instead of being trained on. A class and not a closure so that it pickles;
    TRL logs it under `__name__`.
    """

    def __init__(self, reward_func: Reward) -> None:
        """Wrap `reward_func`, a function or a partial of one."""
        self.reward_func = reward_func
        self.__name__ = _log_name(reward_func)

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
            output = self.reward_func(completions=completions, **_copied(columns))
        except (Exception, SystemExit) as error:  # no reward ends a run as if it were done
            raise self._explained(error, completions, columns) from error
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
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not abs(number) <= LARGEST_REWARD:  # not for NaN either
            raise RewardError(
                f"reward '{self.__name__}' gave {reprlib.repr(value)} for row {row}, expected a "
                f"finite number of at most {LARGEST_REWARD:g} in size or None (not applicable); "
                f"correct the reward. {self._row(row, completions, columns)}"
            )
        return number

    def _explained(
        self, error: BaseException, completions: Sequence[Any], columns: dict[str, Any]
    ) -> RewardError:
        """Return the error with the first row that raises by itself."""
        start = f"reward '{self.__name__}' raised {type(error).__name__}: {error}"
        count = len(completions)
        for row in range(count):
            own = {
                name: column[row : row + 1]
                if isinstance(column, list) and len(column) == count
                else column
                for name, column in columns.items()
            }
            try:
                self.reward_func(completions=completions[row : row + 1], **_copied(own))
            except (Exception, SystemExit) as row_error:
                return RewardError(
                    f"{start}. Alone, row {row} raises {type(row_error).__name__}: {row_error}; "
                    "expected a float or None. Correct the reward or the data. "
                    f"{self._row(row, completions, columns)}"
                )
        return RewardError(
            f"{start}. No single row raises by itself, so the rows disagree with each other or a "
            f"column has another length than the {count} completions; correct the reward"
        )

    def _row(self, row: int, completions: Sequence[Any], columns: dict[str, Any]) -> str:
        """Return what the reward reads of a row."""
        read = [name for name in required_columns(self.reward_func) if name in columns]
        cells = {"completion": completions[row]}
        cells |= {name: columns[name][row] for name in read if row < len(columns[name])}
        shown = ", ".join(f"{name} = {reprlib.repr(cell)}" for name, cell in cells.items())
        return f"Row {row}: {shown}"


def _copied(columns: dict[str, Any]) -> dict[str, Any]:
    """Return columns whose lists a reward may change without changing what the next one reads."""
    return {
        name: [list(value) if isinstance(value, list) else value for value in column]
        if isinstance(column, list)
        else column
        for name, column in columns.items()
    }
