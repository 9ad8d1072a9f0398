"""Names of rewards -> checked callables; knows no reward itself and no trainer.

A name is `name` of a registry that is passed in, `package.module:function`, or
`path/to/file.py:function`. Everything that can be wrong with a reward before the first rollout is
found here, before a model is loaded.
"""

import difflib
import functools
import importlib
import importlib.util
import inspect
import reprlib
import sys
import zlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from twn_rl.training.checked_rewards import (
    KEYWORD_KINDS,
    TRL_COLUMNS,
    CheckedReward,
    Reward,
    RewardError,
    checked,
    log_name,
    required_columns,
)

__all__ = ["CheckedReward", "RewardError", "RewardLoadingError", "checked", "load_rewards"]


class RewardLoadingError(ValueError):
    """A reward that cannot be used as it was named; says what is wrong and what to change."""


def load_rewards(
    names: Sequence[str],
    registry: Mapping[str, Reward],
    parameters: Mapping[str, Mapping[str, Any]] | None = None,
    *,
    available_columns: Collection[str] | None = None,
) -> list[CheckedReward]:
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
        function = _find(name, registry)
        bound = _bind(name, function, parameters.get(name) or {}, available_columns or ())
        if available_columns is not None:
            _check_columns(name, bound, available_columns)
        rewards.append(checked(bound))
    log_names = [reward.__name__ for reward in rewards]
    twice = sorted({name for name in log_names if log_names.count(name) > 1})
    if twice:
        raise RewardLoadingError(
            f"rewards = {list(names)} hold {twice} more than once, expected one of each name: "
            "TRL logs by function name and would mix their curves; rename the function"
        )
    return rewards


def _find(name: str, registry: Mapping[str, Reward]) -> Reward:
    if ":" not in name:
        if name not in registry:
            nearest = difflib.get_close_matches(name, registry, n=1, cutoff=0.4)
            hint = f"; did you mean '{nearest[0]}'" if nearest else ""
            raise RewardLoadingError(
                f"reward = '{name}' is unknown, expected one of {sorted(registry)}{hint}. Your own "
                "reward is named 'package.module:function' or 'path/to/file.py:function'"
            )
        found: Any = registry[name]
    else:
        location, _, attribute = name.rpartition(":")
        is_file = location.endswith(".py") or "/" in location or "\\" in location
        module = _import_file(name, Path(location)) if is_file else _import_module(name, location)
        found = _get(name, module, attribute)
    _check_callable(name, found)
    return found


def _import_file(name: str, path: Path) -> ModuleType:
    if not path.is_file() or path.suffix != ".py":
        raise RewardLoadingError(
            f"reward = '{name}': no Python file at {path.absolute()}, expected an existing "
            "path/to/file.py relative to the current folder; correct the path"
        )
    # One stable module name per file: functions found twice are then the same object.
    module_name = f"reward_file_{path.stem}_{zlib.crc32(str(path.resolve()).encode()):x}"
    if module_name in sys.modules:
        return sys.modules[module_name]
    spec = importlib.util.spec_from_file_location(module_name, path)
    if spec is None or spec.loader is None:  # cannot happen for a .py file; keeps the types honest
        raise RewardLoadingError(f"reward = '{name}': {path} cannot be imported; use a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[module_name]
        raise _import_failure(name, str(path), error) from error
    return module


def _import_module(name: str, module_name: str) -> ModuleType:
    if not all(part.isidentifier() for part in module_name.split(".")):
        raise RewardLoadingError(
            f"reward = '{name}': '{module_name}' is no module path, expected "
            "'package.module:function' or 'path/to/file.py:function'; correct the part before ':'"
        )
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise _import_failure(name, module_name, error) from error
        raise RewardLoadingError(
            f"reward = '{name}': there is no module '{error.name}', expected one that this Python "
            "can import; install it, or name the file as 'path/to/file.py:function'"
        ) from error
    except Exception as error:
        raise _import_failure(name, module_name, error) from error


def _import_failure(name: str, place: str, error: Exception) -> RewardLoadingError:
    return RewardLoadingError(
        f"reward = '{name}': importing {place} raised {type(error).__name__}: {error}; expected it "
        "to import cleanly; correct that file (the cause is chained)"
    )


def _get(name: str, module: ModuleType, attribute: str) -> Any:
    try:
        return getattr(module, attribute)
    except AttributeError as error:
        known = sorted(
            key
            for key, value in vars(module).items()
            if inspect.isfunction(value) and key[0] != "_"
        )
        raise RewardLoadingError(
            f"reward = '{name}': the module has no '{attribute}', expected one of its functions "
            f"{known}; correct the part after ':'"
        ) from error


def _check_callable(name: str, found: Any) -> None:
    if isinstance(found, nn.Module) or (isinstance(found, type) and issubclass(found, nn.Module)):
        raise RewardLoadingError(
            f"reward = '{name}' is an nn.Module, expected a plain function: TRL would treat it as "
            "a reward model; compute its scores as a column and write a function that reads them"
        )
    if not callable(found) or isinstance(found, type):
        raise RewardLoadingError(
            f"reward = '{name}' is {type(found).__name__} {reprlib.repr(found)}, expected a "
            "function def name(completions, *, <columns>, **kwargs); name the function"
        )
    target = found.func if isinstance(found, functools.partial) else found
    is_async = inspect.iscoroutinefunction(target) or inspect.iscoroutinefunction(target.__call__)
    takes_any = any(
        parameter.kind is inspect.Parameter.VAR_KEYWORD
        for parameter in inspect.signature(found).parameters.values()
    )
    if is_async or not takes_any:
        what = "is async" if is_async else "has no **kwargs"
        raise RewardLoadingError(
            f"reward = '{name}' {what}, expected def name(completions, *, <columns>, **kwargs): it "
            "is called at once with every column, also those it does not read; change its signature"
        )


def _bind(
    name: str, function: Reward, values: Mapping[str, Any], available_columns: Collection[str]
) -> Reward:
    if not values:
        return function
    taken = TRL_COLUMNS | set(available_columns)
    accepted = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in KEYWORD_KINDS and parameter.name not in taken
    ]
    unknown = sorted(set(values) - set(accepted))
    if unknown:
        raise RewardLoadingError(
            f"reward = '{name}' got parameters {unknown}, expected some of {accepted}; correct "
            "the spelling (a column of the data cannot be set as a parameter)"
        )
    bound = functools.partial(function, **values)
    vars(bound)["__name__"] = log_name(function)
    return bound


def _check_columns(name: str, reward_func: Reward, available_columns: Collection[str]) -> None:
    bound = reward_func.keywords if isinstance(reward_func, functools.partial) else {}
    needed = [column for column in required_columns(reward_func) if column not in bound]
    missing = [column for column in needed if column not in available_columns]
    if missing:
        raise RewardLoadingError(
            f"reward = '{name}' needs columns {missing}, expected some of "
            f"{sorted(available_columns)}; add them to the records' metadata, or give the "
            "argument a default value if it is a parameter"
        )
